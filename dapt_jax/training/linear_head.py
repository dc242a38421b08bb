"""Linear heads on frozen features: regularised logistic regression, solved to convergence.

The loss is the task's own (multinomial, a sigmoid per label, thresholds of ordinal classes), the penalty is
that of ridge regression on standardised features, the intercept is free. The strength of the penalty is
chosen by inner folds of the training rows. All folds, inner folds and strengths are columns of the same matrix
products in one compiled program.

Float32 is enough, and is all that a TPU has: the tests compare probabilities with a solution in float64.
See `linear_solver` for the method.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dapt_jax.cost import flops
from dapt_jax.losses import ClassificationLoss
from dapt_jax.training import linear_solver
from dapt_jax.training.head_sweep import CONSTANT

LINEAR = "linear"
"""Name of the protocol."""

SEARCH_ITERATIONS, FINAL_ITERATIONS = 30, 150
"""Iterations for each strength on inner folds, and for the chosen one on all training rows, from there."""

TOLERANCE = 1e-3
"""Largest gradient at which a head has converged, as a share of the largest gradient at zero weights."""

Inner = Sequence[tuple[np.ndarray, np.ndarray]]
"""Inner folds of a split's training rows: rows to fit on and rows to validate on."""


@dataclasses.dataclass(frozen=True)
class LinearHeads:
    """Fitted heads, one per split.

    Attributes:
        objective: Loss.
        kernel: Weights [splits, outputs, d] of the shifted and scaled features.
        bias: Intercepts [splits, outputs].
        shift: Subtracted from features, [d].
        factor: Multiplied with features after that, [d].
        strengths: Chosen strength of each split.
        gradients: Largest gradient of each split where the solver stopped, as a share of that at zero weights.
        flops: Model FLOPs of search and fit.
        steps: Iterations of all heads.
        images: Rows that all heads were fitted to, iterations counted.
    """

    objective: ClassificationLoss
    kernel: np.ndarray
    bias: np.ndarray
    shift: np.ndarray
    factor: np.ndarray
    strengths: np.ndarray
    gradients: np.ndarray
    flops: int
    steps: int
    images: int

    @property
    def size(self) -> int:
        """Number of parameters of a head."""
        return int(self.kernel[0].size + self.bias[0].size)

    def probabilities(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "splits n classes"]:
        """Return the probability of each class by each head."""
        x = (features - self.shift) * self.factor
        logits = np.einsum("nd,sod->sno", x, self.kernel, optimize=True) + self.bias[:, None]
        return np.asarray(jax.vmap(self.objective.probabilities)(jnp.asarray(logits, jnp.float32)))

    def not_converged(self) -> str:
        """Return a line on splits whose solver stopped too early; empty if there are none."""
        folds = np.flatnonzero(~(self.gradients <= TOLERANCE))
        if not len(folds):
            return ""
        worst = folds[self.gradients[folds].argmax()]
        return (
            f"the head of fold {', '.join(str(fold + 1) for fold in folds)} has not converged in "
            f"{FINAL_ITERATIONS} iterations: gradient {self.gradients[worst]:.1e} of that at zero weights, "
            f"expected {TOLERANCE:.0e}, at strength {self.strengths[worst]:g}; expected larger "
            "transfer.head.strengths"
        )


