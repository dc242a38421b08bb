"""The U-Net decoder (Ronneberger et al., arXiv 1505.04597) as segmentation_models_pytorch builds it, on any encoder."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.models.decoders.step import Decoder, Step
from dapt_jax.models.encoder import Encoder, Level, NormMode
from dapt_jax.models.layers import ConvNormRelu
from dapt_jax.models.resize import nearest

WIDTHS = (256, 128, 64, 32, 16)
"""Channels of the blocks, coarsest first; a network of fewer resolutions has the first of them."""


class Block(nnx.Module):
    """Doubles the map, joins the encoder's map of that resolution to it, and convolves twice."""

    def __init__(self, inputs: int, skip: int, outputs: int):
        self.conv1 = ConvNormRelu(inputs + skip, outputs, 3)
        self.conv2 = ConvNormRelu(outputs, outputs, 3)

    def __call__(
        self, x: Float[Array, "b h w c"], skips: Sequence[Float[Array, "b h2 w2 d"]], norm: NormMode
    ) -> Float[Array, "b h2 w2 e"]:
        x = jnp.concatenate([nearest(x, 2), *skips], -1)
        return self.conv2(self.conv1(x, norm), norm)


def unet(encoder: Encoder) -> Decoder:
    """The plain decoder: one block per halving of the encoder, 256 to 16 channels."""
    return lay_out(encoder, Block)


def lay_out(encoder: Encoder, block: Callable[[int, int, int], nnx.Module]) -> Decoder:
    """One block per halving; the maps of the encoder are joined where it has one of the resolution."""
    *finer, deepest = encoder.levels
    by_reduction = {level.reduction: level for level in finer}
    reduction, features = deepest.reduction, deepest.features
    steps = []
    for number, width in enumerate(WIDTHS[: reduction.bit_length() - 1], 1):
        reduction //= 2
        skip: Level | None = by_reduction.get(reduction)
        make = functools.partial(block, features, skip.features if skip else 0, width)
        steps.append(Step(f"decoder/block{number}", make, (skip.name,) if skip else ()))
        features = width
    return Decoder(tuple(steps), features, reduction, deepest.reduction, head_size=3)
