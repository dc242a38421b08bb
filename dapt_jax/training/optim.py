"""Optimizers whose state is laid out by `optax.multi_transform`: frozen leaves carry none, and a switch loses none.

Leaves are labelled by *cohort*: the phase in which their present span of training began. Each cohort has a
transformation of its own and so its own step count, which makes Adam's bias correction right for leaves that start
fresh beside leaves that carry their moments over a switch.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax

from dapt_jax.fields import check_fields, setting
from dapt_jax.training.freezing import FROZEN, TrainableSpec, Tree, path_name
from dapt_jax.training.phases import Phase

OPTIMIZERS = ("adam", "adamw", "sgd")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How the trained leaves are updated.

    Attributes:
        name: `adam`, `adamw` (Loshchilov & Hutter, arXiv 1711.05101) or `sgd`.
        weight_decay: decoupled for `adamw`; added to the gradient for `adam` and `sgd`. Kernels only: biases, and the
            parameters of norms, are never decayed.
        b1: first-moment decay, or the momentum of `sgd`.
        b2: second-moment decay.
        eps: of Adam's denominator.
        nesterov: for `sgd`.
        clip: global norm of the trained leaves' gradient; 0 for none. Frozen leaves are not part of it: reading their
            gradient would bring the whole backward pass back.
        ema: decay of an exponential moving average of the trained leaves; 0 for none.
    """

    name: str = setting("adam", choices=OPTIMIZERS, doc="Update rule.")
    weight_decay: float = setting(0.0, at_least=0, doc="Weight decay of kernels: decoupled for adamw, else L2.")
    b1: float = setting(0.9, at_least=0, below=1, doc="Decay of the first moment; momentum of sgd.")
    b2: float = setting(0.999, at_least=0, below=1, doc="Decay of the second moment.")
    eps: float = setting(1e-7, above=0, doc="Added to Adam's denominator.")
    nesterov: bool = setting(False, doc="Nesterov momentum, for sgd.")
    clip: float = setting(0.0, at_least=0, doc="Global norm to which gradients are clipped; 0: not clipped.")
    ema: float = setting(0.0, at_least=0, below=1, doc="Decay of the moving average of weights; 0: none.")

    def __post_init__(self) -> None:
        check_fields(self)

    def direction(self, decayed: bool) -> optax.GradientTransformation:
        """The update before it is scaled by minus the learning rate."""
        decay = optax.add_decayed_weights(self.weight_decay if decayed else 0.0)
        if self.name == "sgd":
            return optax.chain(decay, optax.trace(self.b1, self.nesterov) if self.b1 else optax.identity())
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return optax.chain(adam, decay) if self.name == "adamw" else optax.chain(decay, adam)


def cohort(path: str, masks: Sequence[TrainableSpec], phase: int) -> int | None:
    """The phase in which a leaf's present span of training began; None for a leaf frozen in `phase`."""
    if path not in masks[phase].trainable:
        return None
    while phase and path in masks[phase - 1].trainable:
        phase -= 1
    return phase


def labels(paths: Sequence[str], masks: Sequence[TrainableSpec], phase: int) -> tuple[str, ...]:
    """Which transformation updates each parameter in a phase: its cohort's, with or without decay, or none.

    Args:
        paths: of all parameters.
        masks: of every phase of the run.
        phase: index of the phase.
    """

    def label(path: str) -> str:
        start = cohort(path, masks, phase)
        if start is None:
            return FROZEN
        return f"phase{start}_{'decayed' if path.endswith('/kernel') else 'plain'}"

    return tuple(label(path) for path in paths)


def transformation(optimizer: Optimizer, params: Tree, labels: Sequence[str]) -> optax.GradientTransformation:
    """The `optax.multi_transform` of one phase, over the whole parameter tree.

    Args:
        optimizer: what to do with trained leaves.
        params: the parameters, or their shapes.
        labels: of its leaves, in tree order.

    Returns:
        A transformation whose `update` takes gradients and parameters with None in place of frozen leaves.
    """
    transforms = {
        name: optax.set_to_zero() if name == FROZEN else optimizer.direction(name.endswith("_decayed"))
        for name in sorted({FROZEN, *labels})
    }
    return optax.multi_transform(transforms, jax.tree.unflatten(jax.tree.structure(params), labels))


def scaled(directions: Tree, rate: Any, mask: TrainableSpec) -> Tree:
    """Directions to updates: minus the rate of the step times each, and times its own factor where the mask has one."""
    factors = dict(mask.rates)

    def update(path: Any, direction: Any) -> Any:
        factor = factors.get(path_name(path))
        return -(rate if factor is None else rate * factor) * direction

    return jax.tree.map_with_path(update, directions)


def carry(old: Any, new: Any) -> Any:
    """The state `new` with every leaf that `old` holds at the same place: cohorts that go on keep their moments."""
    known = dict(jax.tree.leaves_with_path(old))
    return jax.tree.map_with_path(lambda path, leaf: known.get(path, leaf), new)


def learning_rate(phase: Phase, step: int, steps_per_epoch: int) -> float:
    """The rate at a step of a phase (0 is its first), before what a plateau has taken off."""
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


@dataclasses.dataclass
class Plateau:
    """Lowers the rate when a loss stops falling, as `ReduceLROnPlateau` is commonly defined.

    Attributes:
        factor: what the rate is multiplied by.
        patience: epochs without improvement that are let pass.
        threshold: relative improvement that counts.
        scale: what the rate has been multiplied by so far.
        best: lowest loss so far.
        waited: epochs since it.
    """

    factor: float = setting(0.5, above=0, doc="Factor on the learning rate where the loss stops falling.")
    patience: int = setting(5, at_least=0, doc="Epochs without improvement before that.")
    threshold: float = 1e-4
    scale: float = 1.0
    best: float = float("inf")
    waited: int = 0

    def update(self, loss: float) -> None:
        """Takes in the loss of an epoch."""
        if loss < self.best * (1.0 - self.threshold):
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.scale, self.waited = self.scale * self.factor, 0
