"""Convolution by `lax`, with gradients whose operands have the order of dimensions that XLA:CPU computes fast.

`lax` expresses both gradients by dimension numbers: those of a kernel's gradient make the channels the batch and
the batch the channels. XLA:CPU has fast code for images (b, h, w, c) and kernels (h, w, i, o) alone, and transposes
the operands of other convolutions to that order only outside of loops (jax-ml/jax issue 12868). Inside one, as
where a batch is computed in parts, a kernel's gradient took 20 times as long. Transposed here, the convolutions
are those that XLA makes outside of loops, to the bit.
"""

import functools

import jax
from jax import lax

from dapt_jax.ops.shapes import DIMENSIONS, Pairs, pad

Saved = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def direct(stride: int, pads: Pairs, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve images with a kernel over all channels.

    Args:
        stride: Stride along both axes.
        pads: Pixels ((top, bottom), (left, right)); not negative.
        x: Images (b, h, w, c).
        kernel: Kernel (kh, kw, c, o).

    Returns:
        Array (b, h2, w2, o) in the dtype of `x`.
    """
    return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=DIMENSIONS)


def _forward(stride: int, pads: Pairs, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Saved]:
    return direct(stride, pads, x, kernel), (x, kernel)


def _backward(stride: int, pads: Pairs, saved: Saved, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    return _images_gradient(stride, pads, x, kernel, g), kernel_gradient(stride, pads, x, kernel, g)


def _images_gradient(stride: int, pads: Pairs, x: jax.Array, kernel: jax.Array, g: jax.Array) -> jax.Array:
    """Convolve the output's gradient, spread by the stride, with the rotated kernel."""
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    borders = [
        (size - 1 - before, side + before - stride * (windows - 1) - 1)
        for (before, _), size, side, windows in zip(
            pads, kernel.shape, x.shape[1:3], g.shape[1:3], strict=False
        )
    ]
    return lax.conv_general_dilated(
        g, turned, (1, 1), borders, lhs_dilation=(stride, stride), dimension_numbers=DIMENSIONS
    )


def kernel_gradient(stride: int, pads: Pairs, x: jax.Array, kernel: jax.Array, g: jax.Array) -> jax.Array:
    """Convolve images with the output's gradient, of which the batch becomes the channels.

    Args:
        stride: Stride along both axes.
        pads: Pixels ((top, bottom), (left, right)).
        x: Images (b, h, w, c).
        kernel: Kernel (kh, kw, c, o), of which only the shape is used.
        g: Gradient of the output (b, h2, w2, o).

    Returns:
        Array (kh, kw, c, o).
    """
    # Rows and columns that no window reaches, where the stride leaves a rest, are cut off.
    reached = [
        stride * (windows - 1) + size for size, windows in zip(kernel.shape, g.shape[1:3], strict=False)
    ]
    padded = pad(x, pads)[:, : reached[0], : reached[1]]
    made = lax.conv_general_dilated(
        padded.transpose(3, 1, 2, 0),
        g.transpose(1, 2, 0, 3),
        (1, 1),
        "VALID",
        rhs_dilation=(stride, stride),
        dimension_numbers=DIMENSIONS,
    )
    return made.transpose(1, 2, 0, 3)


direct.defvjp(_forward, _backward)
