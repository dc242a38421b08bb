"""Depthwise convolution as sums of shifted products, forward and backward.

XLA:CPU lowers a depthwise convolution to a scalar loop. A sum over the taps of shifted images times one
weight per channel is elementwise work, which it fuses into one vectorised loop. The same holds for the two
gradients:

- with respect to the input, each of the `stride` x `stride` phases of the input's pixel grid has a separate
  set of taps, so no product with an inserted zero is formed;
- with respect to the kernel, products of one tap after the other are summed, a block of rows at a time.

The barriers keep XLA from fusing a producer (a padding, a norm, an activation) into its k x k readers, which
would recompute it for every tap, and the sum of the taps into a transposing copy. They halve the time of a
training step.
"""

import functools
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax

from dapt_jax.ops.shapes import Pairs, outputs, pad, taps

WHOLE_BYTES = 4 << 20
"""Largest size of a gradient that the kernel's gradient reads as a whole, once for every tap."""

BLOCK_BYTES = 1 << 20
"""Largest size of the rows that it reads instead of a larger one: they stay in a core's cache from tap to tap."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def depthwise(stride: int, pads: Pairs, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve every channel with a separate kernel.

    Args:
        stride: Stride along both axes.
        pads: Pixels ((top, bottom), (left, right)); not negative.
        x: Images (b, h, w, c).
        kernel: Kernel (kh, kw, 1, c).

    Returns:
        Array (b, h2, w2, c) in the dtype of `x`; products and sums are in float32.
    """
    size = kernel.shape[:2]
    out = outputs(x.shape[1:3], size, pads, stride)
    weights = kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)
    parts = taps(lax.optimization_barrier(pad(x, pads)), size, out, stride)
    return _total(part * weight for part, weight in zip(parts, weights, strict=True)).astype(x.dtype)


def _total(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def _forward(
    stride: int, pads: Pairs, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return depthwise(stride, pads, x, kernel), (x, kernel)


def _backward(
    stride: int, pads: Pairs, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    g = lax.optimization_barrier(g)
    dx = _input_gradient(stride, pads, x, kernel, g)
    return lax.optimization_barrier(dx), _kernel_gradient(stride, pads, x, kernel, g)


def _input_gradient(stride: int, pads: Pairs, x: jax.Array, kernel: jax.Array, g: jax.Array) -> jax.Array:
    """Sum weight times gradient, for every input pixel, over the windows that contain it."""
    (top, _), (left, _) = pads
    height, width, _, channels = kernel.shape
    high, wide = (-(-side // stride) for side in x.shape[1:3])
    # Input row r = stride * n + phase is tap t of window (r + top - t) / stride: n plus a constant per phase
    # and tap.
    rows = [_meetings(phase, top, height, stride) for phase in range(stride)]
    columns = [_meetings(phase, left, width, stride) for phase in range(stride)]
    margin_rows, margin_columns = _margins(rows, high, g.shape[1]), _margins(columns, wide, g.shape[2])
    padded = pad(g, (margin_rows, margin_columns)).astype(jnp.float32)
    weights = kernel.astype(jnp.float32)

    def phase(row: int, column: int) -> jax.Array:
        total = jnp.zeros((g.shape[0], high, wide, channels), jnp.float32)
        for tap_row, shift_row in rows[row]:
            for tap_column, shift_column in columns[column]:
                first, second = margin_rows[0] + shift_row, margin_columns[0] + shift_column
                total += (
                    padded[:, first : first + high, second : second + wide] * weights[tap_row, tap_column, 0]
                )
        return total

    if stride == 1:
        return phase(0, 0).astype(x.dtype)
    grid = [jnp.stack([phase(row, column) for column in range(stride)], 3) for row in range(stride)]
    full = jnp.stack(grid, 2).reshape(g.shape[0], high * stride, wide * stride, channels)
    return full[:, : x.shape[1], : x.shape[2]].astype(x.dtype)


def _meetings(phase: int, before: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Return (tap, shift) pairs: input pixel `stride * n + phase` is under that tap of window `n + shift`."""
    return [
        (tap, (phase + before - tap) // stride) for tap in range(size) if (phase + before - tap) % stride == 0
    ]


def _margins(meetings: list[list[tuple[int, int]]], count: int, windows: int) -> tuple[int, int]:
    """Return the border that keeps every shift of `count` windows inside."""
    shifts = [shift for phase in meetings for _, shift in phase]
    return max(0, -min(shifts, default=0)), max(0, max(shifts, default=0) + count - windows)


def _kernel_gradient(stride: int, pads: Pairs, x: jax.Array, kernel: jax.Array, g: jax.Array) -> jax.Array:
    """Sum image times gradient per tap and channel.

    One loop over the taps, whose body is compiled once: the sums of every tap written out took half of the time that
    a training step takes to compile. Large gradients are summed a block of rows at a time, by a loop around it.
    """
    height, width, _, channels = kernel.shape
    batch, high, wide, _ = g.shape
    padded = lax.optimization_barrier(pad(x, pads))
    row_bytes = 4 * batch * wide * channels
    most = high if high * row_bytes <= WHOLE_BYTES else max(BLOCK_BYTES // row_bytes, 1)
    rows = max(n for n in range(1, most + 1) if high % n == 0)
    covered = (batch, (rows - 1) * stride + 1, (wide - 1) * stride + 1, channels)

    def of_rows(window: jax.Array, gradient: jax.Array) -> jax.Array:
        gradient = gradient.astype(jnp.float32)

        def at_tap(tap: jax.Array) -> jax.Array:
            seen = lax.dynamic_slice(window, (0, tap // width, tap % width, 0), covered)
            return (seen[:, ::stride, ::stride].astype(jnp.float32) * gradient).sum((0, 1, 2))

        return lax.map(at_tap, jnp.arange(height * width))

    def add_block(block: jax.Array, total: jax.Array) -> jax.Array:
        window = lax.dynamic_slice_in_dim(padded, block * rows * stride, (rows - 1) * stride + height, 1)
        return total + of_rows(window, lax.dynamic_slice_in_dim(g, block * rows, rows, 1))

    if rows == high:
        total = of_rows(padded, g)
    else:
        empty = jnp.zeros((height * width, channels), jnp.float32)
        total = lax.fori_loop(0, high // rows, add_block, empty)
    return total.reshape(kernel.shape).astype(kernel.dtype)


depthwise.defvjp(_forward, _backward)
