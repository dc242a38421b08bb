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

from dapt_jax.ops.direct import kernel_gradient
from dapt_jax.ops.shapes import Pairs, outputs, pad

# B^T, G and A^T of the paper's section 4.1.
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
_POINTS = np.kron(_KERNEL, _KERNEL)
"""G k G^T as one matrix on the 9 taps of a kernel k: as sums of parts it took 30 loops, and compiling each of them."""

FEWEST_CHANNELS = 32
LEAST_WORK = 10**7
"""Minimum FLOPs per image. Compiling the transforms takes time, which small images would not repay."""
SMALLEST_SIDE = 6
"""Minimum side of the output. The tiles of 3 or 5 pixels cover 4 or 6, so that they save little; and loops over few
tiles are unrolled: those of 3 pixels take ten times as long to compile as the direct sum, and longer to run."""
ENOUGH_CHANNELS = 128
"""Minimum channels for which the kernel's gradient is faster by these products than by `lax`."""
MANY_CHANNELS = 256
"""Minimum channels for which the images' gradient is faster by the transposed steps than as a convolution
with the rotated kernel, whose transform would dominate."""

Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def suits(pads: Pairs, x: jax.Array, kernel: jax.Array) -> bool:
    """Return whether a 3x3 convolution at stride 1 gains from the transforms, whatever the batch size.

    Lower precision is excluded: its rounding errors would add to those of the transforms.
    """
    inputs, channels = kernel.shape[2:]
    sides = outputs(x.shape[1:3], (3, 3), pads, 1)
    work = 18 * math.prod(sides) * inputs * channels
    is_wide = min(inputs, channels) >= FEWEST_CHANNELS and max(map(max, pads)) <= 2
    return x.dtype == jnp.float32 and is_wide and min(sides) >= SMALLEST_SIDE and work >= LEAST_WORK


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
    # Without the barrier, a transform would be recomputed for each of its readers.
    tiles, points = lax.optimization_barrier(
        (_tiles(_INPUT, padded, rows, columns), _of_kernel(_POINTS, kernel, 2))
    )
    products = lax.dot_general(tiles, points, (((2,), (1,)), ((0,), (0,))))
    across = _combine(_OUTPUT, products.reshape(4, 4, batch, rows, columns, channels).swapaxes(0, 1))
    y = _interleave(_combine(_OUTPUT, lax.optimization_barrier(_interleave(across, 3))), 1)
    return y[:, :high, :wide], (x, kernel, tiles, points)


def _backward(pads: Pairs, saved: Saved, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, tiles, points = saved
    inputs, channels = kernel.shape[2:]
    batch, high, wide = g.shape[:3]
    rows, columns = -(-high // 2), -(-wide // 2)
    padded = pad(g, ((0, 2 * rows - high), (0, 2 * columns - wide)))
    d_products = lax.optimization_barrier(_tiles(_OUTPUT.T, padded, rows, columns))
    if min(inputs, channels) < MANY_CHANNELS:
        (top, bottom), (left, right) = pads
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        dx = _forward(((2 - top, 2 - bottom), (2 - left, 2 - right)), g, turned)[0]
    else:
        d_tiles = lax.dot_general(d_products, points, (((2,), (2,)), ((0,), (0,))))
        down = _combine(_INPUT.T, d_tiles.reshape(4, 4, batch, rows, columns, inputs))
        met = _interleave([_overlap(down[i], down[i + 2], 2) for i in range(2)], 2)
        across = _combine(_INPUT.T, lax.optimization_barrier(met))
        full = _interleave([_overlap(across[j], across[j + 2], 2) for j in range(2)], 2)
        dx = full[:, pads[0][0] :, pads[1][0] :][:, : x.shape[1], : x.shape[2]]
    if min(inputs, channels) < ENOUGH_CHANNELS:
        d_kernel = kernel_gradient(1, pads, x, kernel, g)
    else:
        d_points = lax.dot_general(tiles, d_products, (((1,), (1,)), ((0,), (0,))))
        d_kernel = _of_kernel(_POINTS.T, d_points, 1).reshape(kernel.shape)
    return dx, d_kernel


winograd.defvjp(_forward, _backward)


def _of_kernel(matrix: np.ndarray, x: jax.Array, axes: int) -> jax.Array:
    """Compute `matrix @ x` over the first axes of an array (..., c, o), as one matrix product."""
    rows = x.reshape(math.prod(x.shape[:axes]), -1)
    product = lax.dot(jnp.asarray(matrix, x.dtype), rows, precision=lax.Precision.HIGHEST)
    return product.reshape(len(matrix), *x.shape[axes:])


def _tiles(matrix: np.ndarray, x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Compute `matrix @ tile @ matrix.T` for the overlapping tiles of images at a distance of 2, (16, tiles, c).

    One axis after the other, with what is between them in memory: that is two loops to compile, and not 16.
    """
    places = range(matrix.shape[1])
    down = _combine(matrix, [x[:, i : i + 2 * rows - 1 : 2] for i in places])
    down = lax.optimization_barrier(jnp.stack(down))
    both = _combine(matrix, [down[:, :, :, j : j + 2 * columns - 1 : 2] for j in places])
    return jnp.stack(both, 1).reshape(16, -1, x.shape[-1])


def _combine(matrix: np.ndarray, parts: Sequence[jax.Array] | jax.Array) -> list[jax.Array]:
    """Compute `matrix @ parts` for a sequence of arrays, or over the first axis of one."""
    return [
        functools.reduce(jnp.add, [part * np.float32(w) for w, part in zip(row, parts, strict=True) if w])
        for row in matrix
    ]


def _interleave(parts: Sequence[jax.Array], axis: int) -> jax.Array:
    """Interleave two arrays along an axis."""
    both = jnp.stack(parts, axis + 1)
    return both.reshape(*both.shape[:axis], -1, *both.shape[axis + 2 :])


def _overlap(first: jax.Array, second: jax.Array, axis: int) -> jax.Array:
    """Sum neighbouring tiles where they overlap.

    The first half of each tile is added to the second half of the one before.
    """
    before, behind = [(0, 0)] * first.ndim, [(0, 0)] * first.ndim
    behind[axis], before[axis] = (0, 1), (1, 0)
    return jnp.pad(first, behind) + jnp.pad(second, before)
