"""Heads on frozen features: every seed, fold, rate and decay of a task trains side by side, all epochs in one program."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from dapt_jax.cost import flops
from dapt_jax.data.pipeline import Order
from dapt_jax.losses import ClassificationLoss
from dapt_jax.models.initial import init_params
from dapt_jax.parameters import Kind

HIDDEN: dict[str, tuple[int, ...]] = {"linear": (), "mlp_small": (64, 32), "mlp_large": (512, 256, 256, 128)}
"""Hidden layers by protocol; the two perceptrons are Model 1 and Model 2 of arXiv 2204.13280."""

CONSTANT = 1e-6
"""Standard deviation up to which a feature counts as constant."""


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """How heads are trained: Adam with decoupled weight decay of kernels and a constant rate.

    Attributes:
        hidden: sizes of the hidden layers (ReLU).
        objective: the loss.
        epochs: over a split's training rows.
        batch_size: rows per step.
        standardise: scale features to mean 0 and variance 1 by the split's training rows.
    """

    hidden: tuple[int, ...]
    objective: ClassificationLoss
    epochs: int
    batch_size: int
    standardise: bool


@dataclasses.dataclass(frozen=True)
class Split:
    """The training rows of one fold with one seed.

    Attributes:
        rows: row numbers.
        seed: of initial weights.
        order: seed of the order in which the rows are seen.
    """

    rows: np.ndarray
    seed: int
    order: int


def of_folds(folds: Sequence[np.ndarray], seed: int) -> list[Split]:
    """The folds of one seed: the same initial weights, each fold in an order of its own."""
    return [Split(rows, seed, seed * len(folds) + number) for number, rows in enumerate(folds)]


@dataclasses.dataclass(frozen=True)
class HyperParams:
    """One setting of a grid.

    Attributes:
        lr: learning rate.
        weight_decay: of kernels, decoupled.
    """

    lr: float
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class Heads:
    """Trained heads, one per split and point.

    Attributes:
        settings: how they were trained.
        params: parameters, each leaf with leading axes of splits and points; kernels are (outputs, inputs).
        shift: [splits, d], taken off features.
        factor: [splits, d], what they are then multiplied by.
        flops: model FLOPs that training took.
        steps: of all heads.
        images: rows gone through by all heads, repeats counted.
    """

    settings: HeadSettings
    params: Any
    shift: Any
    factor: Any
    flops: int
    steps: int
    images: int

    def probabilities(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "splits points n classes"]:
        """Probability of each class by each head."""
        logits = _predict(self.params, self.shift, self.factor, features)
        return np.asarray(jax.vmap(jax.vmap(self.settings.objective.probabilities))(logits))

    def losses(
        self, features: Float[np.ndarray, "n d"], labels: Shaped[np.ndarray, "n ..."], rows: Sequence[np.ndarray]
    ) -> Float[np.ndarray, "splits points"]:
        """Mean loss of each head on some rows for each split."""
        logits = _predict(self.params, self.shift, self.factor, features)
        objective = self.settings.objective
        found = [
            [objective(each[part], jnp.asarray(labels[part])).mean() for each in of_split]
            for of_split, part in zip(logits, rows, strict=True)
        ]
        return np.asarray(found)


_KINDS = {"kernel": Kind.DENSE_KERNEL, "bias": Kind.BIAS}


def parameter_shapes(inputs: int, hidden: tuple[int, ...], outputs: int) -> Any:
    """Shapes of a head's parameters, kernels (inputs, outputs)."""
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
    splits: Sequence[Split],
    settings: HeadSettings,
    points: Sequence[Sequence[HyperParams]],
) -> Heads:
    """Trains a head per split and point.

    Args:
        features: of all rows.
        labels: int32 class numbers [n] or float32 0/1 [n, classes].
        splits: of as many seeds and folds as there are.
        settings: how.
        points: for each split as many points as for every other.
    """
    number, size, inputs = len(splits), settings.batch_size, features.shape[1]
    orders = [Order(tuple(int(row) for row in split.rows), size, split.order) for split in splits]
    steps = max(order.steps_per_epoch for order in orders)
    index = np.zeros((settings.epochs, steps, number, size), np.int32)
    weight = np.zeros(index.shape, np.float32)
    for place, order in enumerate(orders):
        for epoch in range(settings.epochs):
            rows, weights = order.epoch(epoch)
            index[epoch, : len(rows), place], weight[epoch, : len(rows), place] = rows, weights
    shift = np.zeros((number, inputs), np.float32)
    factor = np.ones_like(shift)
    if settings.standardise:
        for place, split in enumerate(splits):
            shift[place] = features[split.rows].mean(0)
            spread = features[split.rows].std(0)
            # What is constant over the training rows tells a head nothing; scaled up, it would drown a new image.
            factor[place] = np.divide(1, spread, out=np.zeros_like(spread), where=spread > CONSTANT)
    grid = {
        name: np.asarray([[getattr(point, name) for point in each] for each in points], np.float32)
        for name in ("lr", "weight_decay")
    }
    params = _initial(
        parameter_shapes(inputs, settings.hidden, settings.objective.outputs), splits, grid["lr"].shape[1]
    )
    flat = [np.moveaxis(each.reshape(-1, number, size), 1, 0) for each in (index, weight)]
    trained = _train(settings, features, labels, (params, shift, factor, grid, *flat))
    heads = grid["lr"].shape[1]
    images = int(weight.sum()) * heads
    per_image = flops_per_image(inputs, settings.hidden, settings.objective)
    return Heads(settings, trained, shift, factor, images * per_image, steps * settings.epochs * number * heads, images)


