"""Phases of training, each with a static set of trainable parameters, and positions of steps."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from dapt_jax.errors import UserError, nearest
from dapt_jax.fields import SettingError, check_fields, setting
from dapt_jax.parameters import BATCH_NORM_MODES, LAYER_NORM_MODES, BatchNormMode, LayerNormMode

SCHEDULES = ("constant", "cosine", "linear", "poly", "step", "plateau")

LEAST_SIDE = 8
"""Least side in pixels of the images that a phase trains on, and a study reads."""

T = TypeVar("T")
ByGroup = tuple[tuple[str, T], ...]
"""Pairs of a pattern and what holds for what it matches; of two that match, the later one holds."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """A span of training with one static set of trainable parameters and one executable.

    >>> Phase(
    ...     "top", 5, ("stage4", "head"), 1e-4, batch_norm="train", lr_multipliers=(("stage4", 0.1),)
    ... ).layer_norm
    'train'

    Attributes:
        name: Name in the ledger; unique within a run.
        epochs: Passes over the corpus.
        trainable: Patterns over parameters (see `dapt_jax.training.patterns`): layer groups, each for all
            below it, globs over paths, ranges (`block9..12/attention/project`), kinds (`*:bias`). A pattern
            that ends with `:lora` trains low-rank updates of the kernels that it matches (arXiv 2106.09685), one
            that ends with `:rows` some rows of the weights of dense layers (arXiv 2503.11335).
        lr: Peak learning rate.
        batch_norm: Batch norm of the groups that train: `frozen` (statistics, scale and bias stay), `affine`
            (statistics stay), `stats` (batch statistics; scale and bias stay) or `train`. Pairs of (group
            pattern, mode) say it for every group instead; groups that no pattern names are frozen.
        layer_norm: Layer norm of the groups that train: `train`, or `frozen` (scale and bias stay). Pairs
            work as above; groups that no pattern names train it.
        schedule: Schedule of the learning rate within the phase; `step` divides it by ten at a half and at
            three quarters.
        warmup: Epochs of linear warm-up from zero.
        augment: Whether images are augmented as the run defines; without augmentation, a frozen prefix sees
            the same input every epoch.
        views: Number of fixed augmented views per image; 0 draws new ones each epoch.
        lr_multipliers: Discriminative learning rates (Howard & Ruder, arXiv 1801.06146): pairs of a layer
            group or glob pattern, as in `trainable`, and the factor of its learning rate to `lr` at every
            step; the last match applies. Decoupled weight decay is scaled by the same factor.
        corpus: Name in `corpora` of its images; empty for those of the strategy. Where it changes between two
            phases of a strategy, the next run starts from the encoder so far with a new head.
        image_size: Side in pixels of the images that it trains on, decoded from their files at this size; 0
            for that of the data set. Small images first and large ones last are progressive resizing (FixRes,
            arXiv 1906.06423). Validation images keep the size of the data set where there are labels; without,
            held-out loss and spectrum are of images of the phase's size.
    """

    name: str
    epochs: int = setting(at_least=1, doc="Passes over the corpus.")
    trainable: tuple[str, ...] = setting(doc="Layer groups or patterns over parameter paths.")
    lr: float = setting(above=0, doc="Peak learning rate.")
    batch_norm: BatchNormMode | ByGroup[BatchNormMode] = setting(
        "frozen",
        doc="Batch norm of the groups that train: frozen, affine, stats or train; or pairs of group and mode.",
    )
    layer_norm: LayerNormMode | ByGroup[LayerNormMode] = setting(
        "train", doc="Layer norm of the groups that train: train or frozen; or pairs of group and mode."
    )
    schedule: str = setting(
        "constant", choices=SCHEDULES, doc="Schedule of the learning rate within the phase."
    )
    warmup: float = setting(0.0, at_least=0, doc="Epochs of linear warm-up from zero.")
    augment: bool = setting(True, doc="Whether images are augmented.")
    views: int = setting(0, at_least=0, doc="Fixed augmented views per image; 0 draws new ones each epoch.")
    lr_multipliers: ByGroup[float] = setting(
        (), doc="Pairs of a pattern and the factor of its learning rate to lr."
    )
    corpus: str = setting("", doc="Name in corpora of its images; empty: those of the strategy.")
    image_size: int = setting(
        0, at_least=0, doc="Side in pixels of the images that it trains on; 0: that of the data set."
    )

    def __post_init__(self) -> None:
        where = f"phase {self.name!r}"
        try:
            check_fields(self)
        except SettingError as error:
            raise UserError(f"{where}: {error}") from None
        if not self.trainable:
            raise UserError(
                f"{where}: trainable is empty; expected one or more layer groups or patterns, such as ('head',)"
            )
        for setting_name, choices in (("batch_norm", BATCH_NORM_MODES), ("layer_norm", LAYER_NORM_MODES)):
            value = getattr(self, setting_name)
            for mode in [value] if isinstance(value, str) else [mode for _, mode in value]:
                if mode not in choices:
                    raise UserError(f"{where}: unknown {setting_name} {mode!r}; {nearest(mode, choices)}")
        if self.image_size and self.image_size < LEAST_SIDE:
            raise UserError(
                f"{where}: image_size is {self.image_size}; expected {LEAST_SIDE} or more, or 0 for the size of "
                "the data set"
            )
        if self.warmup > self.epochs:
            raise UserError(f"{where}: warmup is {self.warmup} epochs; expected 0 to {self.epochs}")
        for pattern, factor in self.lr_multipliers:
            if not 0 < factor < math.inf:
                raise UserError(
                    f"{where}: the lr multiplier of {pattern!r} is {factor!r}; expected a positive number: "
                    "what must not "
                    "move is left out of trainable"
                )


class Position(NamedTuple):
    """Position of a step: `phase` (index), `epoch` (over the whole run) and `batch` (within the epoch)."""

    phase: int
    epoch: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Mapping between steps, epochs and phases of a run, which depends on the settings only."""

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
        """Return the epoch at which a phase begins."""
        return list(itertools.accumulate((p.epochs for p in self.phases), initial=0))[phase]

    def first_step(self, phase: int) -> int:
        """Return the number of steps of the run before a phase."""
        return self.first_epoch(phase) * self.steps_per_epoch

    def position(self, step: int) -> Position:
        """Return the position of the next step after `step` finished steps.

        Raises:
            IndexError: The run has no such step.
        """
        epoch, batch = divmod(step, self.steps_per_epoch)
        for index in range(len(self.phases)):
            if epoch < self.first_epoch(index + 1):
                return Position(index, epoch, batch)
        raise IndexError(f"step {step} of a run of {self.steps}")

    def phase_of_state(self, step: int) -> int:
        """Return the phase that determines the state layout after `step` steps: that of the last step."""
        return self.position(max(step - 1, 0)).phase


def check_names(phases: Sequence[Phase]) -> None:
    """Refuse two phases with one name, since ledger and checkpoints identify phases by name."""
    names = [phase.name for phase in phases]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{names.count(name)} phases are named {name!r}; expected each name once")
