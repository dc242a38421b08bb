"""2-D convolution, with formulations that are fast in XLA:CPU for the kinds that image encoders use.

XLA:CPU has fast code for k x k convolutions, their gradients included, and for dots. Depthwise convolutions
fall back to its generic loop, so they become sums of shifted products (`depthwise`); a 1x1 convolution
becomes a dot, forward and backward; a 3x3 convolution at stride 1 takes fewer multiplications after a
transformation (`winograd`).
"""

from jax import lax
from jaxtyping import Array, Float

from dapt_jax.ops import choice
from dapt_jax.ops.depthwise import depthwise
from dapt_jax.ops.direct import direct
from dapt_jax.ops.product import product
from dapt_jax.ops.shapes import DIMENSIONS, Padding, pairs
from dapt_jax.ops.winograd import suits, winograd


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i o"],
    *,
    stride: int = 1,
    padding: Padding = "SAME",
    groups: int = 1,
) -> Float[Array, "b h2 w2 o"]:
    """Convolve images (cross-correlation, as usual in deep learning).

    Args:
        x: Images.
        kernel: Kernel (height, width, c / groups, o), of the same dtype as `x`.
        stride: Stride along both axes.
        padding: "SAME" (as in TensorFlow: an odd pixel is added at the end), "VALID", or pixels
            ((top, bottom), (left, right)).
        groups: Number of groups that the channels are divided into; equal to c for a depthwise convolution.

    Returns:
        The output in the dtype of `x`. The CPU formulations define only a reverse-mode gradient.
    """
    height, width, inputs, channels = kernel.shape
    pads = pairs(padding, (height, width), x.shape[1:3], stride)
    if choice.current() == "cpu":
        if groups == 1 and height == width == 1 and not any(map(any, pads)):
            return product(x[:, ::stride, ::stride], kernel[0, 0])
        if inputs == 1 and channels == groups == x.shape[-1] > 1:
            return depthwise(stride, pads, x, kernel)
        if groups == stride == 1 and (height, width) == (3, 3) and suits(pads, x, kernel):
            return winograd(pads, x, kernel)
        if groups == 1:
            return direct(stride, pads, x, kernel)
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=DIMENSIONS, feature_group_count=groups
    )
