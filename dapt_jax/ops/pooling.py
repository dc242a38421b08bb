"""Max-pooling."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dapt_jax.ops import choice
from dapt_jax.ops.shapes import Padding, Pairs, outputs, pad, pairs, taps


def max_pool(
    x: Float[Array, "b h w c"], size: int, stride: int, padding: Padding = "VALID"
) -> Float[Array, "b h2 w2 c"]:
    """Compute the maximum over square windows; padding counts as minus infinity.

    Args:
        x: Images.
        size: Side of the window.
        stride: Stride along both axes.
        padding: "SAME", "VALID", or pixels ((top, bottom), (left, right)).

    Returns:
        The maxima in the dtype of `x`. Where several pixels of a window tie, both formulations send the
        gradient to the first of them.
    """
    pads = pairs(padding, (size, size), x.shape[1:3], stride)
    if choice.current() == "cpu":
        return _shifted(size, stride, pads, x)
    return lax.reduce_window(
        x, -jnp.inf, lax.max, (1, size, size, 1), (1, stride, stride, 1), ((0, 0), *pads, (0, 0))
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _shifted(size: int, stride: int, pads: Pairs, x: jax.Array) -> jax.Array:
    """Return the elementwise maximum of the shifted images, one per position in the window."""
    out = outputs(x.shape[1:3], (size, size), pads, stride)
    return functools.reduce(jnp.maximum, taps(pad(x, pads, -jnp.inf), (size, size), out, stride))


def _forward(
    size: int, stride: int, pads: Pairs, x: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = _shifted(size, stride, pads, x)
    return y, (x, y)


def _backward(
    size: int, stride: int, pads: Pairs, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array]:
    """Send each window's gradient to the first pixel that equals its maximum."""
    x, y = saved
    padded = pad(x, pads, -jnp.inf)
    (top, bottom), (left, right) = pads
    high, wide = padded.shape[1:3]
    is_free = jnp.ones(y.shape, bool)
    total = jnp.zeros((), g.dtype)
    for index, part in enumerate(taps(padded, (size, size), y.shape[1:3], stride)):
        row, column = divmod(index, size)
        is_first = is_free & (part == y)
        is_free &= ~is_first
        # lax.pad with interior zeros puts the gradient of window n at pixel stride * n + row.
        rows = (row, high - row - stride * (y.shape[1] - 1) - 1, stride - 1)
        columns = (column, wide - column - stride * (y.shape[2] - 1) - 1, stride - 1)
        total = total + lax.pad(
            jnp.where(is_first, g, 0), jnp.zeros((), g.dtype), ((0, 0, 0), rows, columns, (0, 0, 0))
        )
    return (total[:, top : high - bottom, left : wide - right],)


_shifted.defvjp(_forward, _backward)
