"""Batch norm with the statistics of the batch, and layer norm, with their gradients in closed form."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Moments = tuple[jax.Array, jax.Array, jax.Array]

_groups: contextvars.ContextVar[int] = contextvars.ContextVar("batch_norm_groups", default=1)


@contextlib.contextmanager
def batch_norm_groups(number: int) -> Iterator[None]:
    """Split every batch that is normalised inside the block into groups with separate statistics.

    The groups are equal, consecutive runs of examples. With one group per device, each device uses the
    statistics of its local examples and need not wait for other devices; Hoffer et al., arXiv 1705.08741,
    call it ghost batch norm. Takes effect at trace time.
    """
    token = _groups.set(number)
    try:
        yield
    finally:
        _groups.reset(token)


def current_groups() -> int:
    """Return the number of groups that a batch norm traced now uses."""
    return _groups.get()


def batch_norm(
    x: Float[Array, "b h w c"], scale: Float[Array, " c"], bias: Float[Array, " c"], eps: float
) -> tuple[Float[Array, "b h w c"], Float[Array, " c"], Float[Array, " c"]]:
    """Normalise each channel by its mean and variance over the batch (Ioffe & Szegedy, arXiv 1502.03167).

    The gradient is the closed form of the paper's section 3, one pass for the two sums and one for the input,
    instead of the step-by-step result of automatic differentiation.

    Args:
        x: Activations.
        scale: Scale per channel, float32.
        bias: Bias per channel, float32.
        eps: Constant added to the variance.

    Returns:
        The output in the dtype of `x`, and the float32 mean and unbiased variance, which the frameworks that
        weights come from store as running averages; no gradient flows through them.
    """
    groups = current_groups()
    if groups == 1:
        y, mean, var = _normalise(eps, x, scale, bias)
    else:
        apart = jax.vmap(functools.partial(_normalise, eps), (0, None, None))
        ys, means, variances = apart(x.reshape(groups, -1, *x.shape[1:]), scale, bias)
        y, mean, var = ys.reshape(x.shape), means.mean(0), variances.mean(0)
    count = x.size // x.shape[-1] // groups
    return y, lax.stop_gradient(mean), lax.stop_gradient(var * (count / max(count - 1, 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalise(eps: float, x: jax.Array, scale: jax.Array, bias: jax.Array) -> Moments:
    wide = x.astype(jnp.float32)
    mean = wide.mean((0, 1, 2))
    # Two passes: the difference of E[x^2] and E[x]^2 loses precision where the mean is large.
    var = jnp.square(wide - mean).mean((0, 1, 2))
    factor = scale * lax.rsqrt(var + eps)
    return (wide * factor + (bias - mean * factor)).astype(x.dtype), mean, var


def _forward(
    eps: float, x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[Moments, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    y, mean, var = _normalise(eps, x, scale, bias)
    return (y, mean, var), (x, scale, mean, var)


def _backward(
    eps: float, saved: tuple[jax.Array, jax.Array, jax.Array, jax.Array], cotangents: Moments
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale, mean, var = saved
    g = cotangents[0].astype(jnp.float32)
    inverse = lax.rsqrt(var + eps)
    normal = (x.astype(jnp.float32) - mean) * inverse
    d_bias = g.sum((0, 1, 2))
    d_scale = (g * normal).sum((0, 1, 2))
    count = x.size // x.shape[-1]
    dx = scale * inverse * (g - (d_bias + normal * d_scale) / count)
    return dx.astype(x.dtype), d_scale, d_bias


_normalise.defvjp(_forward, _backward)


def layer_norm(
    x: Float[Array, "*b c"], scale: Float[Array, " c"], bias: Float[Array, " c"], eps: float
) -> Float[Array, "*b c"]:
    """Normalise the last axis by its mean and variance (Ba et al., arXiv 1607.06450), computed in float32.

    The gradient is the closed form: automatic differentiation writes out about twice as many loops, which XLA:CPU
    compiles and runs one by one, and stores what follows from the input.

    Args:
        x: Activations.
        scale: Scale per channel, float32.
        bias: Bias per channel, float32.
        eps: Constant added to the variance.

    Returns:
        The output in the dtype of `x`.
    """
    return _layer_norm(eps, x, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer_norm(eps: float, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    normal, _ = _normal(eps, x)
    return (normal * scale + bias).astype(x.dtype)


def _normal(eps: float, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the normalised input, and the factor of every row, in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    factor = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return centred * factor, factor


def _layer_norm_forward(
    eps: float, x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _layer_norm(eps, x, scale, bias), (x, scale)


def _layer_norm_backward(
    eps: float, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale = saved
    g = cotangent.astype(jnp.float32)
    normal, factor = _normal(eps, x)
    rows = tuple(range(x.ndim - 1))
    of_normal = g * scale
    along = (of_normal * normal).mean(-1, keepdims=True)
    dx = factor * (of_normal - of_normal.mean(-1, keepdims=True) - normal * along)
    return dx.astype(x.dtype), (g * normal).sum(rows), g.sum(rows)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