def tune(
    features: Float[np.ndarray, "n d"],
    labels: Shaped[np.ndarray, "n ..."],
    splits: Sequence[Split],
    inner: Sequence[tuple[np.ndarray, np.ndarray]],
    settings: HeadSettings,
    points: Sequence[HyperParams],
) -> Heads:
    """Trains one head per split, at the point that is best on rows held out of the split's own training rows.

    Args:
        features: of all rows.
        labels: of all rows.
        splits: what is trained.
        inner: of each split's training rows, those to try the points on and those to judge them by.
        settings: how.
        points: that are tried; where there is only one, nothing is.

    Returns:
        Heads with one point each; its cost includes the search.
    """
    if len(points) == 1:
        return train(features, labels, splits, settings, [points] * len(splits))
    trials = [dataclasses.replace(split, rows=rows) for split, (rows, _) in zip(splits, inner, strict=True)]
    tried = train(features, labels, trials, settings, [points] * len(splits))
    best = tried.losses(features, labels, [rows for _, rows in inner]).argmin(1)
    final = train(features, labels, splits, settings, [[points[place]] for place in best])
    return dataclasses.replace(
        final, flops=final.flops + tried.flops, steps=final.steps + tried.steps, images=final.images + tried.images
    )


def _initial(shapes: Any, splits: Sequence[Split], points: int) -> Any:
    """Initial weights, stacked over splits and points."""
    kinds = {f"{layer}/{leaf}": kind for layer in shapes for leaf, kind in _KINDS.items()}
    drawn = {split.seed: init_params(shapes, kinds, split.seed) for split in splits}
    if len(shapes) == 1:
        # Directions that no training row has keep their initial weights, which would be noise to a new image.
        drawn = {seed: jax.tree.map(np.zeros_like, one) for seed, one in drawn.items()}

    def stack(*leaves: np.ndarray) -> np.ndarray:
        # Outputs first: heads that see the same rows are then one matrix product, and so is their gradient, with nothing
        # to transpose on the way to it.
        return np.repeat(np.stack([leaf.T for leaf in leaves])[:, None], points, 1)

    return jax.tree.map(stack, *[drawn[split.seed] for split in splits])


def _forward(params: Any, x: Float[Array, "b d"]) -> Float[Array, "b outputs"]:
    for number in range(len(params)):
        layer = params[f"layer{number}"]
        x = (jax.nn.relu(x) if number else x) @ layer["kernel"].T + layer["bias"]
    return x


