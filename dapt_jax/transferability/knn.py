"""Leave-one-out accuracy of the nearest neighbours."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from dapt_jax.errors import UserError
from dapt_jax.transferability.inputs import FeatureStatistics
from dapt_jax.transferability.registry import score


@score("knn", needs="labels", higher_is_better=True, title="nearest neighbours")
def knn(
    features: Num[Any, "n d"],
    labels: Int[Any, " n"],
    *,
    statistics: FeatureStatistics | None = None,
    k: int = 1,
) -> float:
    """Return the leave-one-out accuracy of k Euclidean nearest neighbours, 0 to 1 (higher is better).

    The most frequent class among the neighbours; of several, the lowest number. Distances in float32 from
    centred features.

    Args:
        features: Features of n images.
        labels: Class numbers.
        statistics: Statistics of the same features and labels, where they have been computed.
        k: Number of neighbours.

    Raises:
        UserError: Fewer than k other images, or what `FeatureStatistics.of` refuses.
    """
    found = statistics or FeatureStatistics.of(features, labels)
    rows = len(found.labels)
    if rows < 2:
        raise UserError(f"{rows} image to score; expected 2 or more, since each is compared with others")
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
def _nearest(values: Float[Array, "n d"], start: Int[Array, ""], block: int, k: int) -> Int[Array, "b k"]:
    part = jax.lax.dynamic_slice_in_dim(values, start, block)
    distances = (
        jnp.sum(values**2, 1) - 2 * part @ values.T
    )  # the row's own length is the same for all its neighbours
    itself = jnp.arange(len(values)) == (start + jnp.arange(block))[:, None]
    distances = jnp.where(itself, jnp.inf, distances)
    if k == 1:  # a sort of every row would cost more than the distances
        return jnp.argmin(distances, 1)[:, None]
    return jax.lax.top_k(-distances, k)[1]
