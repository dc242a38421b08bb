"""TransRate: coding rate of all features less that of a class."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from dapt_jax.transferability.inputs import FeatureStatistics, in_double
from dapt_jax.transferability.registry import score


@score("transrate", needs="labels", higher_is_better=True, title="TransRate")
@in_double
def transrate(
    features: Num[Any, "n d"],
    labels: Int[Any, " n"],
    *,
    statistics: FeatureStatistics | None = None,
    eps: float = 1e-4,
) -> float:
    """Return the coding rate of all features less that of a class, in nats (higher is better).

    R(Z) - (1/C) sum_c R(Z_c), Z centred, R(Z) = 1/2 logdet(I + Z'Z / (n eps)). Huang et al., "Frustratingly
    Easy Transferability Estimation", arXiv 2106.09362. Unchanged by rotations; grows with the features'
    scale.

    Args:
        features: Features of n images.
        labels: Class numbers.
        statistics: Statistics of the same features and labels, where they have been computed.
        eps: Distortion.

    Raises:
        UserError: The features cannot be scored (see `FeatureStatistics.of`).
    """
    found = statistics or FeatureStatistics.of(features, labels)
    whole = _rate(found.scatter / (len(found.labels) * eps))
    most, order = int(found.counts.max()), np.argsort(found.labels, kind="stable")
    starts = np.cumsum(found.counts) - found.counts
    # Rows beyond a class's own are zeros, which leave its determinant alone.
    index = starts[:, None] + np.arange(most)
    inside = np.arange(most) < found.counts[:, None]
    rows = order[np.minimum(index, len(order) - 1)]
    parts = _class_rates(found.centred, rows, inside, found.counts * eps)
    return float(whole - parts.mean())


@jax.jit
def _rate(scaled: Float[Array, "d d"]) -> Float[Array, ""]:
    """Return 1/2 logdet(I + M) of a positive semi-definite M."""
    factor = jnp.linalg.cholesky(jnp.eye(len(scaled)) + scaled)
    return jnp.sum(jnp.log(jnp.diagonal(factor)))


@jax.jit
def _class_rates(
    centred: Float[Array, "n d"],
    rows: Int[Array, "c most"],
    inside: Bool[Array, "c most"],
    scales: Float[Array, " c"],
) -> Float[Array, " c"]:
    def one(arguments: tuple[Array, Array, Array]) -> Float[Array, ""]:
        index, is_inside, scale = arguments
        z = centred[index] * is_inside[:, None]
        # Z'Z and ZZ' have the same determinant beside the identity: the smaller one is taken.
        return _rate((z @ z.T if z.shape[0] < z.shape[1] else z.T @ z) / scale)

    return jax.lax.map(one, (rows, inside, scales))
