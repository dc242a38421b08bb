"""The Gaussian Bhattacharyya coefficient between classes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from dapt_jax.errors import UserError, nearest
from dapt_jax.transferability.inputs import FeatureStatistics, class_sums, in_double
from dapt_jax.transferability.registry import score

VARIANCE_FLOOR = 1e-4
COVARIANCES = ("diagonal", "spherical")


@score("gbc", needs="labels", higher_is_better=True, title="GBC")
@in_double
def gbc(
    features: Num[Any, "n d"],
    labels: Int[Any, " n"],
    *,
    statistics: FeatureStatistics | None = None,
    covariance: str = "diagonal",
) -> float:
    """Return the Gaussian Bhattacharyya coefficient, at most 0 (higher is better; 0 without overlap).

    - sum_{i != j} exp(-D_B), D_B = 1/8 sum (mu_i - mu_j)^2 / s + 1/2 sum ln(s / sqrt(s_i s_j)), s = (s_i +
        s_j) / 2, with
    variances of 1e-4 or more. Pandy et al., "Transferability Estimation using Bhattacharyya Class
    Separability", arXiv 2111.12780. With one variance for all d features (`spherical`) the logarithm counts d
    times, as the formula of a d-dimensional Gaussian has it; the authors' code counts it once.

    Args:
        features: Features of n images, or pixels.
        labels: Class numbers.
        statistics: Statistics of the same features and labels, where they have been computed.
        covariance: Kind of covariance, `diagonal` or `spherical`.

    Raises:
        UserError: Unknown covariance, or what `FeatureStatistics.of` refuses.
    """
    if covariance not in COVARIANCES:
        raise UserError(f"unknown covariance {covariance!r}; {nearest(covariance, COVARIANCES)}")
    found = statistics or FeatureStatistics.of(features, labels)
    deviation = found.centred - found.class_means[found.labels]
    variances = class_sums(deviation**2, found.labels, len(found.counts)) / found.counts[:, None]
    variances = np.maximum(variances, VARIANCE_FLOOR)
    if covariance == "spherical":
        variances = np.broadcast_to(variances.mean(1, keepdims=True), variances.shape)
    return float(_gbc(found.class_means, variances))


@jax.jit
def _gbc(means: Float[Array, "c d"], variances: Float[Array, "c d"]) -> Float[Array, ""]:
    def row(one: tuple[Array, Array, Array]) -> Float[Array, ""]:
        number, mean, variance = one
        middle = (variances + variance) / 2
        apart = jnp.sum((means - mean) ** 2 / middle, 1) / 8
        unlike = jnp.sum(jnp.log(middle) - (jnp.log(variances) + jnp.log(variance)) / 2, 1) / 2
        is_other = jnp.arange(len(means)) != number
        return jnp.sum(jnp.exp(-apart - unlike) * is_other)

    return -jnp.sum(jax.lax.map(row, (jnp.arange(len(means)), means, variances)))