@jax.jit
def _predict(params: Any, shift: Any, factor: Any, features: Any) -> Float[Array, "splits points n outputs"]:
    def of_split(one: Any) -> Array:
        params, shift, factor = one
        return jax.vmap(_forward, (0, None))(params, (features - shift) * factor)

    return _each(of_split, (params, shift, factor))


def _each(function: Callable[[Any], Any], stacked: Any) -> Any:
    """A function of one split for all of them: side by side, but on a CPU one after the other.

    XLA:CPU (jaxlib 0.10.2, its YNN fusions) returns zeros for some batched products of this shape, 10 splits x 9 points of
    1,280 features among them; one split at a time has no such product, and is no slower there.
    """
    return jax.lax.map(function, stacked) if jax.default_backend() == "cpu" else jax.vmap(function)(stacked)


@functools.partial(jax.jit, static_argnums=0)
def _train(settings: HeadSettings, features: Any, labels: Any, per_split: Any) -> Any:
    """Trains the heads of some splits.

    Args:
        settings: how.
        features: [n, d].
        labels: [n, ...].
        per_split: initial parameters, shift, factor, points, row numbers [splits, steps, b] and weights.

    Returns:
        Parameters.
    """
    b1, b2, eps = 0.9, 0.999, 1e-8

    def step_of(shift: Array, factor: Array, grid: Any, carry: Any, batch: Any) -> tuple[Any, None]:
        """One step of all points of a split."""
        params, means, squares, count = carry
        rows, weights = batch
        x, y = (features[rows] - shift) * factor, labels[rows]

        def loss(params: Any) -> Array:
            each = settings.objective(_forward(params, x), y)
            return jnp.sum(each * weights) / jnp.maximum(weights.sum(), 1.0)

        def all_points(params: Any) -> Array:
            return jax.vmap(loss)(params).sum()

        gradients = jax.grad(all_points)(params)
        # A split with fewer batches than the others sits the rest of their epoch out. As a factor, and not as a choice
        # between old and new, that stays in one pass over the parameters.
        active = (weights.sum() > 0).astype(jnp.float32)
        count = count + active
        means = jax.tree.map(lambda mean, g: mean + active * (1 - b1) * (g - mean), means, gradients)
        squares = jax.tree.map(lambda square, g: square + active * (1 - b2) * (g * g - square), squares, gradients)
        first, second = 1 / (1 - b1**count), 1 / (1 - b2**count)

        def step(path: Any, leaf: Array, mean: Array, square: Array) -> Array:
            rate, decay = (grid[name].reshape(-1, *[1] * (leaf.ndim - 1)) for name in ("lr", "weight_decay"))
            rate, decay = active * rate, decay if _KINDS[path[-1].key].is_kernel else 0.0
            return leaf - rate * (mean * first / (jnp.sqrt(square * second) + eps) + decay * leaf)

        return (jax.tree.map_with_path(step, params, means, squares), means, squares, count), None

    def of_split(one: Any) -> Any:
        params, shift, factor, grid, *batches = one
        zeros = jax.tree.map(jnp.zeros_like, params)
        body = functools.partial(step_of, shift, factor, grid)
        return jax.lax.scan(body, (params, zeros, zeros, jnp.float32(0)), tuple(batches))[0][0]

    return _each(of_split, per_split)


@functools.cache
def flops_per_image(inputs: int, hidden: tuple[int, ...], objective: ClassificationLoss) -> int:
    """Model FLOPs of one row in one step of a head."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[::-1], leaf.dtype),
        parameter_shapes(inputs, hidden, objective.outputs),
    )

    def gradient(params: Any, x: Any, labels: Any) -> Any:
        return jax.grad(lambda params: objective(_forward(params, x), labels).sum())(params)

    return flops.count(
        gradient, shapes, jax.ShapeDtypeStruct((1, inputs), jnp.float32), objective.label_shape(1, 0)
    ).model
