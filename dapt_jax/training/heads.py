"""Heads on frozen features: the folds of a task train side by side, all epochs in one compiled program."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Shaped

from dapt_jax.cost import flops
from dapt_jax.data.pipeline import Order
from dapt_jax.models.encoder import draw
from dapt_jax.objectives import Objective

HIDDEN: dict[str, tuple[int, ...]] = {"linear": (), "mlp_small": (64, 32), "mlp_large": (512, 256, 256, 128)}
"""Hidden layers by protocol; the two perceptrons are Model 1 and Model 2 of arXiv 2204.13280."""


CONSTANT = 1e-6
"""Standard deviation up to which a feature counts as constant."""


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """How heads are trained: Adam with decoupled weight decay and a constant rate.

    Attributes:
        hidden: sizes of the hidden layers (ReLU).
        objective: the loss.
        epochs: over the fold's training rows.
        lr: learning rate.
        batch_size: rows per step.
        weight_decay: of kernels.
        standardise: scale features to mean 0 and variance 1 by the fold's training rows.
    """

    hidden: tuple[int, ...]
    objective: Objective
    epochs: int
    lr: float
    batch_size: int
    weight_decay: float
    standardise: bool

    @property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer."""

        def kernels(params: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

        return optax.adamw(self.lr, weight_decay=self.weight_decay, mask=kernels)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Trained heads, one per fold.

    Attributes:
        settings: how they were trained.
        params: parameters, each leaf with a leading fold axis.
        shift: [folds, d], taken off features.
        factor: [folds, d], what they are then multiplied by.
        flops: model FLOPs that training took.
        steps: of all folds.
        images: rows gone through in all folds, repeats counted.
    """

    settings: HeadSettings
    params: Any
    shift: Any
    factor: Any
    flops: int
    steps: int
    images: int

    def probabilities(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "folds n classes"]:
        """Probability of each class by each fold's head."""
        logits = _predict(self.params, self.shift, self.factor, features)
        return np.asarray(jax.vmap(self.settings.objective.probabilities)(logits))


def parameter_shapes(inputs: int, hidden: tuple[int, ...], outputs: int) -> Any:
    """Shapes of a head's parameters."""
    sizes = (inputs, *hidden, outputs)
    return {
        f"layer{number}": {
            "kernel": jax.ShapeDtypeStruct((a, b), jnp.float32),
            "bias": jax.ShapeDtypeStruct((b,), jnp.float32),
        }
        for number, (a, b) in enumerate(itertools.pairwise(sizes))
    }


def train(
    features: Float[np.ndarray, "n d"],
    labels: Shaped[np.ndarray, "n ..."],
    folds: Sequence[np.ndarray],
    settings: HeadSettings,
    seed: int,
) -> Heads:
    """Trains one head per fold.

    Args:
        features: of all rows.
        labels: int32 class numbers [n] or float32 0/1 [n, classes].
        folds: training rows of each fold.
        settings: how.
        seed: of initial weights and of the order of rows.
    """
    number, size = len(folds), settings.batch_size
    orders = [Order(tuple(int(row) for row in rows), size, seed * len(folds) + k) for k, rows in enumerate(folds)]
    steps = max(order.steps_per_epoch for order in orders)
    index = np.zeros((settings.epochs, steps, number, size), np.int32)
    weight = np.zeros(index.shape, np.float32)
    for fold, order in enumerate(orders):
        for epoch in range(settings.epochs):
            rows, weights = order.epoch(epoch)
            index[epoch, : len(rows), fold], weight[epoch, : len(rows), fold] = rows, weights
    shift = np.zeros((number, features.shape[1]), np.float32)
    factor = np.ones_like(shift)
    if settings.standardise:
        for fold, rows in enumerate(folds):
            shift[fold] = features[rows].mean(0)
            spread = features[rows].std(0)
            # What is constant over the training rows tells a head nothing; scaled up, it would drown a new image.
            factor[fold] = np.divide(1, spread, out=np.zeros_like(spread), where=spread > CONSTANT)
    one = draw(parameter_shapes(features.shape[1], settings.hidden, settings.objective.outputs), seed)
    if not settings.hidden:
        # Directions that no training row has keep their initial weights, which would be noise to a new image.
        one = jax.tree.map(np.zeros_like, one)
    params = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (number, *leaf.shape)), one)
    flat = (index.reshape(-1, number, size), weight.reshape(-1, number, size))
    trained = _train(settings, params, features, labels, shift, factor, *flat)
    images = int(weight.sum())
    per_image = flops_per_image(features.shape[1], settings.hidden, settings.objective)
    return Heads(settings, trained, shift, factor, images * per_image, len(flat[0]) * number, images)


def _forward(params: Any, x: Float[Array, "b d"]) -> Float[Array, "b outputs"]:
    for number in range(len(params)):
        layer = params[f"layer{number}"]
        x = (jax.nn.relu(x) if number else x) @ layer["kernel"] + layer["bias"]
    return x


@jax.jit
def _predict(params: Any, shift: Any, factor: Any, features: Any) -> Float[Array, "folds n outputs"]:
    return jax.vmap(lambda p, s, f: _forward(p, (features - s) * f))(params, shift, factor)


@functools.partial(jax.jit, static_argnums=0)
def _train(
    settings: HeadSettings, params: Any, features: Any, labels: Any, shift: Any, factor: Any, index: Any, weight: Any
) -> Any:
    tx = settings.tx

    def one_fold(params: Any, opt: Any, shift: Any, factor: Any, rows: Any, weights: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> Array:
            each = settings.objective(_forward(params, (features[rows] - shift) * factor), labels[rows])
            return jnp.sum(each * weights) / jnp.maximum(weights.sum(), 1.0)

        updates, new_opt = tx.update(jax.grad(loss)(params), opt, params)
        # A fold with fewer batches than the others sits the rest of their epoch out.
        is_idle = weights.sum() == 0
        new = (optax.apply_updates(params, updates), new_opt)
        return jax.tree.map(lambda before, after: jnp.where(is_idle, before, after), (params, opt), new)

    def step(carry: Any, batch: Any) -> tuple[Any, None]:
        (params, opt), (rows, weights) = carry, batch
        return jax.vmap(one_fold)(params, opt, shift, factor, rows, weights), None

    return jax.lax.scan(step, (params, jax.vmap(tx.init)(params)), (index, weight))[0][0]


@functools.cache
def flops_per_image(inputs: int, hidden: tuple[int, ...], objective: Objective) -> int:
    """Model FLOPs of one row in one step of a head."""
    shapes = parameter_shapes(inputs, hidden, objective.outputs)
    labels = (
        jax.ShapeDtypeStruct((1, objective.outputs), jnp.float32)
        if objective.multi_label
        else jax.ShapeDtypeStruct((1,), jnp.int32)
    )

    def gradient(params: Any, x: Any, labels: Any) -> Any:
        return jax.grad(lambda params: objective(_forward(params, x), labels).sum())(params)

    return flops.count(gradient, shapes, jax.ShapeDtypeStruct((1, inputs), jnp.float32), labels).model
