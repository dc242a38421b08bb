"""Self-challenging Fisher discriminant analysis."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from dapt_jax.errors import UserError
from dapt_jax.transferability.inputs import FeatureStatistics, in_double
from dapt_jax.transferability.registry import score


@score("sfda", needs="labels", higher_is_better=True, title="SFDA")
@in_double
def sfda(
    features: Num[Any, "n d"],
    labels: Int[Any, " n"],
    *,
    statistics: FeatureStatistics | None = None,
    reference_compatible: bool = False,
) -> float:
    """Return the mean log probability of the true class by Fisher analysis, at most 0 (higher is better).

    Self-challenging Fisher discriminant analysis (SFDA).

    The covariance within classes is shrunk, S <- (1 - l) S + l tr(S)/d I with l = exp(-5 smax(S)); Fisher
    scores through a softmax give p(y|x); every row is then mixed with the mean of the other classes' means by
    its own confidence, x <- p_y x + (1 - p_y) m_y; the analysis is fitted again to these harder rows. Shao et
    al., "Not All Models Are Equal", arXiv 2207.03036.

    Args:
        features: Features of n images.
        labels: Class numbers.
        statistics: Statistics of the same features and labels, where they have been computed.
        reference_compatible: Return the mean probability instead of the mean log, as the authors' code has
            it.

    Raises:
        UserError: No class has two different rows, or what `FeatureStatistics.of` refuses.
    """
    found = statistics or FeatureStatistics.of(features, labels)
    classes = len(found.counts)
    p = np.exp(_fisher(found))
    others = (found.class_means.sum(0) - found.class_means) / (classes - 1)
    own = p[np.arange(len(p)), found.labels][:, None]
    mixed = own * found.centred + (1 - own) * others[found.labels]
    log_p = _fisher(FeatureStatistics(mixed, found.labels))[np.arange(len(p)), found.labels]
    return float(np.exp(log_p).mean() if reference_compatible else log_p.mean())


def _fisher(statistics: FeatureStatistics) -> Float[np.ndarray, "n c"]:
    """Return the log probability of each class by Fisher analysis with the shrunk covariance."""
    within = statistics.within
    level = float(np.trace(within)) / len(within)
    if level <= 1e-20 * float(np.max(statistics.features**2)):
        raise UserError("no class has two rows that differ; expected classes of several different images")
    shares = statistics.counts / len(statistics.labels)
    found = _log_posterior(within, level, statistics.centred, statistics.class_means, np.log(shares))
    return np.asarray(found)


@jax.jit
def _log_posterior(
    within: Float[Array, "d d"],
    level: Float[Array, ""],
    rows: Float[Array, "n d"],
    means: Float[Array, "c d"],
    log_shares: Float[Array, " c"],
) -> Float[Array, "n c"]:
    shrinkage = jnp.maximum(jnp.exp(-5 * _largest_eigenvalue(within)), 1e-10)
    shrunk = (1 - shrinkage) * within + shrinkage * level * jnp.eye(len(within))
    coefficients = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(shrunk), means.T)
    constants = log_shares - jnp.sum(means.T * coefficients, 0) / 2
    return jax.nn.log_softmax(rows @ coefficients + constants)


def _largest_eigenvalue(matrix: Float[Array, "d d"], steps: int = 1000) -> Float[Array, ""]:
    """Return the largest eigenvalue by power iteration, until it changes by less than 1e-12 of itself."""

    def goes_on(carry: tuple[Any, Array, Array, Array]) -> Array:
        step, _, before, now = carry
        return (step < steps) & (jnp.abs(now - before) > 1e-12 * jnp.abs(now))

    def multiply(carry: tuple[Any, Array, Array, Array]) -> tuple[Any, Array, Array, Array]:
        step, vector, _, now = carry
        image = matrix @ vector
        size = jnp.linalg.norm(image)
        return step + 1, image / jnp.where(size > 0, size, 1.0), now, size

    start = jnp.cos(
        jnp.arange(len(matrix), dtype=matrix.dtype)
    )  # no eigenvector of anything that features make
    start = start / jnp.linalg.norm(start)
    return jax.lax.while_loop(goes_on, multiply, (0, start, -jnp.inf * jnp.ones(()), jnp.zeros(())))[3]
