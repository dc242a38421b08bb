"""3x3 convolution at stride 1 by Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray, arXiv 1509.09308).

A tile of 2x2 output pixels takes 16 multiplications per pair of channels instead of 36. The rest is 16
matrix products over channels, one per point of a transformed 4x4 tile, and sums of few pixels before and
after. The gradients are the transposes of these steps and save as much. The transforms contain only 0, 1/2
and 1, so the error in float32 equals that of the direct sum (larger tiles would save more, at ten times the
error, and were slower).
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dapt_jax.ops.shapes import DIMENSIONS, Pairs, outputs, pad

# B^T, G and A^T of the paper's section 4.1.
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])

FEWEST_CHANNELS = 32
LEAST_WORK = 10**7
"""Minimum FLOPs per image. The transforms triple compile time, which small images would not repay."""
ENOUGH_CHANNELS = 128
"""Minimum channels for which the kernel's gradient is faster by these products than by `lax`."""
MANY_CHANNELS = 256
"""Minimum channels for which the images' gradient is faster by the transposed steps than as a convolution
with the rotated kernel, whose transform would dominate."""

Grid = Sequence[Sequence[jax.Array]]
Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def suits(pads: Pairs, x: jax.Array, kernel: jax.Array) -> bool:
    """Return whether a 3x3 convolution at stride 1 gains from the transforms, whatever the batch size.

    Lower precision is excluded: its rounding errors would add to those of the transforms.
    """
    inputs, channels = kernel.shape[2:]
    work = 18 * math.prod(outputs(x.shape[1:3], (3, 3), pads, 1)) * inputs * channels
    is_wide = min(inputs, channels) >= FEWEST_CHANNELS and max(map(max, pads)) <= 2
    return x.dtype == jnp.float32 and is_wide and work >= LEAST_WORK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def winograd(pads: Pairs, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve images with a 3x3 kernel at stride 1.

    Args:
        pads: Pixels ((top, bottom), (left, right)), 0 to 2.
        x: Images (b, h, w, c), float32.
        kernel: Kernel (3, 3, c, o).

    Returns:
        Array (b, h2, w2, o).
    """
    return _forward(pads, x, kernel)[0]


def _forward(pads: Pairs, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Saved]:
    batch, channels = x.shape[0], kernel.shape[-1]
    high, wide = outputs(x.shape[1:3], (3, 3), pads, 1)
    rows, columns = -(-high // 2), -(-wide // 2)
    (top, bottom), (left, right) = pads
    padded = pad(x, ((top, bottom + 2 * rows - high), (left, right + 2 * columns - wide)))
    pixels = [
        [padded[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] for j in range(4)] for i in range(4)
    ]
    # Without the barrier, a transform would be recomputed for each of its readers.
    tiles, points = lax.optimization_barrier(
        (_stack(_transform(_INPUT, pixels)).reshape(16, -1, x.shape[-1]), _stack(_transform(_KERNEL, kernel)))
    )
    products = lax.dot_general(tiles, points, (((2,), (1,)), ((0,), (0,))))
    y = _interleave(_transform(_OUTPUT, products.reshape(4, 4, batch, rows, columns, channels)))
    return y[:, :high, :wide], (x, kernel, tiles, points)


def _backward(pads: Pairs, saved: Saved, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, tiles, points = saved
    inputs, channels = kernel.shape[2:]
    batch, high, wide = g.shape[:3]
    rows, columns = -(-high // 2), -(-wide // 2)
    padded = pad(g, ((0, 2 * rows - high), (0, 2 * columns - wide)))
    pixels = [[padded[:, i::2, j::2] for j in range(2)] for i in range(2)]
    d_products = lax.optimization_barrier(_stack(_transform(_OUTPUT.T, pixels)).reshape(16, -1, channels))
    if min(inputs, channels) < MANY_CHANNELS:
        (top, bottom), (left, right) = pads
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        dx = _forward(((2 - top, 2 - bottom), (2 - left, 2 - right)), g, turned)[0]
    else:
        d_tiles = lax.dot_general(d_products, points, (((2,), (2,)), ((0,), (0,))))
        d_pixels = _transform(_INPUT.T, d_tiles.reshape(4, 4, batch, rows, columns, inputs))
        met = [[_overlap(d_pixels[i][j], d_pixels[i + 2][j], 1) for j in range(4)] for i in range(2)]
        full = _interleave([[_overlap(row[j], row[j + 2], 2) for j in range(2)] for row in met])
        dx = full[:, pads[0][0] :, pads[1][0] :][:, : x.shape[1], : x.shape[2]]
    if min(inputs, channels) < ENOUGH_CHANNELS:
        direct = functools.partial(
            lax.conv_general_dilated, window_strides=(1, 1), padding=pads, dimension_numbers=DIMENSIONS
        )
        d_kernel = jax.vjp(lambda kernel: direct(x, kernel), kernel)[1](g)[0]
    else:
        d_points = lax.dot_general(tiles, d_products, (((1,), (1,)), ((0,), (0,))))
        d_kernel = _stack(_transform(_KERNEL.T, d_points.reshape(4, 4, inputs, channels))).reshape(
            kernel.shape
        )
    return dx, d_kernel


winograd.defvjp(_forward, _backward)


def _transform(matrix: np.ndarray, grid: Grid | jax.Array) -> list[list[jax.Array]]:
    """Compute `matrix @ grid @ matrix.T` for a grid of arrays."""
    tall = [_combine(matrix, [row[j] for row in grid]) for j in range(matrix.shape[1])]
    return [_combine(matrix, [column[i] for column in tall]) for i in range(len(matrix))]


def _combine(matrix: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """Compute `matrix @ parts` for a sequence of arrays."""
    return [
        functools.reduce(jnp.add, [part * np.float32(w) for w, part in zip(row, parts, strict=True) if w])
        for row in matrix
    ]


def _stack(grid: Grid) -> jax.Array:
    return jnp.stack([part for row in grid for part in row])


def _interleave(grid: Grid) -> jax.Array:
    """Interleave a 2x2 grid of arrays (b, h, w, c) into one (b, 2h, 2w, c)."""
    both = jnp.stack([jnp.stack(list(row), 3) for row in grid], 2)
    batch, rows, _, columns, _, channels = both.shape
    return both.reshape(batch, 2 * rows, 2 * columns, channels)


def _overlap(first: jax.Array, second: jax.Array, axis: int) -> jax.Array:
    """Sum neighbouring tiles where they overlap.

    The first half of each tile is added to the second half of the one before.
    """
    before, behind = [(0, 0)] * first.ndim, [(0, 0)] * first.ndim
    behind[axis], before[axis] = (0, 1), (1, 0)
    return jnp.pad(first, behind) + jnp.pad(second, before)
