"""PARC: whether images of one class are alike."""

from typing import Any

import numpy as np
from jaxtyping import Int, Num

from dapt_jax.errors import UserError
from dapt_jax.transferability.inputs import FeatureStatistics
from dapt_jax.transferability.registry import score


@score("parc", needs="labels", higher_is_better=True, title="PARC")
def parc(
    features: Num[Any, "n d"],
    labels: Int[Any, " n"],
    *,
    statistics: FeatureStatistics | None = None,
    dimensions: int = 32,
) -> float:
    """Return the pairwise annotation-representation comparison, -100 to 100 (higher is better).

    100 times Spearman's correlation, over all pairs of images, between 1 - corr(F_i, F_j) and 1 - corr(y_i,
    y_j) with one-hot labels; the features are 32 principal components, standardised. Bolya et al., "Scalable
    Diverse Model Selection for Accessible Transfer Learning", arXiv 2111.06977.

    A correlation over components changes when one of them changes its sign, which an eigenvector is free to
    do: here the image that is farthest out along a component is on its positive side, whatever the basis of
    the features.

    Rounding errors of the labels' correlations are not ranked either, as they are in the authors' code.

    The labels' side has two values alone, so ranks are needed of pairs within a class only: the correlation
    follows from one sort, without ranking every pair.

    Args:
        features: Features of n images.
        labels: Class numbers.
        statistics: Statistics of the same features and labels, where they have been computed.
        dimensions: Number of principal components that are kept; all where there are fewer.

    Raises:
        UserError: Constant features, an image without variance over the components, no two images of one
            class, or what `FeatureStatistics.of` refuses.
    """
    found = statistics or FeatureStatistics.of(features, labels)
    rows = len(found.labels)
    if not found.spread:
        raise UserError(f"the features of all {rows} images are the same; expected some variance")
    real = int(np.sum(found.spectrum[0] > found.spectrum[0][-1] * 1e-12))
    kept = min(dimensions, real)
    if kept < 2:
        raise UserError(
            "the features vary along one direction alone; expected two or more to correlate images over"
        )
    order = np.argsort(found.labels, kind="stable")
    reduced = found.projected(kept)[order]
    farthest = reduced[np.abs(reduced).argmax(0), np.arange(kept)]
    reduced /= reduced.std(0) * np.sign(farthest)
    reduced -= reduced.mean(1, keepdims=True)
    lengths = np.linalg.norm(reduced, axis=1, keepdims=True)
    if (flat := lengths[:, 0] < 1e-12).any():  # components have a variance of 1: what is left is rounding
        raise UserError(
            f"image {order[flat.argmax()]} has the same value along all {kept} components ({flat.sum()} of {rows} "
            "images), such as that of the mean; expected some variance to correlate it with others"
        )
    reduced /= lengths
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
