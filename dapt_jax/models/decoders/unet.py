"""The U-Net decoder (Ronneberger et al., arXiv 1505.04597) of segmentation_models_pytorch, on any encoder.

With attention (Oktay et al., arXiv 1804.03999), a gate weights every map of the encoder by the map that it is
joined to.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.models.decoders.pyramid import pyramid, unit
from dapt_jax.models.decoders.step import Decoder, Step
from dapt_jax.models.encoder import Encoder
from dapt_jax.models.layers import BatchNorm, Conv, ConvNormRelu
from dapt_jax.models.resize import nearest
from dapt_jax.parameters import BatchNormMode

WIDTHS = (256, 128, 64, 32, 16)
"""Channels of the blocks, coarsest first; a network with fewer resolutions takes the first of them."""


class Gate(nnx.Module):
    """Additive attention gate (figure 2 of arXiv 1804.03999): weights from 0 to 1 for a map's pixels."""

    def __init__(self, signal: int, features: int):
        inner = max(features // 2, 1)
        self.signal, self.norm_signal = Conv(signal, inner, 1, bias=True), BatchNorm(inner)
        self.map, self.norm_map = Conv(features, inner, 1, bias=True), BatchNorm(inner)
        self.weight, self.norm_weight = Conv(inner, 1, 1, bias=True), BatchNorm(1)

    def __call__(
        self, signal: Float[Array, "b h w c"], x: Float[Array, "b h w d"], mode: BatchNormMode
    ) -> Float[Array, "b h w d"]:
        both = self.norm_signal(self.signal(signal), mode) + self.norm_map(self.map(x), mode)
        return x * jax.nn.sigmoid(self.norm_weight(self.weight(jax.nn.relu(both)), mode))


class Block(nnx.Module):
    """Doubles the map, joins the encoder's map of that resolution to it, and convolves twice."""

    def __init__(self, inputs: int, skip: int, outputs: int, *, has_gate: bool):
        self.gate = Gate(inputs, skip) if has_gate and skip else None
        self.conv1 = ConvNormRelu(inputs + skip, outputs, 3)
        self.conv2 = ConvNormRelu(outputs, outputs, 3)

    def __call__(
        self, x: Float[Array, "b h w c"], skips: Sequence[Float[Array, "b h2 w2 d"]], mode: BatchNormMode
    ) -> Float[Array, "b h2 w2 e"]:
        x = nearest(x, 2)
        for skip in skips:
            x = jnp.concatenate([x, skip if self.gate is None else self.gate(x, skip, mode)], -1)
        return self.conv2(self.conv1(x, mode), mode)


def unet(encoder: Encoder, *, has_gate: bool = False) -> Decoder:
    """Return one block per halving of the encoder, each joined to the encoder's map of its resolution."""
    steps, (*finer, deepest) = pyramid(encoder)
    by_reduction = {level.reduction: level for level in finer}
    reduction, features = deepest.reduction, deepest.features
    for number, width in enumerate(WIDTHS[: reduction.bit_length() - 1], 1):
        reduction //= 2
        skip = by_reduction.get(reduction)
        make = functools.partial(Block, features, skip.features if skip else 0, width, has_gate=has_gate)
        steps.append(Step(f"decoder/block{number}", make, (skip.name,) if skip else ()))
        features = width
    return Decoder(tuple(steps), features, reduction, unit(encoder, [*finer, deepest]), head_size=3)


def attention_unet(encoder: Encoder) -> Decoder:
    """Return the same decoder with a gate on every map of the encoder."""
    return unet(encoder, has_gate=True)
