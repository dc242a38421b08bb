"""The contracting path of the U-Net (Ronneberger et al., arXiv 1505.04597), padded, with batch norm."""

import functools
import itertools

from flax import nnx
from jaxtyping import Array, Float

from dapt_jax import ops
from dapt_jax.models.encoder import DEFAULT, Encoder, LayerGroup, Options
from dapt_jax.models.entry import register_model
from dapt_jax.models.layers import ConvNormRelu
from dapt_jax.models.preprocess import IMAGENET
from dapt_jax.parameters import BatchNormMode

WIDTHS = (64, 128, 256, 512, 1024)


class Stage(nnx.Module):
    """A 2x2 max-pool (except in the first stage), and two 3x3 convolutions with batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, *, has_pool: bool):
        self.conv1 = ConvNormRelu(inputs, outputs, 3)
        self.conv2 = ConvNormRelu(outputs, outputs, 3)
        self.has_pool = has_pool

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h2 w2 d"]:
        if self.has_pool:
            x = ops.max_pool(x, 2, 2)
        return self.conv2(self.conv1(x, mode), mode)


@register_model("unet")
def unet_encoder(options: Options = DEFAULT) -> Encoder:
    """Return five stages of 64 to 1024 channels, from full size to 1/16: 18,847,168 parameters.

    Groups: `stage1` to `stage5`.
    """
    groups = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise((options.channels, *WIDTHS)), 1):
        make = functools.partial(Stage, inputs, outputs, has_pool=number > 1)
        groups.append(LayerGroup(f"stage{number}", make, outputs, 2 ** (number - 1)))
    return Encoder("unet", groups, preprocess=IMAGENET.for_channels(options.channels))
