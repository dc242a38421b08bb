"""2-D convolution, with formulations that XLA:CPU runs fast for the three kinds that image encoders are made of.

XLA:CPU has a fast path for plain forward convolutions and for dots, and little else: depthwise convolutions take its
generic loop, and so do the gradients with respect to kernels. Here a 1x1 convolution is a dot, a depthwise one is a sum of
shifted products (`depthwise`), and a k x k one keeps `lax`'s forward pass while its kernel's gradient is one dot per
kernel tap.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dapt_jax.ops import choice
from dapt_jax.ops.depthwise import depthwise
from dapt_jax.ops.shapes import Padding, Pairs, pad, pairs, taps

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int = 1,
    padding: Padding = "SAME",
    groups: int = 1,
) -> Float[Array, "b h2 w2 o"]:
    """Convolves images (cross-correlation, as everywhere in deep learning).

    Args:
        x: images.
        kernel: (height, width, c / groups, o), of the same dtype as `x`.
        stride: the same along both axes.
        padding: "SAME" (TensorFlow's: an odd pixel goes behind), "VALID", or pixels ((top, bottom), (left, right)).
        groups: divides the channels; equal to c for a depthwise convolution.

    Returns:
        The output in the dtype of `x`. The CPU formulations define a reverse-mode gradient only.
    """
    height, width, inputs, channels = kernel.shape
    pads = pairs(padding, (height, width), x.shape[1:3], stride)
    if choice.current() == "cpu":
        if groups == 1 and height == width == 1 and not any(map(any, pads)):
            return x[:, ::stride, ::stride] @ kernel[0, 0]
        if groups == 1:
            return _dense(stride, pads, x, kernel)
        if inputs == 1 and channels == groups:
            return depthwise(stride, pads, x, kernel)
    return _lax(x, kernel, stride, pads, groups)


def _lax(x: jax.Array, kernel: jax.Array, stride: int, pads: Pairs, groups: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=_DIMENSIONS, feature_group_count=groups
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dense(stride: int, pads: Pairs, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _lax(x, kernel, stride, pads)


def _dense_forward(
    stride: int, pads: Pairs, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _lax(x, kernel, stride, pads), (x, kernel)


def _dense_backward(
    stride: int, pads: Pairs, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    _, transpose = jax.vjp(lambda x: _lax(x, kernel, stride, pads), x)
    (dx,) = transpose(g)
    return dx, _dense_kernel_gradient(stride, pads, x, kernel, g)


def _dense_kernel_gradient(stride: int, pads: Pairs, x: jax.Array, kernel: jax.Array, g: jax.Array) -> jax.Array:
    """One dot per kernel tap: the input pixels that the tap met, against the output's gradient."""
    height, width, inputs, channels = kernel.shape
    flat = g.reshape(-1, channels)
    met = taps(pad(x, pads), (height, width), g.shape[1:3], stride)
    dots = [jnp.dot(part.reshape(-1, inputs).T, flat, preferred_element_type=jnp.float32) for part in met]
    return jnp.stack(dots).reshape(kernel.shape).astype(kernel.dtype)


_dense.defvjp(_dense_forward, _dense_backward)

