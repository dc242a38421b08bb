"""Scores from least squares on the labels: the evidence of a linear model, and how much of the labels features explain."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from dapt_jax.errors import UserError
from dapt_jax.transferability.inputs import Moments, class_sums, eigh, in_double

# Added to both denominators of LogME's updates, as its authors do: a perfect fit has no finite precision.
EPSILON = 1e-5


@in_double
def logme(
    features: Num[Any, "n d"],
    labels: Int[Any, " n"],
    *,
    moments: Moments | None = None,
    steps: int = 11,
    tolerance: float = 1e-3,
) -> float:
    """Log maximum evidence per image of a Bayesian linear model, mean over one-versus-rest labels (higher is better).

    For each class with y in {0, 1}, y ~ N(F w, I/b), w ~ N(0, I/a): with the eigenvalues s of F'F (all d of them, those
    that are 0 too, so that the ln a terms balance), g = sum s / (s + a/b), a = g / |m|^2, b = (n - g) / |y - F m|^2, and

        (1/n) [d/2 ln a + n/2 ln b - 1/2 sum ln(a + b s) - b/2 |y - F m|^2 - a/2 |m|^2 - n/2 ln 2 pi]

    You et al., "LogME: Practical Assessment of Pre-trained Models for Transfer Learning", arXiv 2102.11005.

    Args:
        features: of n images; not centred.
        labels: class numbers.
        moments: of the same features and labels, where they are there already.
        steps: of the fixed point, at most.
        tolerance: relative change of a/b that ends it.

    Raises:
        UserError: the features cannot be scored (see `Moments.of`), or all are 0.
    """
    found = moments or Moments.of(features, labels)
    rows = len(found.labels)
    raw = found.scatter + rows * np.outer(found.mean, found.mean)
    if not np.trace(raw):
        raise UserError(f"the features of all {rows} images are 0; expected some that are not")
    values, vectors = eigh(raw)
    sums = class_sums(found.features, found.labels, len(found.counts))
    # Along directions without variance the labels have no part; dividing by a rounding error would invent one.
    real = values > values[-1] * len(values) * np.finfo(float).eps
    parts = np.where(real, (sums @ vectors) / np.sqrt(np.where(real, values, 1.0)), 0.0) ** 2
    values = np.where(real, values, 0.0)
    return float(np.mean(_evidence(values, parts, found.counts.astype(float), float(rows), steps, tolerance)))


@functools.partial(jax.jit, static_argnums=4)
def _evidence(values: Any, parts: Any, totals: Any, rows: Any, steps: int, tolerance: Any) -> Float[Array, " c"]:
    """Evidence per image of each class; `parts` [c, d] are squared projections of a label on the left singular vectors."""

    def one(part: Any, total: Any) -> Any:
        left = jnp.maximum(total - part.sum(), 0.0)

        def update(carry: Any) -> Any:
            step, a, b, *_ = carry
            ratio = a / b
            g = jnp.sum(values / (values + ratio))
            weights = jnp.sum(values * part / (values + ratio) ** 2)
            residual = jnp.sum(part * (ratio / (values + ratio)) ** 2) + left
            new_a, new_b = g / (weights + EPSILON), (rows - g) / (residual + EPSILON)
            change = jnp.abs(new_a / new_b - ratio) / ratio
            return step + 1, new_a, new_b, weights, residual, change

        def goes_on(carry: Any) -> Any:
            return (carry[0] < steps) & (carry[-1] > tolerance)

        start = (0, jnp.float64(1), jnp.float64(1), jnp.float64(0), jnp.float64(0), jnp.float64(jnp.inf))
        _, a, b, weights, residual, _ = jax.lax.while_loop(goes_on, update, start)
        logs = len(values) * jnp.log(a) + rows * jnp.log(b) - jnp.sum(jnp.log(a + b * values))
        return (logs - b * residual - a * weights - rows * jnp.log(2 * jnp.pi)) / (2 * rows)

    return jax.vmap(one)(parts, totals)


def h_score(features: Num[Any, "n d"], labels: Int[Any, " n"], *, moments: Moments | None = None) -> float:
    """Trace of pinv(cov F) cov(E[F|y]), 0 to classes - 1 (higher is better).

    Both covariances are divided by n; directions without variance count for nothing. Bao et al., "An Information-Theoretic
    Approach to Transferability in Task Transfer Learning", ICIP 2019.

    Args:
        features: of n images.
        labels: class numbers.
        moments: of the same, where they are there already.

    Raises:
        UserError: the features cannot be scored (see `Moments.of`).
    """
    found = moments or Moments.of(features, labels)
    if not found.spread:
        return 0.0
    values, vectors = found.spectrum
    real = values > values[-1] * len(values) * np.finfo(float).eps
    along = (found.class_means @ vectors[:, real]) ** 2 / values[real]
    return float(found.counts @ along.sum(1))


@in_double
def regularised_h_score(features: Num[Any, "n d"], labels: Int[Any, " n"], *, moments: Moments | None = None) -> float:
    """H-score with a shrunk covariance: tr(inv(S_a) (1 - a) cov(E[F|y])), S_a = (1 - a) S + a tr(S)/d I.

    a is Ledoit and Wolf's. Ibrahim et al., "Newer is not always better", arXiv 2110.06893.

    Args:
        features: of n images.
        labels: class numbers.
        moments: of the same, where they are there already.

    Raises:
        UserError: the features cannot be scored (see `Moments.of`).
    """
    found = moments or Moments.of(features, labels)
    if not found.spread:
        return 0.0
    rows, size = found.features.shape
    covariance = found.scatter / rows
    level = np.trace(covariance) / size
    squares = np.sum(covariance**2)
    noise = (np.sum(np.sum(found.centred**2, 1) ** 2) / rows - squares) / rows
    a = float(np.clip(noise / (squares - size * level**2), 0.0, 1.0)) if squares > size * level**2 else 0.0
    shrunk = (1 - a) * covariance + a * level * np.eye(size)
    if not a:
        return h_score(features, labels, moments=found)
    solved = np.asarray(_solve(shrunk, found.class_means.T))
    return float((1 - a) * np.sum(found.counts * np.sum(found.class_means.T * solved, 0)) / rows)


@jax.jit
def _solve(matrix: Any, right: Any) -> Any:
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), right)
