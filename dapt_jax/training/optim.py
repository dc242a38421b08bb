"""Optimizers by `optax.multi_transform`: no state for frozen leaves, none lost at a phase switch.

Each layer group has a transformation and a step count of its own, so that Adam's bias correction is right both
for groups that start afresh and for groups that carry their moments over a switch. It is named after the group
and not after the phases behind it: a phase that trains everything is then one program, whether all of it starts
afresh (full DAPT) or some goes on (hybrid, gradual DAPT).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import optax
from jaxtyping import PyTree

from dapt_jax.fields import check_fields, setting
from dapt_jax.parameters import Kind
from dapt_jax.training import freezing
from dapt_jax.training.freezing import FROZEN, TrainableSpec, Tree, path_name
from dapt_jax.training.phases import Phase

OPTIMIZERS = ("adam", "adamw", "sgd")
_DECAYED = "_decayed"


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Update rule of the trained leaves.

    >>> Optimizer(name="adamw", weight_decay=0.05).clip
    0.0

    Attributes:
        name: `adam`, `adamw` (Loshchilov & Hutter, arXiv 1711.05101) or `sgd`.
        weight_decay: Weight decay, decoupled for `adamw`, added to the gradient for `adam` and `sgd`. It
            applies to kernels; to biases and scales of norms, and to changes of kernels (low-rank updates,
            rows), which it pulls towards the source weights, only with `decay_all`.
        decay_all: Whether weight decay applies to all trained leaves, as where an optimizer takes no groups.
        b1: Decay of the first moment, or momentum of `sgd`.
        b2: Decay of the second moment.
        eps: Summand of Adam's denominator.
        nesterov: Whether `sgd` takes Nesterov's momentum.
        clip: Global norm to which the gradient of the trained leaves is clipped; 0 for no clipping. Frozen
            leaves do not count: their gradient would require the whole backward pass.
        ema: Decay of an exponential moving average of the trained leaves; 0 for no average.
        carry_state: Whether leaves that go on training at a switch of phases keep their moments and step
            counts; else every phase starts with a new optimizer, as where a framework compiles the model anew.
    """

    name: str = setting("adam", choices=OPTIMIZERS, doc="Update rule.")
    weight_decay: float = setting(
        0.0, at_least=0, doc="Weight decay of kernels: decoupled for adamw, else L2."
    )
    decay_all: bool = setting(False, doc="Decay biases and scales of norms as well as kernels.")
    b1: float = setting(0.9, at_least=0, below=1, doc="Decay of the first moment, or momentum of sgd.")
    b2: float = setting(0.999, at_least=0, below=1, doc="Decay of the second moment.")
    eps: float = setting(1e-7, above=0, doc="Summand of Adam's denominator.")
    nesterov: bool = setting(False, doc="Whether sgd takes Nesterov's momentum.")
    clip: float = setting(0.0, at_least=0, doc="Global norm that the gradient is clipped to; 0: not clipped.")
    ema: float = setting(0.0, at_least=0, below=1, doc="Decay of averaged weights; 0: none are kept.")
    carry_state: bool = setting(
        True, doc="Whether moments go on at a switch of phases; false: every phase has a new optimizer."
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def decays(self, kind: Kind) -> bool:
        """Return whether weight decay applies to parameters of a kind."""
        return bool(self.weight_decay) and (self.decay_all or kind.is_kernel)

    def direction(self, decayed: bool) -> optax.GradientTransformation:
        """Return the update before scaling by minus the learning rate."""
        decay = optax.add_decayed_weights(self.weight_decay if decayed else 0.0)
        if self.name == "sgd":
            return optax.chain(decay, optax.trace(self.b1, self.nesterov) if self.b1 else optax.identity())
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return optax.chain(adam, decay) if self.name == "adamw" else optax.chain(decay, adam)


def labels(
    paths: Sequence[str],
    kinds: Mapping[str, Kind],
    groups: Sequence[str],
    masks: Sequence[TrainableSpec],
    optimizer: Optimizer,
) -> tuple[tuple[str, ...], ...]:
    """Return the label of each parameter's transformation in every phase: its layer group's, or that of frozen leaves.

    A group has several transformations where its leaves differ in weight decay, or in the phases that train them:
    their step counts differ then. A leaf has one label in all phases that train it.

    Args:
        paths: Paths of all parameters, in tree order.
        kinds: Kind of every parameter by path.
        groups: Layer groups of the network.
        masks: What every phase of the run trains.
        optimizer: How they are updated.
    """
    found: dict[str, str] = {}
    spans: dict[tuple[str, str], list[tuple[bool, ...]]] = {}
    for path in paths:
        span = tuple(path in mask.trainable for mask in masks)
        if any(span):
            group = freezing.group_of(path, groups).replace("/", ".")  # a file's name in some checkpoints
            suffix = _DECAYED if optimizer.decays(kinds[path]) else ""
            of_group = spans.setdefault((group, suffix), [])
            if span not in of_group:
                of_group.append(span)
            number = of_group.index(span)
            found[path] = f"{group}_{number}{suffix}" if number else f"{group}{suffix}"
    return tuple(tuple(found[path] if path in mask.trainable else FROZEN for path in paths) for mask in masks)


def transformation(optimizer: Optimizer, params: Tree, labels: Sequence[str]) -> optax.GradientTransformation:
    """Return the `optax.multi_transform` of one phase, over the whole parameter tree.

    Args:
        optimizer: How trained leaves are updated.
        params: The parameters, or their shapes.
        labels: Labels of its leaves, in tree order.

    Returns:
        A transformation whose `update` takes gradients and parameters with None in place of frozen leaves.
    """
    transforms = {
        name: optax.set_to_zero() if name == FROZEN else optimizer.direction(name.endswith(_DECAYED))
        for name in sorted({FROZEN, *labels})
    }
    return optax.multi_transform(transforms, jax.tree.unflatten(jax.tree.structure(params), labels))


def scaled(directions: Tree, lr: jax.Array | float, mask: TrainableSpec) -> Tree:
    """Scale directions by minus the learning rate, and by a parameter's multiplier where it has one."""
    factors = dict(mask.lr_multipliers)

    def update(path: Sequence[jax.tree_util.DictKey], direction: jax.Array) -> jax.Array:
        factor = factors.get(path_name(path))
        return -(lr if factor is None else lr * factor) * direction

    return jax.tree.map_with_path(update, directions)


def carry(old: PyTree[jax.Array], new: PyTree[jax.Array]) -> PyTree[jax.Array]:
    """Return the state `new` with leaves shared with `old` copied: what goes on training keeps moments and counts."""
    known = dict(jax.tree.leaves_with_path(old))
    return jax.tree.map_with_path(lambda path, leaf: known.get(path, leaf), new)


def learning_rate(phase: Phase, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate at a step of a phase (0 is its first), before the factor of a plateau."""
    total = phase.epochs * steps_per_epoch
    warm = round(phase.warmup * steps_per_epoch)
    if step < warm:
        return phase.lr * (step + 1) / warm
    done = (step - warm) / max(total - warm, 1)
    if phase.schedule == "linear":
        return phase.lr * (1 - done)
    if phase.schedule == "poly":
        return phase.lr * (1 - done) ** 0.9
    if phase.schedule == "step":
        return phase.lr * 0.1 ** ((done >= 0.5) + (done >= 0.75))
    if phase.schedule == "cosine":
        return phase.lr * 0.5 * (1 + math.cos(math.pi * done))
    return phase.lr


class PlateauState(NamedTuple):
    """State of a plateau schedule between epochs.

    Attributes:
        scale: Factor of the learning rate so far.
        best: Lowest loss so far.
        waited: Epochs since then.
    """

    scale: float = 1.0
    best: float = math.inf
    waited: int = 0


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Lowers the learning rate when a loss stops falling, as `ReduceLROnPlateau` is commonly defined.

    >>> plateau, state = Plateau(factor=0.1, patience=0), PlateauState()
    >>> for loss in (1.0, 0.5, 0.5):
    ...     state = plateau.update(state, loss)
    >>> state
    PlateauState(scale=0.1, best=0.5, waited=0)

    Attributes:
        factor: Factor that the learning rate is multiplied by, below 1.
        patience: Epochs without improvement before the reduction.
        threshold: Relative improvement that counts.
    """

    factor: float = setting(0.5, above=0, below=1, doc="Factor that the learning rate is multiplied by.")
    patience: int = setting(5, at_least=0, doc="Epochs without improvement before that.")
    threshold: float = 1e-4

    def __post_init__(self) -> None:
        check_fields(self)

    def update(self, state: PlateauState, loss: float) -> PlateauState:
        """Return the state after an epoch with this loss."""
        if loss < state.best * (1.0 - self.threshold):
            return PlateauState(state.scale, loss, 0)
        if state.waited + 1 > self.patience:
            return PlateauState(state.scale * self.factor, state.best, 0)
        return state._replace(waited=state.waited + 1)
