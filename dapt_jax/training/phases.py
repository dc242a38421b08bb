"""Phases: spans of training with one static mask, and where in them a step lies."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from dapt_jax.errors import UserError, nearest

Norm = Literal["frozen", "stats", "train"]
NORMS = ("frozen", "stats", "train")
SCHEDULES = ("constant", "cosine", "linear", "poly", "step", "plateau")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A span of training with one static mask and one executable.

    Attributes:
        name: shown in the ledger; unique within a run.
        epochs: passes over the corpus.
        trainable: layer groups or glob patterns over parameter paths; a group's name stands for all below it.
        lr: peak learning rate.
        norm: batch norm of the groups that train something: `frozen` (statistics and affine stay), `stats` (batch
            statistics, affine stays) or `train`. Pairs of (group pattern, mode) instead say it for every group.
        schedule: of the learning rate within the phase; `step` divides it by ten at a half and at three quarters.
        warmup: epochs of linear warm-up from zero.
        augment: whether images are augmented as the run says; without, a frozen prefix sees the same input every epoch.
        views: number of fixed augmented views per image; 0 draws new ones each epoch.
        rates: discriminative learning rates (Howard & Ruder, arXiv 1801.06146): pairs of a layer group or glob pattern, as in
            `trainable`, and the factor by which its rate differs from `lr` at every step; of two that speak of a parameter the
            later one holds. Decoupled weight decay is scaled along.
    """

    name: str
    epochs: int
    trainable: tuple[str, ...]
    lr: float
    norm: Norm | tuple[tuple[str, Norm], ...] = "frozen"
    schedule: str = "constant"
    warmup: float = 0.0
    augment: bool = True
    views: int = 0
    rates: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        where = f"phase {self.name!r}"
        if self.epochs < 1:
            raise UserError(f"{where}: epochs is {self.epochs}; expected 1 or more")
        if not self.lr > 0:
            raise UserError(f"{where}: lr is {self.lr}; expected a positive number")
        if self.schedule not in SCHEDULES:
            raise UserError(f"{where}: unknown schedule {self.schedule!r}; {nearest(self.schedule, SCHEDULES)}")
        for mode in [self.norm] if isinstance(self.norm, str) else [mode for _, mode in self.norm]:
            if mode not in NORMS:
                raise UserError(f"{where}: unknown norm {mode!r}; {nearest(mode, NORMS)}")
        if not 0 <= self.warmup <= self.epochs:
            raise UserError(f"{where}: warmup is {self.warmup} epochs; expected 0 to {self.epochs}")
        if self.views < 0:
            raise UserError(f"{where}: views is {self.views}; expected 0 (new ones each epoch) or more")
        for pattern, factor in self.rates:
            if not 0 < factor < math.inf:
                raise UserError(
                    f"{where}: the rate factor of {pattern!r} is {factor!r}; expected a positive number: what must not move "
                    "is left out of trainable"
                )


class Position(NamedTuple):
    """Where a step lies: `phase` (index), `epoch` (over the whole run) and `batch` (within the epoch)."""

    phase: int
    epoch: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The phases of a run laid along its steps: a pure function of the config, known before a checkpoint is opened."""

    phases: tuple[Phase, ...]
    steps_per_epoch: int

    @property
    def epochs(self) -> int:
        """Epochs of the whole run."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def first_epoch(self, phase: int) -> int:
        """The epoch at which a phase begins."""
        return list(itertools.accumulate((p.epochs for p in self.phases), initial=0))[phase]

    def first_step(self, phase: int) -> int:
        """Steps of the run before a phase."""
        return self.first_epoch(phase) * self.steps_per_epoch

    def position(self, step: int) -> Position:
        """Where the step that is run next lies, after `step` steps are done.

        Raises:
            IndexError: the run has no such step.
        """
        epoch, batch = divmod(step, self.steps_per_epoch)
        for index in range(len(self.phases)):
            if epoch < self.first_epoch(index + 1):
                return Position(index, epoch, batch)
        raise IndexError(f"step {step} of a run of {self.steps}")

    def phase_of_state(self, step: int) -> int:
        """The phase whose layout a state has after `step` steps: that of the last step run, so a switch comes after."""
        return self.position(max(step - 1, 0)).phase


def check_names(phases: Sequence[Phase]) -> None:
    """Refuses two phases of one name: the ledger and the checkpoints speak of phases by name."""
    names = [phase.name for phase in phases]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{names.count(name)} phases are named {name!r}; expected each name once")
