"""Perceptrons on frozen features: all seeds, folds and grid points train in one vectorised program."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from dapt_jax.cost import flops
from dapt_jax.data.pipeline import Order
from dapt_jax.errors import UserError
from dapt_jax.losses import ClassificationLoss
from dapt_jax.models.initial import init_params
from dapt_jax.parameters import Kind
from dapt_jax.training.freezing import Tree

HIDDEN: dict[str, tuple[int, ...]] = {"mlp_small": (64, 32), "mlp_large": (512, 256, 256, 128)}
"""Hidden layers by protocol: Model 1 and Model 2 of arXiv 2204.13280."""

PerSplit = tuple[Tree, Array, Array, dict[str, Array], Array, Array]
"""Initial parameters, shift, factor, grid, row numbers [splits, steps, b] and their weights;
those of one split are without the axis of splits."""

Stacked = TypeVar("Stacked")

CONSTANT = 1e-6
"""Standard deviation up to which a feature counts as constant."""


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """Training of heads: Adam with decoupled weight decay of kernels and constant learning rate.

    Attributes:
        hidden: Sizes of the hidden layers (ReLU).
        objective: Loss.
        epochs: Passes over a split's training rows.
        batch_size: Rows per step.
        standardise: Whether features are scaled to mean 0 and variance 1 by the split's training rows.
        early_stopping: Whether `tune` chooses the number of epochs too, from 1 to `epochs`.
    """

    hidden: tuple[int, ...]
    objective: ClassificationLoss
    epochs: int
    batch_size: int
    standardise: bool
    early_stopping: bool = False


@dataclasses.dataclass(frozen=True)
class Split:
    """The training rows of one fold with one seed.

    Attributes:
        rows: Row numbers.
        seed: Seed of the initial weights.
        order: Seed of the order in which the rows are seen.
    """

    rows: np.ndarray
    seed: int
    order: int


def of_folds(folds: Sequence[np.ndarray], seed: int) -> list[Split]:
    """Return the folds of one seed: same initial weights, but a different data order per fold."""
    return [Split(rows, seed, seed * len(folds) + number) for number, rows in enumerate(folds)]


@dataclasses.dataclass(frozen=True)
class HyperParams:
    """One point of a grid.

    Attributes:
        lr: Learning rate.
        weight_decay: Decoupled weight decay of kernels.
    """

    lr: float
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class Heads:
    """Trained heads, one per split and point of the grid.

    Attributes:
        settings: How they were trained.
        params: Parameters, each leaf with leading axes of splits and points; kernels are (outputs, inputs).
        shift: Means [splits, d], subtracted from features.
        factor: Factors [splits, d], by which they are then multiplied.
        flops: Model FLOPs of training.
        steps: Steps of all heads.
        images: Rows that all heads were trained on, repeats counted.
        logits_by_epoch: Logits of watched features after every epoch, by name, float32 [splits, points,
            epochs, n, outputs]; empty where nothing is watched.
    """

    settings: HeadSettings
    params: Tree
    shift: np.ndarray
    factor: np.ndarray
    flops: int
    steps: int
    images: int
    logits_by_epoch: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    held_losses: Float[np.ndarray, "splits points epochs"] | None = None
    epochs: tuple[int, ...] = ()

    def probabilities_by_epoch(self, name: str) -> Float[np.ndarray, "splits epochs n classes"]:
        """Return the probability of each class of watched features after every epoch, by each first point."""
        probabilities = self.settings.objective.probabilities
        return np.asarray(jax.vmap(jax.vmap(probabilities))(self.logits_by_epoch[name][:, 0]))

    @property
    def size(self) -> int:
        """Number of parameters of a head."""
        return sum(leaf[0, 0].size for leaf in jax.tree.leaves(self.params))

    def probabilities(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "splits n classes"]:
        """Return the probability of each class by the head of each split's first point."""
        logits = _predict(self.params, self.shift, self.factor, features)[:, 0]
        return np.asarray(jax.vmap(self.settings.objective.probabilities)(logits))

    def losses(
        self,
        features: Float[np.ndarray, "n d"],
        labels: Shaped[np.ndarray, "n ..."],
        rows: Sequence[np.ndarray],
    ) -> Float[np.ndarray, "splits points"]:
        """Return the mean loss of each head on some rows for each split."""
        logits = _predict(self.params, self.shift, self.factor, features)
        objective = self.settings.objective
        found = [
            [objective(each[part], jnp.asarray(labels[part])).mean() for each in of_split]
            for of_split, part in zip(logits, rows, strict=True)
        ]
        return np.asarray(found)


