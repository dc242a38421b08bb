"""Padding and windows, shared by convolution and pooling."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
"""Dimension numbers of images, kernels and outputs, in the notation of `lax`."""
Pairs = tuple[tuple[int, int], tuple[int, int]]
"""Pixels to add ((top, bottom), (left, right))."""
Padding = str | Sequence[tuple[int, int]]


def pairs(padding: Padding, size: Sequence[int], side: Sequence[int], stride: int) -> Pairs:
    """Return the pixels to add before and after, per spatial axis.

    Args:
        padding: "SAME", "VALID" or the pairs themselves.
        size: Height and width of the window.
        side: Height and width of the input.
        stride: Stride of the window.
    """
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(tuple(side), tuple(size), (stride, stride), padding)
    (top, bottom), (left, right) = padding
    return (int(top), int(bottom)), (int(left), int(right))


def outputs(side: Sequence[int], size: Sequence[int], pads: Pairs, stride: int) -> tuple[int, int]:
    """Return the number of windows that fit along the two axes."""
    high, wide = ((n + sum(p) - k) // stride + 1 for n, k, p in zip(side, size, pads, strict=True))
    return high, wide


def pad(x: jax.Array, pads: Pairs, value: float = 0.0) -> jax.Array:
    """Add a constant border to images (b, h, w, c)."""
    return jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=value) if any(map(any, pads)) else x


def taps(x: jax.Array, size: Sequence[int], out: Sequence[int], stride: int) -> Iterator[jax.Array]:
    """Yield, for each position in a window, row by row, the pixels of all windows there: (b, *out, c).

    Args:
        x: Padded images (b, h, w, c).
        size: Height and width of the window.
        out: Number of windows along the two axes.
        stride: Stride of the window.
    """
    high, wide = (stride * (n - 1) + 1 for n in out)
    for row in range(size[0]):
        for column in range(size[1]):
            yield x[:, row : row + high : stride, column : column + wide : stride]
