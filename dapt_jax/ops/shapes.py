"""Padding and windows, as convolution and pooling share them."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
"""Of images, kernels and outputs, as `lax` names them."""
Pairs = tuple[tuple[int, int], tuple[int, int]]
"""Pixels to add ((top, bottom), (left, right))."""
Padding = str | Sequence[tuple[int, int]]


def pairs(padding: Padding, size: Sequence[int], side: Sequence[int], stride: int) -> Pairs:
    """Pixels to add before and behind, per spatial axis.

    Args:
        padding: "SAME", "VALID" or the pairs themselves.
        size: height and width of the window.
        side: height and width of the input.
        stride: of the window.
    """
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(tuple(side), tuple(size), (stride, stride), padding)
    (top, bottom), (left, right) = padding
    return (int(top), int(bottom)), (int(left), int(right))


def outputs(side: Sequence[int], size: Sequence[int], pads: Pairs, stride: int) -> tuple[int, int]:
    """How many windows fit along the two axes."""
    high, wide = ((n + sum(p) - k) // stride + 1 for n, k, p in zip(side, size, pads, strict=True))
    return high, wide


def pad(x: jax.Array, pads: Pairs, value: float = 0.0) -> jax.Array:
    """Adds a constant border to images (b, h, w, c)."""
    return jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=value) if any(map(any, pads)) else x


def taps(x: jax.Array, size: Sequence[int], out: Sequence[int], stride: int) -> Iterator[jax.Array]:
    """For each position in a window, row by row, the pixels that all windows have there: (b, *out, c).

    Args:
        x: padded images (b, h, w, c).
        size: height and width of the window.
        out: how many windows there are along the two axes.
        stride: of the window.
    """
    high, wide = (stride * (n - 1) + 1 for n in out)
    for row in range(size[0]):
        for column in range(size[1]):
            yield x[:, row : row + high : stride, column : column + wide : stride]
