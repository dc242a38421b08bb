"""Scores from how far the classes lie apart: TransRate, the Bhattacharyya coefficient, and regularised Fisher analysis."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from dapt_jax.errors import UserError, nearest
from dapt_jax.transferability.inputs import Moments, class_sums, in_double

VARIANCE_FLOOR = 1e-4
COVARIANCES = ("diagonal", "spherical")


@in_double
def transrate(
    features: Num[Any, "n d"], labels: Int[Any, " n"], *, moments: Moments | None = None, eps: float = 1e-4
) -> float:
    """Coding rate of all features less that of a class, in nats (higher is better).

    R(Z) - (1/C) sum_c R(Z_c), Z centred, R(Z) = 1/2 logdet(I + Z'Z / (n eps)). Huang et al., "Frustratingly Easy
    Transferability Estimation", arXiv 2106.09362. Unchanged by rotations; grows with the features' scale.

    Args:
        features: of n images.
        labels: class numbers.
        moments: of the same, where they are there already.
        eps: distortion.

    Raises:
        UserError: the features cannot be scored (see `Moments.of`).
    """
    found = moments or Moments.of(features, labels)
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
def _rate(scaled: Any) -> Float[Array, ""]:
    """1/2 logdet(I + M) of a positive semi-definite M."""
    factor = jnp.linalg.cholesky(jnp.eye(len(scaled)) + scaled)
    return jnp.sum(jnp.log(jnp.diagonal(factor)))


@jax.jit
def _class_rates(centred: Any, rows: Any, inside: Any, scales: Any) -> Float[Array, " c"]:
    def one(arguments: Any) -> Any:
        index, is_inside, scale = arguments
        z = centred[index] * is_inside[:, None]
        # Z'Z and ZZ' have the same determinant beside the identity: the smaller one is taken.
        return _rate((z @ z.T if z.shape[0] < z.shape[1] else z.T @ z) / scale)

    return jax.lax.map(one, (rows, inside, scales))


@in_double
def gbc(
    features: Num[Any, "n d"],
    labels: Int[Any, " n"],
    *,
    moments: Moments | None = None,
    covariance: str = "diagonal",
) -> float:
    """Gaussian Bhattacharyya coefficient, at most 0 (higher is better: 0 where no two classes overlap).

    - sum_{i != j} exp(-D_B), D_B = 1/8 sum (mu_i - mu_j)^2 / s + 1/2 sum ln(s / sqrt(s_i s_j)), s = (s_i + s_j) / 2, with
    variances of 1e-4 or more. Pandy et al., "Transferability Estimation using Bhattacharyya Class Separability", arXiv
    2111.12780. With one variance for all d features (`spherical`) the logarithm counts d times, as the formula of a
    d-dimensional Gaussian has it; the authors' code counts it once.

    Args:
        features: of n images (or pixels).
        labels: class numbers.
        moments: of the same, where they are there already.
        covariance: `diagonal` or `spherical`.

    Raises:
        UserError: unknown covariance, or what `Moments.of` refuses.
    """
    if covariance not in COVARIANCES:
        raise UserError(f"unknown covariance {covariance!r}; {nearest(covariance, COVARIANCES)}")
    found = moments or Moments.of(features, labels)
    deviation = found.centred - found.class_means[found.labels]
    variances = class_sums(deviation**2, found.labels, len(found.counts)) / found.counts[:, None]
    variances = np.maximum(variances, VARIANCE_FLOOR)
    if covariance == "spherical":
        variances = np.broadcast_to(variances.mean(1, keepdims=True), variances.shape)
    return float(_gbc(found.class_means, variances))


@jax.jit
def _gbc(means: Any, variances: Any) -> Float[Array, ""]:
    def row(one: Any) -> Any:
        number, mean, variance = one
        middle = (variances + variance) / 2
        apart = jnp.sum((means - mean) ** 2 / middle, 1) / 8
        unlike = jnp.sum(jnp.log(middle) - (jnp.log(variances) + jnp.log(variance)) / 2, 1) / 2
        is_other = jnp.arange(len(means)) != number
        return jnp.sum(jnp.exp(-apart - unlike) * is_other)

    return -jnp.sum(jax.lax.map(row, (jnp.arange(len(means)), means, variances)))


@in_double
def sfda(
    features: Num[Any, "n d"],
    labels: Int[Any, " n"],
    *,
    moments: Moments | None = None,
    reference_compatible: bool = False,
) -> float:
    """Self-challenging Fisher discriminant analysis: mean log probability of the true class, at most 0 (higher is better).

    The covariance within classes is shrunk, S <- (1 - l) S + l tr(S)/d I with l = exp(-5 smax(S)); Fisher scores through a
    softmax give p(y|x); every row is then mixed with the mean of the other classes' means by its own confidence,
    x <- p_y x + (1 - p_y) m_y; the analysis is fitted again to these harder rows. Shao et al., "Not All Models Are Equal",
    arXiv 2207.03036.

    Args:
        features: of n images; left as they are.
        labels: class numbers.
        moments: of the same, where they are there already.
        reference_compatible: the mean probability instead of the mean log, as the authors' code has it.

    Raises:
        UserError: no class has two different rows, or what `Moments.of` refuses.
    """
    found = moments or Moments.of(features, labels)
    classes = len(found.counts)
    p = np.exp(_fisher(found))
    others = (found.class_means.sum(0) - found.class_means) / (classes - 1)
    own = p[np.arange(len(p)), found.labels][:, None]
    mixed = own * found.centred + (1 - own) * others[found.labels]
    log_p = _fisher(Moments(mixed, found.labels))[np.arange(len(p)), found.labels]
    return float(np.exp(log_p).mean() if reference_compatible else log_p.mean())


def _fisher(moments: Moments) -> Float[np.ndarray, "n c"]:
    """Log probability of each class by Fisher analysis with the shrunk covariance."""
    within = moments.within
    level = float(np.trace(within)) / len(within)
    if level <= 1e-20 * float(np.max(moments.features**2)):
        raise UserError("no class has two rows that differ; expected classes of several different images")
    shares = moments.counts / len(moments.labels)
    found = _log_posterior(within, level, moments.centred, moments.class_means, np.log(shares))
    return np.asarray(found)


@jax.jit
def _log_posterior(within: Any, level: Any, rows: Any, means: Any, log_shares: Any) -> Float[Array, "n c"]:
    shrinkage = jnp.maximum(jnp.exp(-5 * _largest_eigenvalue(within)), 1e-10)
    shrunk = (1 - shrinkage) * within + shrinkage * level * jnp.eye(len(within))
    coefficients = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(shrunk), means.T)
    constants = log_shares - jnp.sum(means.T * coefficients, 0) / 2
    return jax.nn.log_softmax(rows @ coefficients + constants)


def _largest_eigenvalue(matrix: Any, steps: int = 1000) -> Any:
    """By power iteration, until it changes by less than 1e-12 of itself."""

    def goes_on(carry: Any) -> Any:
        step, _, before, now = carry
        return (step < steps) & (jnp.abs(now - before) > 1e-12 * jnp.abs(now))

    def multiply(carry: Any) -> Any:
        step, vector, _, now = carry
        image = matrix @ vector
        size = jnp.linalg.norm(image)
        return step + 1, image / jnp.where(size > 0, size, 1.0), now, size

    start = jnp.cos(jnp.arange(len(matrix), dtype=matrix.dtype))  # no eigenvector of anything that features make
    start = start / jnp.linalg.norm(start)
    return jax.lax.while_loop(goes_on, multiply, (0, start, -jnp.inf * jnp.ones(()), jnp.zeros(())))[3]
