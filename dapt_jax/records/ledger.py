"""The ledger: what every phase of every arm of a study has cost, one JSON line each."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapt_jax.errors import UserError, nearest
from dapt_jax.runtime import atomic_files

STAGES = ("dapt", "transfer", "score")
CACHED = ("off", "filled", "reused")


@dataclasses.dataclass
class Row:
    """The cost of one phase of one arm.

    An arm whose frozen prefix another arm of the study had already computed did not pay for it. `model_flops`,
    `hardware_flops` and the seconds hold what was run for this row; `reused_flops` and `reused_s` hold what this row
    would have run besides, had it been alone. So a study's bill is the sum of the former, and the *standalone* cost of
    an arm, by which strategies are compared, is the sum of both.

    Attributes:
        strategy: name of the strategy.
        seed: seed of the arm.
        stage: "dapt", "transfer" or "score".
        phase: name of the phase within the stage.
        steps: optimizer steps.
        images: images gone through, repeats counted.
        model_flops: FLOPs of the mathematics, over all devices (`Flops.model`).
        hardware_flops: FLOPs with recomputation.
        train_s: seconds in training steps and in the loop around them.
        compile_s: seconds tracing and compiling.
        data_s: seconds waiting for input.
        eval_s: seconds evaluating.
        checkpoint_s: seconds saving and restoring.
        cache_s: seconds computing or reading cached activations.
        wall_s: all seconds of the row, other ones included.
        peak_bytes: most memory in use.
        device: kind of device.
        devices: how many.
        energy_kwh: energy.
        energy_source: "rapl", "nvml", "green-algorithms", or several joined by "+".
        trainable_params: parameters that the phase trains.
        total_params: parameters of the model.
        cached: "off", "filled" (this row computed the prefix and stored it) or "reused".
        reused_flops: model FLOPs that another arm had already run for this row.
        reused_s: seconds that another arm had already spent for this row.
        peak_flops: FLOP/s that all devices together could do in the type of the activations; 0 where it is not known.
        curve: by epoch: `{"epoch": int, "loss": float, "val_loss": float, "lr": float}`.
    """

    strategy: str
    seed: int
    stage: str
    phase: str
    steps: int = 0
    images: int = 0
    model_flops: int = 0
    hardware_flops: int = 0
    train_s: float = 0.0
    compile_s: float = 0.0
    data_s: float = 0.0
    eval_s: float = 0.0
    checkpoint_s: float = 0.0
    cache_s: float = 0.0
    wall_s: float = 0.0
    peak_bytes: int = 0
    device: str = ""
    devices: int = 1
    energy_kwh: float = 0.0
    energy_source: str = ""
    trainable_params: int = 0
    total_params: int = 0
    cached: str = "off"
    reused_flops: int = 0
    reused_s: float = 0.0
    peak_flops: float = 0.0
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        """Checks the words.

        Raises:
            UserError: `stage` or `cached` is not one of the words it may be.
        """
        for name, value, valid in (("stage", self.stage, STAGES), ("cached", self.cached, CACHED)):
            if value not in valid:
                raise UserError(f"ledger row: {name} is {value!r}; {nearest(str(value), valid)}")

    @property
    def key(self) -> tuple[str, int, str, str]:
        """What makes the row the only one of its kind in a study."""
        return self.strategy, self.seed, self.stage, self.phase

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Row":
        """Makes a row from a line of a ledger.

        Raises:
            UserError: a key is unknown, or one of strategy, seed, stage, phase is missing.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise UserError(f"ledger row: unknown key {name!r}; {nearest(name, fields)}")
        missing = [name for name in ("strategy", "seed", "stage", "phase") if name not in values]
        if missing:
            raise UserError(f"ledger row: no {' or '.join(missing)}")
        return cls(**values)


class Ledger:
    """Rows in a file, or in memory without one, one per (strategy, seed, stage, phase).

    A row that is put again replaces the old one, and the file changes in one atomic step: a phase that is run again
    after a kill is not counted twice, and a kill while writing loses nothing. With several processes, one writes.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open a ledger; the file need not exist yet.

        Args:
            path: A JSON-lines file; None to keep the rows in memory.
        """
        self.path = None if path is None else Path(path)
        self._rows: list[Row] = []

    def rows(self) -> list[Row]:
        """Returns all rows in the order they were first put.

        Raises:
            UserError: a line is damaged or is no row; names the file and the line.
        """
        if self.path is None:
            return list(self._rows)
        found = []
        for number, values in enumerate(atomic_files.read(self.path), start=1):
            try:
                found.append(Row.from_dict(values))
            except UserError as error:
                raise UserError(f"{self.path}:{number}: {error}") from error
        return found

    def find(self, key: tuple[str, int, str, str]) -> Row | None:
        """Return the row of a key (see `Row.key`), or None."""
        return next((row for row in self.rows() if row.key == key), None)

    def put(self, row: Row) -> None:
        """Adds a row, or replaces the one with its key, in place."""
        rows = {old.key: old for old in self.rows()}
        rows[row.key] = row
        if self.path is None:
            self._rows = list(rows.values())
            return
        atomic_files.write(self.path, (dataclasses.asdict(each) for each in rows.values()))
