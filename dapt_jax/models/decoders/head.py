"""The convolution from a decoder's last map to logits."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.models.layers import Conv
from dapt_jax.parameters import BatchNormMode


class Head(nnx.Module):
    """One convolution, at the resolution of the decoder."""

    def __init__(self, features: int, outputs: int, size: int, bias: bool = True):
        self.conv = Conv(features, outputs, size, bias=bias)

    def __call__(
        self, x: Float[Array, "b h w c"], skips: Sequence[Float[Array, "b h2 w2 d"]], mode: BatchNormMode
    ) -> Float[Array, "b h w d"]:
        return self.conv(x)
