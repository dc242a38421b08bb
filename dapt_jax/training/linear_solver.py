"""Conjugate gradients for many penalised linear models at once.

Nonlinear conjugate gradients (Polak and Ribiere, 1969, with restarts) are preconditioned by the leading
eigenvectors of the features' covariance, along which the loss is steepest. Logits are linear in the weights,
so the line search, Newton's method in one dimension, needs no product with the features: an iteration has two,
one forward and one backward. All is full-batch and deterministic, in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from dapt_jax.losses import ClassificationLoss

DIRECTIONS = 32
"""Eigenvectors of the covariance that the preconditioner treats exactly."""

NEWTON = 2
"""Steps of each line search."""

LOGITS_AT_ONCE = 1 << 23
"""Bound on the number of logits that are computed at a time, which bounds memory."""

Weights = tuple[Float[Array, "problems outputs d"], Float[Array, "problems outputs"]]
"""Kernels and intercepts."""


Pair = tuple[Array, Array]
"""Weights or gradients of one problem: kernel [outputs, d] and intercept [outputs]."""

Carry = tuple[Pair, Array, Pair, Pair, Array]
"""Weights, logits, gradient, direction, and product of gradient and preconditioned gradient."""


def leading_directions(x: Float[Array, "n d"]) -> tuple[Float[Array, "k d"], Float[Array, " k"]]:
    """Return approximate leading eigenvectors and eigenvalues of the covariance, by subspace iteration."""
    number = min(DIRECTIONS, *x.shape)
    basis = jax.random.normal(jax.random.key(0), (x.shape[1], number))
    for _ in range(3):
        basis, _ = jnp.linalg.qr(x.T @ (x @ basis))
    projected = x @ basis
    values, turn = jnp.linalg.eigh(projected.T @ projected / len(x))
    return (basis @ turn).T, jnp.maximum(values, 0)


def solve(
    objective: ClassificationLoss,
    x: Float[Array, "n d"],
    labels: Shaped[Array, "n ..."],
    leading: tuple[Float[Array, "k d"], Float[Array, " k"]],
    shares: Float[Array, "parts n"],
    scaling: tuple[Float[Array, "parts d"], Float[Array, "parts d"], Float[Array, " parts"]],
    iterations: int,
    part: Int[Array, " problems"],
    strength: Float[Array, " problems"],
    start: Weights,
    judged: Float[Array, "problems n"],
) -> tuple[Weights, Float[Array, " problems"], Float[Array, " problems"]]:
    """Solve problems, each of one part and one strength.

    Returns:
        Weights of the scaled features, loss on the `judged` rows, and gradient relative to that at zero.
    """
    problem = functools.partial(_one, objective, x, labels, leading, iterations)

    def of(each: tuple[Array, Array, Weights, Array]) -> tuple[Weights, Array, Array]:
        part, strength, start, judged = each
        mean, factor, total = (values[part] for values in scaling)
        return problem(shares[part], mean, factor, strength * total, start, judged)

    at_once = max(1, LOGITS_AT_ONCE // (len(x) * objective.outputs))
    return jax.lax.map(of, (part, strength, start, judged), batch_size=min(at_once, len(part)))


def _one(
    objective: ClassificationLoss,
    x: Float[Array, "n d"],
    labels: Shaped[Array, "n ..."],
    leading: tuple[Float[Array, "k d"], Float[Array, " k"]],
    iterations: int,
    share: Float[Array, " n"],
    mean: Float[Array, " d"],
    factor: Float[Array, " d"],
    penalty: Float[Array, ""],
    start: tuple[Float[Array, "outputs d"], Float[Array, " outputs"]],
    judged: Float[Array, " n"],
) -> tuple[Pair, Array, Array]:
    """Solve one problem; many are solved at once by `jax.vmap`, under which `x` is one matrix for all."""
    directions, steepness = leading
    outputs = objective.outputs
    scale = outputs if objective.sigmoid else 1  # a loss of sigmoids is their mean
    curvature = 0.25 if objective.sigmoid else (1 - 1 / outputs) / outputs
    flattest = 1 / (curvature * steepness.min() + penalty)
    gains = 1 / (curvature * steepness + penalty) - flattest

    def forward(w: Pair) -> Float[Array, "outputs n"]:
        kernel = w[0] * factor
        return kernel @ x.T + (w[1] - kernel @ mean)[:, None]

    def residuals(logits: Array) -> Array:
        return scale * jax.grad(lambda each: (objective(each.T, labels) * share).sum())(logits)

    def gradient(w: Pair, logits: Array) -> Pair:
        residual = residuals(logits)
        total = residual.sum(1)
        return (residual @ x - total[:, None] * mean) * factor + penalty * w[0], total

    def precondition(g: Pair) -> Pair:
        return g[0] * flattest + ((g[0] @ directions.T) * gains) @ directions, g[1] / curvature

    def search(w: Pair, logits: Array, d: Pair, along: Array) -> Array:
        """Return the step to the minimum along a direction: Newton's method, kept inside a bracket."""
        slope, bend = penalty * (w[0] * d[0]).sum(), penalty * (d[0] ** 2).sum()

        def newton(_: int, bracket: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            at, low, high = bracket
            first, second = jax.jvp(lambda t: residuals(logits + t * along), (at,), (jnp.float32(1),))
            first, second = (first * along).sum() + slope + at * bend, (second * along).sum() + bend
            low, high = jnp.where(first < 0, at, low), jnp.where(first < 0, high, at)
            found, middle = at - first / second, jnp.where(jnp.isinf(high), 2 * low + 1, (low + high) / 2)
            return jnp.where((found > low) & (found < high), found, middle), low, high

        return jax.lax.fori_loop(0, NEWTON, newton, (jnp.float32(0), jnp.float32(0), jnp.float32(jnp.inf)))[0]

    def step(carry: Carry, _: None) -> tuple[Carry, None]:
        w, logits, g, d, product = carry
        along = forward(d)
        t = jnp.where(_largest(g) > 0, search(w, logits, d, along), 0.0)
        w = jax.tree.map(lambda value, way: value + t * way, w, d)
        logits = logits + t * along
        new = gradient(w, logits)
        steep = precondition(new)
        squared = _dot(new, steep)
        beta = jnp.maximum(0, squared - _dot(g, steep)) / jnp.maximum(product, 1e-30)
        d = jax.tree.map(lambda way, value: beta * way - value, d, steep)
        return (w, logits, new, d, squared), None

    zero = jax.tree.map(jnp.zeros_like, start)
    first = _largest(gradient(zero, forward(zero)))
    logits = forward(start)
    g = gradient(start, logits)
    steep = precondition(g)
    carry = (start, logits, g, jax.tree.map(jnp.negative, steep), _dot(g, steep))
    w = jax.lax.scan(step, carry, None, length=iterations)[0][0]
    logits = forward(w)
    loss = (objective(logits.T, labels) * judged).sum()
    return w, loss, _largest(gradient(w, logits)) / jnp.maximum(first, 1e-12)


def _dot(a: Pair, b: Pair) -> Float[Array, ""]:
    return (a[0] * b[0]).sum() + (a[1] * b[1]).sum()


def _largest(g: Pair) -> Float[Array, ""]:
    return jnp.maximum(jnp.abs(g[0]).max(), jnp.abs(g[1]).max())
