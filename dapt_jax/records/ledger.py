"""The cost ledger: one JSON line for every phase of every arm of a study."""

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
    "reads_labels": typed.OBJECT,
    "chosen": typed.TRUTH,
}


@dataclasses.dataclass
class Row:
    """The cost of one phase of one arm.

    An arm does not pay for a frozen prefix that another arm of the study has already computed.
    `model_flops`, `hardware_flops` and the seconds hold the work done for this row; `reused_flops` and
    `reused_s` hold the additional work that this row would have needed alone. The total cost of a study is
    the sum of the former; the *standalone* cost of an arm, used to compare strategies, is the sum of both.

    Attributes:
        strategy: Name of the strategy.
        seed: Seed of the arm.
        stage: Stage of the study: "dapt", "transfer" or "score".
        phase: Name of the phase within the stage.
        steps: Optimizer steps.
        images: Images processed, including repeats.
        model_flops: Model FLOPs over all devices (`Flops.model`).
        hardware_flops: Hardware FLOPs over all devices, including recomputation.
        head_flops: Of `model_flops`, those of a label-free objective's head and loss, which are thrown away.
        target_flops: Of `model_flops`, those of a frozen teacher's outputs.
        train_s: Seconds in training steps and in the loop around them.
        compile_s: Seconds tracing and compiling.
        data_s: Seconds waiting for input.
        eval_s: Seconds evaluating.
        checkpoint_s: Seconds saving and restoring.
        cache_s: Seconds computing or reading cached activations.
        wall_s: Total wall time in seconds, including uncategorised time.
        peak_bytes: Largest amount of memory in use.
        device: Kind of device.
        devices: Number of devices.
        energy_kwh: Energy in kWh.
        energy_source: Source of the energy figure: "rapl", "nvml", "green-algorithms", or several joined by
            "+".
        trainable_params: Parameters that the phase trains.
        total_params: Parameters of the model.
        cached: Use of cached activations: "off", "filled" (this row computed the prefix and stored
            it) or "reused".
        reused_flops: Model FLOPs that another arm had already run for this row.
        reused_s: Seconds that another arm had already spent for this row.
        peak_flops: Peak FLOP/s of all devices together in the dtype of the activations; 0 where unknown.
        approximations: What made the phase cheaper at the price of other numbers, such as smaller images; empty
            for nothing.
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
    head_flops: int = 0
    target_flops: int = 0
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
    approximations: str = ""
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        """Validate `stage` and `cached`.

        Raises:
            UserError: `stage` or `cached` has an invalid value.
        """
        for name, value, valid in (("stage", self.stage, STAGES), ("cached", self.cached, CACHED)):
            if value not in valid:
                raise UserError(f"ledger row: {name} is {value!r}; {nearest(str(value), valid)}")

    @property
    def key(self) -> tuple[str, int, str, str]:
        """Unique key of the row within a study."""
        return self.strategy, self.seed, self.stage, self.phase

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Row":
        """Create a row from a line of a ledger.

        Raises:
            UserError: A key is unknown or missing, or a value has the wrong type.
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

    Adding a row with an existing key replaces the old row, and the file is replaced atomically: a phase that
    is repeated after a kill is not counted twice, and a kill during a write loses nothing. With several
    processes, only one writes.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open a ledger; the file need not exist yet.

        Args:
            path: A JSON-lines file; None to keep the rows in memory.
        """
        self.path = None if path is None else Path(path)
        self._rows: list[Row] = []

    def rows(self) -> list[Row]:
        """Return all rows in the order in which they were first added.

        Raises:
            UserError: A line is damaged or not a valid row; names the file and the line.
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
        """Add a row, or replace the row with the same key in place."""
        rows = {old.key: old for old in self.rows()}
        rows[row.key] = row
        if self.path is None:
            self._rows = list(rows.values())
            return
        atomic_files.write(self.path, (dataclasses.asdict(each) for each in rows.values()))
