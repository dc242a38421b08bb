"""The ledger: what every phase of every arm of a study has cost, one JSON line each."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapt_jax.errors import UserError, nearest
from dapt_jax.records import typed
from dapt_jax.records.vocabulary import CACHED, STAGES
from dapt_jax.runtime import atomic_files

_KINDS: dict[Any, typed.Kind] = {str: typed.TEXT, int: typed.COUNT, float: typed.NUMBER}
_CURVE = {
    "epoch": typed.COUNT,
    "loss": typed.MEASURED.or_null,
    "val_loss": typed.MEASURED.or_null,
    "lr": typed.MEASURED.or_null,
    "share": typed.NUMBER,
    "scores": typed.OBJECT,
    "higher_is_better": typed.OBJECT,
    "chosen": typed.TRUTH,
}


@dataclasses.dataclass
class Row:
    """The cost of one phase of one arm.

    An arm whose frozen prefix another arm of the study had already computed did not pay for it.
    `model_flops`, `hardware_flops` and the seconds hold what was run for this row; `reused_flops` and
    `reused_s` hold what this row would have run besides, had it been alone. So a study's total cost is the
    sum of the former, and the *standalone* cost of an arm, by which strategies are compared, is the sum of
    both.

    Attributes:
        strategy: Name of the strategy.
        seed: Seed of the arm.
        stage: Stage of the study: "dapt", "transfer" or "score".
        phase: Name of the phase within the stage.
        steps: Optimizer steps.
        images: Images gone through, repeats counted.
        model_flops: FLOPs of the mathematics, over all devices (`Flops.model`).
        hardware_flops: FLOPs with recomputation.
        train_s: Seconds in training steps and in the loop around them.
        compile_s: Seconds tracing and compiling.
        data_s: Seconds waiting for input.
        eval_s: Seconds evaluating.
        checkpoint_s: Seconds saving and restoring.
        cache_s: Seconds computing or reading cached activations.
        wall_s: All seconds of the row, other ones included.
        peak_bytes: Largest amount of memory in use.
        device: Kind of device.
        devices: Number of devices.
        energy_kwh: Energy in kWh.
        energy_source: Where the energy comes from: "rapl", "nvml", "green-algorithms", or several joined by
            "+".
        trainable_params: Parameters that the phase trains.
        total_params: Parameters of the model.
        cached: What became of cached activations: "off", "filled" (this row computed the prefix and stored
            it) or "reused".
        reused_flops: Model FLOPs that another arm had already run for this row.
        reused_s: Seconds that another arm had already spent for this row.
        peak_flops: FLOP/s that all devices together could do in the type of the activations; 0 where it is
            not known.
        curve: Values by epoch: `{"epoch": int, "loss": float, "val_loss": float, "lr": float}`; of the stage
            "score" `{"epoch": int, "share": float, "scores": {...}, "higher_is_better": {...}}`, both by name
            of a score.
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
        """Check the words.

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
        """Make a row from a line of a ledger.

        Raises:
            UserError: A key is unknown or missing, or a value is not of its type.
        """
        kinds = {
            field.name: _KINDS.get(field.type, typed.list_of(typed.OBJECT))
            for field in dataclasses.fields(cls)
        }
        for name in values:
            if name not in kinds:
                raise UserError(f"ledger row: unknown key {name!r}; {nearest(name, kinds)}")
        missing = [name for name in ("strategy", "seed", "stage", "phase") if name not in values]
        if missing:
            raise UserError(f"ledger row: no {' or '.join(missing)}")
        typed.check("ledger row", values, kinds)
        for number, point in enumerate(values.get("curve", ())):
            where = f"ledger row: curve[{number}]"
            typed.check(where, point, _CURVE, required=("epoch",) if "scores" in point else ())
            for key, kind in (("scores", typed.NUMBER.or_null), ("higher_is_better", typed.TRUTH)):
                found = point.get(key, {})
                typed.check(f"{where}.{key}", found, dict.fromkeys(found, kind))
        return cls(**values)


class Ledger:
    """Rows in a file, or in memory without one, one per (strategy, seed, stage, phase).

    A row that is put again replaces the old one, and the file changes in one atomic step: a phase that is run
    again after a kill is not counted twice, and a kill while writing loses nothing. With several processes,
    one writes.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open a ledger; the file need not exist yet.

        Args:
            path: A JSON-lines file; None to keep the rows in memory.
        """
        self.path = None if path is None else Path(path)
        self._rows: list[Row] = []

    def rows(self) -> list[Row]:
        """Return all rows in the order they were first put.

        Raises:
            UserError: A line is damaged or is no row; names the file and the line.
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
        """Add a row, or replaces the one with its key, in place."""
        rows = {old.key: old for old in self.rows()}
        rows[row.key] = row
        if self.path is None:
            self._rows = list(rows.values())
            return
        atomic_files.write(self.path, (dataclasses.asdict(each) for each in rows.values()))