_KINDS = {"kernel": Kind.DENSE_KERNEL, "bias": Kind.BIAS}


def parameter_shapes(inputs: int, hidden: tuple[int, ...], outputs: int) -> Tree:
    """Return shapes of a head's parameters, kernels (inputs, outputs)."""
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
    watched: Mapping[str, Float[np.ndarray, "m d"]] | None = None,
    held: Sequence[np.ndarray] | None = None,
    stop: Sequence[int] | None = None,
) -> Heads:
    """Train a head per split and point.

    Args:
        features: Features of all rows.
        labels: Class numbers, int32 [n], or 0/1, float32 [n, classes].
        splits: Training rows of all seeds and folds.
        settings: How heads are trained.
        points: Points of the grid for each split, as many as for every other.
        watched: Features by name whose logits are kept after every epoch; None for none.
        held: Rows on which the loss of each split's heads is computed after every epoch; None for none.
        stop: Epochs after which each split's heads stay as they are; None for all of `settings.epochs`. The
            program runs on, one step for all splits, and the cost counts it.
    """
    number, size, inputs = len(splits), settings.batch_size, features.shape[1]
    orders = [Order(tuple(int(row) for row in split.rows), size, split.order) for split in splits]
    steps = max(order.steps_per_epoch for order in orders)
    index = np.zeros((settings.epochs, steps, number, size), np.int32)
    weight = np.zeros(index.shape, np.float32)
    for column, order in enumerate(orders):
        for epoch in range(settings.epochs):
            rows, weights = order.epoch(epoch)
            index[epoch, : len(rows), column], weight[epoch, : len(rows), column] = rows, weights
    seen = settings.epochs * sum(len(split.rows) for split in splits)
    for column, last in enumerate(stop or ()):
        weight[last:, :, column] = 0  # no step is taken without a row that counts
    shift = np.zeros((number, inputs), np.float32)
    factor = np.ones_like(shift)
    if settings.standardise:
        for column, split in enumerate(splits):
            shift[column] = features[split.rows].mean(0)
            deviation = features[split.rows].std(0)
            # Constant features carry no information; scaled up, they would dominate a new image.
            factor[column] = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > CONSTANT)
    grid = {
        name: np.asarray([[getattr(point, name) for point in each] for each in points], np.float32)
        for name in ("lr", "weight_decay")
    }
    params = _initial(
        parameter_shapes(inputs, settings.hidden, settings.objective.outputs), splits, grid["lr"].shape[1]
    )
    flat = [np.moveaxis(each.reshape(-1, number, size), 1, 0) for each in (index, weight)]
    trained, by_epoch, losses = _train(
        settings,
        features,
        labels,
        (params, shift, factor, grid, *flat),
        dict(watched or {}),
        None if held is None else _padded(held),
    )
    heads = grid["lr"].shape[1]
    images = seen * heads
    spent = images * flops_per_image(inputs, settings.hidden, settings.objective)
    for rows in held or ():
        spent += (
            len(rows) * heads * settings.epochs * forward_flops(inputs, settings.hidden, settings.objective)
        )
    return Heads(
        settings,
        trained,
        shift,
        factor,
        spent,
        steps * settings.epochs * number * heads,
        images,
        by_epoch,
        None if losses is None else np.asarray(losses),
        tuple(stop or (settings.epochs,) * number),
    )


