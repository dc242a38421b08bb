"""LogME: the evidence of a linear model of the labels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from dapt_jax.errors import UserError
from dapt_jax.transferability.inputs import FeatureStatistics, class_sums, eigh, in_double
from dapt_jax.transferability.registry import score

# Added to both denominators of the updates, as the authors do: a perfect fit has no finite precision.
EPSILON = 1e-5


@score("logme", needs="labels", higher_is_better=True, title="LogME")
@in_double
def logme(
    features: Num[Any, "n d"],
    labels: Int[Any, " n"],
    *,
    statistics: FeatureStatistics | None = None,
    steps: int = 11,
    tolerance: float = 1e-3,
) -> float:
    """Return the log maximum evidence per image of a Bayesian linear model (higher is better).

    It is the mean over one-versus-rest labels.

    For each class with y in {0, 1}, y ~ N(F w, I/b), w ~ N(0, I/a): with the eigenvalues s of F'F (all d of
    them, those that are 0 too, so that the ln a terms balance), g = sum s / (s + a/b), a = g / |m|^2, b = (n
    - g) / |y - F m|^2, and

        (1/n) [d/2 ln a + n/2 ln b - 1/2 sum ln(a + b s) - b/2 |y - F m|^2 - a/2 |m|^2 - n/2 ln 2 pi]

    You et al., "LogME: Practical Assessment of Pre-trained Models for Transfer Learning", arXiv 2102.11005.

    Args:
        features: Features of n images, not centred.
        labels: Class numbers.
        statistics: Statistics of the same features and labels, where they have been computed.
        steps: Largest number of steps of the fixed-point iteration.
        tolerance: Relative change of a/b that ends it.

    Raises:
        UserError: The features cannot be scored (see `FeatureStatistics.of`), or all are 0.
    """
    found = statistics or FeatureStatistics.of(features, labels)
    rows = len(found.labels)
    raw = found.scatter + rows * np.outer(found.mean, found.mean)
    if not np.trace(raw):
        raise UserError(f"the features of all {rows} images are 0; expected some that are not")
    values, vectors = eigh(raw)
    sums = class_sums(found.features, found.labels, len(found.counts))
    # Along directions without variance the labels have no part; dividing by a rounding error would invent
    # one.
    real = values > values[-1] * len(values) * np.finfo(float).eps
    parts = np.where(real, (sums @ vectors) / np.sqrt(np.where(real, values, 1.0)), 0.0) ** 2
    values = np.where(real, values, 0.0)
    return float(np.mean(_evidence(values, parts, found.counts.astype(float), float(rows), steps, tolerance)))


@functools.partial(jax.jit, static_argnums=4)
def _evidence(
    values: Float[Array, " d"],
    parts: Float[Array, "c d"],
    totals: Float[Array, " c"],
    rows: Float[Array, ""],
    steps: int,
    tolerance: Float[Array, ""],
) -> Float[Array, " c"]:
    """Return the evidence per image of each class; `parts` [c, d]: squared left singular projections."""

    def one(part: Float[Array, " d"], total: Float[Array, ""]) -> Float[Array, ""]:
        left = jnp.maximum(total - part.sum(), 0.0)

        def update(
            carry: tuple[Any, Array, Array, Array, Array, Array],
        ) -> tuple[Any, Array, Array, Array, Array, Array]:
            step, a, b, *_ = carry
            ratio = a / b
            g = jnp.sum(values / (values + ratio))
            weights = jnp.sum(values * part / (values + ratio) ** 2)
            residual = jnp.sum(part * (ratio / (values + ratio)) ** 2) + left
            new_a, new_b = g / (weights + EPSILON), (rows - g) / (residual + EPSILON)
            change = jnp.abs(new_a / new_b - ratio) / ratio
            return step + 1, new_a, new_b, weights, residual, change

        def goes_on(carry: tuple[Any, Array, Array, Array, Array, Array]) -> Array:
            return (carry[0] < steps) & (carry[-1] > tolerance)

        start = (0, jnp.float64(1), jnp.float64(1), jnp.float64(0), jnp.float64(0), jnp.float64(jnp.inf))
        _, a, b, weights, residual, _ = jax.lax.while_loop(goes_on, update, start)
        logs = len(values) * jnp.log(a) + rows * jnp.log(b) - jnp.sum(jnp.log(a + b * values))
        return (logs - b * residual - a * weights - rows * jnp.log(2 * jnp.pi)) / (2 * rows)

    return jax.vmap(one)(parts, totals)
