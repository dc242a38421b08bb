"""Scores from single images: whose likeness follows the labels, whose nearest neighbour, and what a linear probe gets right."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num

from dapt_jax.errors import UserError
from dapt_jax.transferability.inputs import Moments, in_double


def parc(
    features: Num[Any, "n d"], labels: Int[Any, " n"], *, moments: Moments | None = None, dimensions: int = 32
) -> float:
    """Pairwise annotation-representation comparison, -100 to 100 (higher is better).

    100 times Spearman's correlation, over all pairs of images, between 1 - corr(F_i, F_j) and 1 - corr(y_i, y_j) with
    one-hot labels; the features are 32 principal components, standardised. Bolya et al., "Scalable Diverse Model Selection
    for Accessible Transfer Learning", arXiv 2111.06977.

    A correlation over components changes when one of them changes its sign, which an eigenvector is free to do: here the
    image that is farthest out along a component is on its positive side, whatever the basis of the features.

    Rounding errors of the labels' correlations are not ranked either, as they are in the authors' code.

    The labels' side has two values alone, so ranks are needed of pairs within a class only: the correlation follows from
    one sort, without ranking every pair.

    Args:
        features: of n images.
        labels: class numbers.
        moments: of the same, where they are there already.
        dimensions: principal components that are kept; all where there are fewer.

    Raises:
        UserError: constant features, no two images of one class, or what `Moments.of` refuses.
    """
    found = moments or Moments.of(features, labels)
    rows = len(found.labels)
    if not found.spread:
        raise UserError(f"the features of all {rows} images are the same; expected some variance")
    real = int(np.sum(found.spectrum[0] > found.spectrum[0][-1] * 1e-12))
    kept = min(dimensions, real)
    if kept < 2:
        raise UserError("the features vary along one direction alone; expected two or more to correlate images over")
    order = np.argsort(found.labels, kind="stable")
    reduced = found.projected(kept)[order]
    farthest = reduced[np.abs(reduced).argmax(0), np.arange(kept)]
    reduced /= reduced.std(0) * np.sign(farthest)
    reduced -= reduced.mean(1, keepdims=True)
    reduced /= np.linalg.norm(reduced, axis=1, keepdims=True)
    distances = np.empty(rows * (rows - 1) // 2)
    within, filled = [], 0
    ends = np.repeat(np.cumsum(found.counts), found.counts)
    for first in range(0, rows, 256):
        # Rounded, so that copies of an image are ties in whatever order their products were summed.
        block = np.round(1 - reduced[first : first + 256] @ reduced[first:].T, 12)
        for number, row in enumerate(block):
            above = row[number + 1 :]
            distances[filled : filled + len(above)] = above
            filled += len(above)
            within.append(above[: ends[first + number] - first - number - 1])
    same = np.concatenate(within)
    if not len(same) or len(same) == len(distances):
        raise UserError("no two images are of one class; expected classes of several images")
    distances.sort()
    ranks = (np.searchsorted(distances, same, "left") + np.searchsorted(distances, same, "right") + 1) / 2
    pairs, middle = len(distances), (len(distances) + 1) / 2
    edges = np.flatnonzero(np.concatenate([[True], distances[1:] != distances[:-1], [True]]))
    ties = np.diff(edges).astype(float)
    rank_variance = (float(pairs) ** 2 - 1) / 12 - np.sum(ties**3 - ties) / (12 * pairs)
    share = len(same) / pairs
    if rank_variance <= 0:
        raise UserError("all pairs of images are equally alike; expected some variance")
    return float(100 * share * (middle - ranks.mean()) / np.sqrt(rank_variance * share * (1 - share)))


def knn(features: Num[Any, "n d"], labels: Int[Any, " n"], *, moments: Moments | None = None, k: int = 1) -> float:
    """Leave-one-out accuracy of the k nearest neighbours by Euclidean distance, 0 to 1 (higher is better).

    The most frequent class among the neighbours; of several, the lowest number. Distances in float32 from centred features.

    Args:
        features: of n images.
        labels: class numbers.
        moments: of the same, where they are there already.
        k: neighbours.

    Raises:
        UserError: fewer than k other images, or what `Moments.of` refuses.
    """
    found = moments or Moments.of(features, labels)
    rows = len(found.labels)
    if not 0 < k < rows:
        raise UserError(f"{k} neighbours asked of {rows} images; expected 1 to {rows - 1}")
    values = found.centred.astype(np.float32)
    block = min(rows, 512)
    correct = 0
    for first in range(0, rows, block):
        start = min(first, rows - block)  # the last block reaches back, so that all have one shape
        near = np.asarray(_nearest(values, start, block, k))[first - start :]
        votes = found.labels[near]
        counts = (votes[:, :, None] == np.arange(len(found.counts))).sum(1) if k > 1 else None
        said = votes[:, 0] if counts is None else counts.argmax(1)
        correct += int(np.sum(said == found.labels[first : start + block]))
    return correct / rows


@functools.partial(jax.jit, static_argnums=(2, 3))
def _nearest(values: Any, start: Any, block: int, k: int) -> Int[Array, "b k"]:
    part = jax.lax.dynamic_slice_in_dim(values, start, block)
    distances = jnp.sum(values**2, 1) - 2 * part @ values.T  # the row's own length is the same for all its neighbours
    itself = jnp.arange(len(values)) == (start + jnp.arange(block))[:, None]
    distances = jnp.where(itself, jnp.inf, distances)
    if k == 1:  # a sort of every row would cost more than the distances
        return jnp.argmin(distances, 1)[:, None]
    return jax.lax.top_k(-distances, k)[1]


@in_double
def linear_probe(
    features: Num[Any, "n d"],
    labels: Int[Any, " n"],
    *,
    moments: Moments | None = None,
    folds: int = 5,
    ridge: float = 1e-2,
    seed: int = 0,
) -> float:
    """Held-out accuracy of a linear classifier, 0 to 1 (higher is better): the yardstick for all other scores.

    Ridge regression on one-hot labels, fitted to all folds but one and judged on that one, by arg-max; the penalty is
    `ridge` times the rows fitted to times the mean variance of a feature. Folds are stratified at random.

    Args:
        features: of n images.
        labels: class numbers.
        moments: of the same, where they are there already.
        folds: number of folds.
        ridge: relative penalty.
        seed: of the folds.

    Raises:
        UserError: fewer than two images, or what `Moments.of` refuses.
    """
    found = moments or Moments.of(features, labels)
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
def _ridge(scatter: Any, x: Any, products: Any, y: Any, mean: Any, share: Any, kept: Any, penalty: Any) -> Any:
    """Weights fitted to all rows but the held-out ones, from sums over all rows less those over the held-out ones."""
    left = scatter - x.T @ x - kept * jnp.outer(mean, mean)
    right = products - y.T @ x - kept * jnp.outer(share, mean)
    factor = jax.scipy.linalg.cho_factor(left + kept * penalty * jnp.eye(len(left)))
    return jax.scipy.linalg.cho_solve(factor, right.T)