def _padded(held: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return held-out rows as int32 [splits, h], and their weights, float32 [splits, h] of sum 1."""
    most = max(map(len, held))
    rows, weights = np.zeros((len(held), most), np.int32), np.zeros((len(held), most), np.float32)
    for column, each in enumerate(held):
        rows[column, : len(each)], weights[column, : len(each)] = each, 1 / len(each)
    return rows, weights


def tune(
    features: Float[np.ndarray, "n d"],
    labels: Shaped[np.ndarray, "n ..."],
    splits: Sequence[Split],
    inner: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
    settings: HeadSettings,
    points: Sequence[HyperParams],
    watched: Mapping[str, Float[np.ndarray, "m d"]] | None = None,
) -> Heads:
    """Train one head per split, at the point that is best on inner splits of its training rows.

    With `settings.early_stopping` the number of epochs is chosen with the point.

    Args:
        features: Features of all rows.
        labels: Labels of all rows.
        splits: Training rows of all seeds and folds.
        inner: Inner splits of each split's training rows, as many for every split: rows to train on and rows
            to validate on. The mean loss over all that are validated on decides.
        settings: How heads are trained.
        points: Points of the grid; with a single one nothing is searched.
        watched: See `train`; of the final heads.

    Returns:
        Heads with one point each; its cost includes the search.

    Raises:
        UserError: A head has diverged at the point that was chosen for it.
    """
    if len(points) == 1 and not settings.early_stopping:
        every = [points] * len(splits)
        return _finite(train(features, labels, splits, settings, every, watched), every)
    trials = [
        dataclasses.replace(split, rows=rows)
        for split, folds in zip(splits, inner, strict=True)
        for rows, _ in folds
    ]
    held = [rows for folds in inner for _, rows in folds]
    each_epoch = held if settings.early_stopping else None
    tried = train(features, labels, trials, settings, [points] * len(trials), held=each_epoch)
    losses = tried.held_losses
    if losses is None:
        losses = tried.losses(features, labels, held)[..., None]
    weighted = losses * np.array([len(rows) for rows in held])[:, None, None]
    of_split = weighted.reshape(len(splits), -1, *losses.shape[1:]).sum(1)
    # A point that diverges has no loss, and is none to choose.
    best = np.where(np.isnan(of_split), np.inf, of_split).reshape(len(splits), -1).argmin(1)
    chosen, epochs = np.unravel_index(best, of_split.shape[1:])
    stop = [int(epoch) + 1 for epoch in epochs] if settings.early_stopping else None
    every = [[points[index]] for index in chosen]
    final = _finite(train(features, labels, splits, settings, every, watched, stop=stop), every)
    return dataclasses.replace(
        final,
        flops=final.flops + tried.flops,
        steps=final.steps + tried.steps,
        images=final.images + tried.images,
    )


def _finite(heads: Heads, points: Sequence[Sequence[HyperParams]]) -> Heads:
    """Return heads of one point each; refuse those whose probabilities would be NaN."""
    for number, (point, *_) in enumerate(points):
        if not all(np.isfinite(leaf[number]).all() for leaf in jax.tree.leaves(heads.params)):
            raise UserError(
                f"the perceptron of fold {number + 1} has diverged: its weights are not finite at lr={point.lr:g} "
                f"and weight_decay={point.weight_decay:g}; expected a smaller transfer.head.lr, or finite features"
            )
    return heads


def _initial(shapes: Tree, splits: Sequence[Split], points: int) -> Tree:
    """Return initial weights, stacked over splits and points."""
    kinds = {f"{layer}/{leaf}": kind for layer in shapes for leaf, kind in _KINDS.items()}
    initial = {split.seed: init_params(shapes, kinds, split.seed) for split in splits}

    def stack(*leaves: np.ndarray) -> np.ndarray:
        # Outputs first: heads that see the same rows are then one matrix product, and so is their gradient,
        # with nothing to transpose on the way to it.
        return np.repeat(np.stack([leaf.T for leaf in leaves])[:, None], points, 1)

    return jax.tree.map(stack, *[initial[split.seed] for split in splits])


def _forward(params: Tree, x: Float[Array, "b d"]) -> Float[Array, "b outputs"]:
    for number in range(len(params)):
        layer = params[f"layer{number}"]
        x = (jax.nn.relu(x) if number else x) @ layer["kernel"].T + layer["bias"]
    return x


@jax.jit
def _predict(
    params: Tree,
    shift: Float[Array, "splits d"],
    factor: Float[Array, "splits d"],
    features: Float[Array, "n d"],
) -> Float[Array, "splits points n outputs"]:
    def of_split(one: tuple[Tree, Array, Array]) -> Array:
        params, shift, factor = one
        return jax.vmap(_forward, (0, None))(params, (features - shift) * factor)

    return _each(of_split, (params, shift, factor))


def _each(function: Callable[[Stacked], Any], stacked: Stacked) -> Any:
    """Apply a function of one split to all splits: vectorised, but sequentially on a CPU.

    XLA:CPU (jaxlib 0.10.2, its YNN fusions) returns zeros for some batched products of this shape, 10 splits
    x 9 points of 1,280 features among them; one split at a time has no such product, and is no slower there.
    """
    return jax.lax.map(function, stacked) if jax.default_backend() == "cpu" else jax.vmap(function)(stacked)


@functools.partial(jax.jit, static_argnums=0)
def _train(
    settings: HeadSettings,
    features: Float[Array, "n d"],
    labels: Shaped[Array, "n ..."],
    per_split: PerSplit,
    watched: dict[str, Array],
    held: tuple[Array, Array] | None,
) -> tuple[Tree, dict[str, Array], Array | None]:
    """Train the heads of some splits.

    Args:
        settings: How heads are trained.
        features: Features [n, d].
        labels: Labels [n, ...].
        per_split: Initial parameters, shift, factor, grid, row numbers [splits, steps, b] and weights.
        watched: Features [m, d] whose logits are kept after every epoch, by name.
        held: Rows [splits, h] and weights whose loss is kept after every epoch; None for none.

    Returns:
        Trained parameters, the kept logits, and the kept losses.
    """
    b1, b2, eps = 0.9, 0.999, 1e-8

    def step_of(
        shift: Array,
        factor: Array,
        grid: dict[str, Array],
        carry: tuple[Tree, Tree, Tree, Array],
        batch: tuple[Array, Array],
    ) -> tuple[tuple[Tree, Tree, Tree, Array], None]:
        """Take one step of all points of a split."""
        params, means, squares, count = carry
        rows, weights = batch
        x, y = (features[rows] - shift) * factor, labels[rows]

        def loss(params: Tree) -> Array:
            each = settings.objective(_forward(params, x), y)
            return jnp.sum(each * weights) / jnp.maximum(weights.sum(), 1.0)

        def all_points(params: Tree) -> Array:
            return jax.vmap(loss)(params).sum()

        gradients = jax.grad(all_points)(params)
        # A split with fewer batches than the others skips the rest of their epoch. A factor, unlike a
        # selection between old and new values, needs only one pass over the parameters.
        active = (weights.sum() > 0).astype(jnp.float32)
        count = count + active
        means = jax.tree.map(lambda mean, g: mean + active * (1 - b1) * (g - mean), means, gradients)
        squares = jax.tree.map(
            lambda square, g: square + active * (1 - b2) * (g * g - square), squares, gradients
        )
        first, second = 1 / (1 - b1**count), 1 / (1 - b2**count)

        def step(path: Sequence[jax.tree_util.DictKey], leaf: Array, mean: Array, square: Array) -> Array:
            lr, decay = (grid[name].reshape(-1, *[1] * (leaf.ndim - 1)) for name in ("lr", "weight_decay"))
            rate, shrinkage = active * lr, decay if _KINDS[path[-1].key].is_kernel else 0.0
            return leaf - rate * (mean * first / (jnp.sqrt(square * second) + eps) + shrinkage * leaf)

        return (jax.tree.map_with_path(step, params, means, squares), means, squares, count), None

    def of_split(
        one: tuple[PerSplit, tuple[Array, Array] | None],
    ) -> tuple[Tree, dict[str, Array], Array | None]:
        (params, shift, factor, grid, *batches), own_held = one
        zeros = jax.tree.map(jnp.zeros_like, params)
        body = functools.partial(step_of, shift, factor, grid)
        start = (params, zeros, zeros, jnp.float32(0))
        if not watched and own_held is None:
            return jax.lax.scan(body, start, tuple(batches))[0][0], {}, None

        def logits_of(params: Tree, x: Array) -> Array:
            return jax.vmap(_forward, (0, None))(params, (x - shift) * factor)

        def epoch(carry: Any, batches: Any) -> tuple[Any, tuple[dict[str, Array], Array | None]]:
            carry = jax.lax.scan(body, carry, batches)[0]
            logits = {name: logits_of(carry[0], x) for name, x in watched.items()}
            if own_held is None:
                return carry, (logits, None)
            rows, weights = own_held
            losses = jax.vmap(settings.objective, (0, None))(
                logits_of(carry[0], features[rows]), labels[rows]
            )
            return carry, (logits, losses @ weights)

        by_epoch = tuple(each.reshape(settings.epochs, -1, *each.shape[1:]) for each in batches)
        carry, (logits, losses) = jax.lax.scan(epoch, start, by_epoch)
        moved = {name: jnp.moveaxis(each, 1, 0) for name, each in logits.items()}
        return carry[0], moved, None if losses is None else losses.T

    return _each(of_split, (per_split, held))


@functools.cache
def forward_flops(inputs: int, hidden: tuple[int, ...], objective: ClassificationLoss) -> int:
    """Return model FLOPs of the logits of one row by a head."""
    sizes = (inputs, *hidden, objective.outputs)
    return sum(2 * a * b for a, b in itertools.pairwise(sizes))


@functools.cache
def flops_per_image(inputs: int, hidden: tuple[int, ...], objective: ClassificationLoss) -> int:
    """Return model FLOPs of one row in one step of a head."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[::-1], leaf.dtype),
        parameter_shapes(inputs, hidden, objective.outputs),
    )

    def gradient(params: Tree, x: Array, labels: Array) -> Tree:
        return jax.grad(lambda params: objective(_forward(params, x), labels).sum())(params)

    return flops.count(
        gradient, shapes, jax.ShapeDtypeStruct((1, inputs), jnp.float32), objective.label_shape(1, 0)
    ).model