def fit(
    features: Float[np.ndarray, "n d"],
    labels: Shaped[np.ndarray, "n ..."],
    splits: Sequence[np.ndarray],
    inner: Sequence[Inner],
    objective: ClassificationLoss,
    strengths: Sequence[float],
    standardise: bool = True,
) -> LinearHeads:
    """Fit a head per split, with the strength of lowest loss on its inner folds.

    The objective is the mean loss of the training rows plus half the strength times the total variance of the
    features times the squared norm of the weights; that of independent sigmoids is their sum. Of standardised
    features the total variance is the number of features d, so that a strength s is scikit-learn's
    C = 1 / (n d s), and twice that for two classes, where scikit-learn penalises one sigmoid.

    Args:
        features: Features of all rows.
        labels: Class numbers, int32 [n], or 0/1, float32 [n, classes].
        splits: Training rows of all splits.
        inner: Inner folds of each split, of all splits the same number; ignored with a single strength.
        objective: Loss.
        strengths: Strengths to choose from.
        standardise: Whether features are scaled to variance 1 over the rows that are fitted to.
    """
    x, shift, factor = _comparable(features, standardise)
    values = np.sort(np.asarray(strengths, np.float32))[::-1]  # of equal losses the strongest penalty's wins
    inner = inner if len(values) > 1 else [[] for _ in splits]
    fitted = [rows for of_split in inner for rows, _ in of_split]
    held = [_known(labels, rows, others) for of_split in inner for rows, others in of_split]
    scaling = _scaling(x, [*fitted, *splits], standardise)
    kernel, bias, chosen, gradients = _fit(
        objective,
        len(splits),
        jnp.asarray(x),
        jnp.asarray(labels),
        jnp.asarray(_shares([*fitted, *splits], len(x))),
        jnp.asarray(_shares(held, len(x))),
        tuple(map(jnp.asarray, scaling)),
        jnp.asarray(values),
    )
    trials = len(fitted) * len(values)
    return LinearHeads(
        objective,
        np.asarray(kernel),
        np.asarray(bias),
        shift,
        factor,
        values[np.asarray(chosen)],
        np.asarray(gradients),
        count_flops(*x.shape, objective, len(splits), len(fitted) // len(splits), len(values)),
        SEARCH_ITERATIONS * trials + FINAL_ITERATIONS * len(splits),
        SEARCH_ITERATIONS * len(values) * sum(map(len, fitted)) + FINAL_ITERATIONS * sum(map(len, splits)),
    )


@functools.cache
def count_flops(
    rows: int, inputs: int, objective: ClassificationLoss, splits: int, inner: int, strengths: int
) -> int:
    """Return the model FLOPs of `fit`: those of its matrix products, and not of a small QR decomposition.

    Args:
        rows: Number of all rows; those that a fold holds out have weight 0.
        inputs: Number of features.
        objective: Loss.
        splits: Number of splits.
        inner: Number of inner folds of each; 0 with a single strength.
        strengths: Number of strengths.
    """

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    trials = splits * (inner if strengths > 1 else 0)
    every = trials + splits
    return flops.count(
        functools.partial(_fit, objective, splits),
        of(rows, inputs),
        objective.label_shape(rows, 0),
        of(every, rows),
        of(trials, rows),
        (of(every, inputs), of(every, inputs), of(every)),
        of(strengths),
    ).model


def _comparable(
    features: np.ndarray, standardise: bool
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """Return features shifted and scaled over all rows, for the solver's sake, with shift and factor.

    It changes variables, not the solution: each split's own scaling follows, by its training rows alone.
    """
    shift = features.mean(0, dtype=np.float64)
    deviation = features.std(0, dtype=np.float64) if standardise else np.ones(features.shape[1])
    floor = CONSTANT * np.maximum(np.abs(shift), 1e-30)
    factor = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > floor)
    shift, factor = shift.astype(np.float32), factor.astype(np.float32)
    return ((features - shift) * factor).astype(np.float32), shift, factor


def _shares(parts: Sequence[np.ndarray], rows: int) -> Float[np.ndarray, "parts rows"]:
    """Return the share of each row in each part: weights that add to 1."""
    shares = np.zeros((len(parts), rows), np.float32)
    for share, part in zip(shares, parts, strict=True):
        share[part] = 1 / max(1, len(part))
    return shares


def _known(labels: np.ndarray, fitted: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Return held-out rows whose class the fitted rows have; any other would have a loss without bound."""
    return held if labels.ndim > 1 else held[np.isin(labels[held], labels[fitted])]


def _scaling(
    x: np.ndarray, parts: Sequence[np.ndarray], standardise: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean [parts, d], factor [parts, d] and total variance [parts] of each part's scaled features."""
    mean, factor, total = [], [], []
    for part in parts:
        rows = x[part].astype(np.float64)
        deviation = rows.std(0)
        # Constant features carry no information; scaled up, they would dominate a new image.
        varies = deviation > CONSTANT
        mean.append(rows.mean(0))
        factor.append(
            np.divide(1, deviation, out=np.zeros_like(deviation), where=varies) if standardise else varies
        )
        total.append(max(float(varies.sum() if standardise else (deviation[varies] ** 2).sum()), CONSTANT))
    return np.array(mean, np.float32), np.array(factor, np.float32), np.array(total, np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
@jax.default_matmul_precision("highest")
def _fit(
    objective: ClassificationLoss,
    splits: int,
    x: Float[Array, "n d"],
    labels: Shaped[Array, "n ..."],
    shares: Float[Array, "parts n"],
    held: Float[Array, "trials n"],
    scaling: tuple[Float[Array, "parts d"], Float[Array, "parts d"], Float[Array, " parts"]],
    strengths: Float[Array, " strengths"],
) -> tuple[Array, Array, Int[Array, " splits"], Float[Array, " splits"]]:
    """Choose a strength for each split, and fit with it.

    The first of the parts are the inner folds of all splits, the last are the splits.

    Returns:
        Kernels [splits, outputs, d] of `x`, intercepts, numbers of the chosen strengths, and gradients.
    """
    trials, number = len(held), len(strengths)
    size, d = objective.outputs, x.shape[1]
    solve = functools.partial(
        linear_solver.solve, objective, x, labels, linear_solver.leading_directions(x), shares, scaling
    )
    chosen = jnp.zeros(splits, jnp.int32)
    start = (jnp.zeros((splits, size, d)), jnp.zeros((splits, size)))
    if trials:
        part = jnp.repeat(jnp.arange(trials), number)
        none = (jnp.zeros((trials * number, size, d)), jnp.zeros((trials * number, size)))
        tried, logits_loss, _ = solve(
            SEARCH_ITERATIONS, part, jnp.tile(strengths, trials), none, jnp.repeat(held, number, 0)
        )
        # Rows count alike, whichever inner fold holds them out.
        rows = (held > 0).sum(1).reshape(splits, -1, 1)
        loss = (logits_loss.reshape(splits, -1, number) * rows).sum(1)
        chosen = jnp.argmin(jnp.where(jnp.isnan(loss), jnp.inf, loss), 1)
        start = jax.tree.map(
            lambda each: each.reshape(splits, -1, number, *each.shape[1:])[
                jnp.arange(splits), :, chosen
            ].mean(1),
            tried,
        )
    part = trials + jnp.arange(splits)
    (kernel, bias), _, gradients = solve(FINAL_ITERATIONS, part, strengths[chosen], start, shares[part])
    mean, factor, _ = scaling
    kernel = kernel * factor[part, None]
    return kernel, bias - (kernel * mean[part, None]).sum(-1), chosen, gradients
