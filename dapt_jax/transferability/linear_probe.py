"""Held-out accuracy of a linear classifier."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from dapt_jax.errors import UserError
from dapt_jax.transferability.inputs import FeatureStatistics, in_double
from dapt_jax.transferability.registry import score


@score("linear_probe", needs="labels", higher_is_better=True, title="linear probe")
@in_double
def linear_probe(
    features: Num[Any, "n d"],
    labels: Int[Any, " n"],
    *,
    statistics: FeatureStatistics | None = None,
    folds: int = 5,
    ridge: float = 1e-2,
    seed: int = 0,
) -> float:
    """Return the held-out accuracy of a linear classifier, 0 to 1 (higher is better).

    It is the reference for all other scores.

    Ridge regression on one-hot labels, fitted to all folds but one and judged on that one, by arg-max; the
    penalty is `ridge` times the rows fitted to times the mean variance of a feature. Folds are stratified at
    random.

    Args:
        features: Features of n images.
        labels: Class numbers.
        statistics: Statistics of the same features and labels, where they have been computed.
        folds: Number of folds.
        ridge: Relative penalty.
        seed: Seed of the folds.

    Raises:
        UserError: Fewer than two folds, or what `FeatureStatistics.of` refuses.
    """
    if folds < 2:
        raise UserError(
            f"{folds} folds asked; expected 2 or more, since each is judged by what the others fit"
        )
    found = statistics or FeatureStatistics.of(features, labels)
    rows, classes = len(found.labels), len(found.counts)
    if not found.spread:
        return float(found.counts.max() / rows)
    shuffled = np.random.default_rng(seed).permutation(rows)
    by_class = shuffled[np.argsort(found.labels[shuffled], kind="stable")]
    fold_of = np.empty(rows, int)
    fold_of[by_class] = np.arange(rows) % folds
    targets = np.eye(classes)[found.labels]
    penalty = ridge * np.trace(found.scatter) / found.features.shape[1] / rows
    correct = 0
    for fold in range(min(folds, rows)):
        held = fold_of == fold
        x, y = found.centred[held], targets[held]
        kept = rows - len(x)
        total = found.centred.sum(0) - x.sum(0)
        mean, share = total / kept, (targets.sum(0) - y.sum(0)) / kept
        products = found.counts[:, None] * found.class_means  # Y'F of all rows
        weights = _ridge(found.scatter, x, products, y, mean, share, float(kept), penalty)
        said = ((x - mean) @ np.asarray(weights) + share).argmax(1)
        correct += int(np.sum(said == found.labels[held]))
    return correct / rows


@jax.jit
def _ridge(
    scatter: Float[Array, "d d"],
    x: Float[Array, "n d"],
    products: Float[Array, "c d"],
    y: Float[Array, "n c"],
    mean: Float[Array, " d"],
    share: Float[Array, " c"],
    kept: Float[Array, ""],
    penalty: Float[Array, ""],
) -> Float[Array, "d c"]:
    """Return weights fitted without the held-out rows, from sums over all rows minus theirs."""
    left = scatter - x.T @ x - kept * jnp.outer(mean, mean)
    right = products - y.T @ x - kept * jnp.outer(share, mean)
    factor = jax.scipy.linalg.cho_factor(left + kept * penalty * jnp.eye(len(left)))
    return jax.scipy.linalg.cho_solve(factor, right.T)
