"""The three decoders of "Enhancing pretraining efficiency for medical image segmentation" (arXiv 2410.18677).

On the encoders of `models.encoders.hidy2024` they are that paper's U-Net (31,080,449 parameters with one
output), attention U-Net (55,668,321) and Swin U-Net (27,166,596); they take any other encoder too.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.models.decoders import swin_unet as expansion
from dapt_jax.models.decoders.pyramid import pyramid, unit
from dapt_jax.models.decoders.step import Decoder, Step
from dapt_jax.models.encoder import DEFAULT, Encoder
from dapt_jax.models.encoders.hidy2024 import DoubleConv
from dapt_jax.models.encoders.swin import WINDOW, Block
from dapt_jax.models.layers import BatchNorm, Conv, Dense, LayerNorm, StochasticDepth, split
from dapt_jax.models.resize import nearest
from dapt_jax.parameters import BatchNormMode

ATTENTION_WIDTHS = (256, 128, 64, 32, 16)
"""Channels of the attention U-Net's levels, coarsest first."""


class Gate(nnx.Module):
    """Attention gate (figure 2 of arXiv 1804.03999) at the resolution of the signal, a weight per channel."""

    def __init__(self, signal: int, features: int):
        self.gating, self.norm_gating = Conv(signal, signal, 1, bias=True), BatchNorm(signal)
        self.signal, self.norm_signal = Conv(signal, signal, 1, bias=True), BatchNorm(signal)
        self.map = Conv(features, signal, 2, stride=2, padding="VALID", bias=True)
        self.norm_map = BatchNorm(signal)
        self.weight, self.norm_weight = Conv(signal, features, 1, bias=True), BatchNorm(features)

    def __call__(
        self, signal: Float[Array, "b h w c"], x: Float[Array, "b h2 w2 d"], mode: BatchNormMode
    ) -> Float[Array, "b h2 w2 d"]:
        gating = jax.nn.relu(self.norm_gating(self.gating(signal), mode))
        both = self.norm_map(self.map(x), mode) + self.norm_signal(self.signal(gating), mode)
        weights = jax.nn.sigmoid(self.norm_weight(self.weight(jax.nn.relu(both)), mode))
        return x * nearest(weights, 2)


class Level(nnx.Module):
    """Doubles the map by a 2x2 convolution to half of its channels, joins a skip, and convolves twice."""

    def __init__(self, inputs: int, skip: int, outputs: int, *, has_gate: bool):
        self.up = Conv(inputs, inputs // 2, 2, bias=True)
        self.gate = Gate(inputs, skip) if has_gate and skip else None
        self.convs = DoubleConv(inputs // 2 + skip, outputs)

    def __call__(
        self, x: Float[Array, "b h w c"], skips: Sequence[Float[Array, "b h2 w2 d"]], mode: BatchNormMode
    ) -> Float[Array, "b h2 w2 e"]:
        y = jax.nn.relu(self.up(nearest(x, 2)))
        for skip in skips:
            y = jnp.concatenate([y, skip if self.gate is None else self.gate(x, skip, mode)], -1)
        return self.convs(y, mode)


class SwinLevel(nnx.Module):
    """Expands by 2, joins a skip by a dense layer, and runs two Swin blocks."""

    def __init__(self, inputs: int, skip: int, outputs: int, heads: int, depths: Sequence[StochasticDepth]):
        self.expand = expansion.Expand(inputs, outputs, 2)
        self.join = Dense(outputs + skip, outputs) if skip else None
        shifts = [0 if number % 2 == 0 else WINDOW // 2 for number in range(len(depths))]
        self.blocks = nnx.List(
            [
                Block(outputs, heads, shift, DEFAULT, depth)
                for shift, depth in zip(shifts, depths, strict=True)
            ]
        )

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        skips: Sequence[Float[Array, "b h2 w2 d"]],
        mode: BatchNormMode,
        key: jax.Array | None = None,
    ) -> Float[Array, "b h2 w2 e"]:
        x = self.expand(x, (), mode)
        if self.join is not None:
            x = self.join(jnp.concatenate([x, *skips], -1))
        for block, of_block in zip(self.blocks, split(key, len(self.blocks)), strict=True):
            x = block(x, mode, of_block)
        return x


class NormExpand(nnx.Module):
    """Layer norm and the final patch expansion."""

    def __init__(self, features: int, factor: int):
        self.norm = LayerNorm(features, eps=1e-5)
        self.expand = expansion.Expand(features, features, factor)

    def __call__(
        self, x: Float[Array, "b h w c"], skips: Sequence[Float[Array, "b h2 w2 d"]], mode: BatchNormMode
    ) -> Float[Array, "b h2 w2 c"]:
        return self.expand(self.norm(x), (), mode)


def unet(encoder: Encoder, *, has_gate: bool = False) -> Decoder:
    """Return one level per halving; its output has as many channels as the skip, or half of its input's."""
    steps, (*finer, deepest) = pyramid(encoder)
    by_reduction = {level.reduction: level for level in finer}
    reduction, features = deepest.reduction, deepest.features
    for number in range(reduction.bit_length() - 1):
        reduction //= 2
        skip = by_reduction.get(reduction)
        features_of_skip = skip.features if skip else 0
        width = ATTENTION_WIDTHS[number] if has_gate else features_of_skip or features // 2
        make = functools.partial(Level, features, features_of_skip, width, has_gate=has_gate)
        steps.append(Step(f"decoder/level{number + 1}", make, (skip.name,) if skip else ()))
        features = width
    return Decoder(tuple(steps), features, reduction, unit(encoder, [*finer, deepest]), head_size=1)


def attention_unet(encoder: Encoder) -> Decoder:
    """Return levels of 256, 128, 64, 32 and 16 channels with a gate on every skip."""
    return unet(encoder, has_gate=True)


def swin_unet(encoder: Encoder) -> Decoder:
    """Return levels of half the channels each, up to patches of 4 pixels, and their final expansion.

    A level drops branches with the probabilities of the encoder's stage of its resolution.
    """
    steps, (*finer, deepest) = pyramid(encoder)
    by_reduction = {level.reduction: level for level in finer}
    reduction, features = deepest.reduction, deepest.features
    stages = max(reduction // expansion.FINEST, 1).bit_length()
    depths = encoder.options.stochastic_depths(expansion.BLOCKS * stages)
    while reduction > expansion.FINEST:
        reduction //= 2
        skip = by_reduction.get(reduction)
        outputs = max(features // (2 * expansion.HEAD_SIZE), 1) * expansion.HEAD_SIZE
        stages -= 1
        own = depths[expansion.BLOCKS * (stages - 1) : expansion.BLOCKS * stages]
        make = functools.partial(
            SwinLevel, features, skip.features if skip else 0, outputs, outputs // expansion.HEAD_SIZE, own
        )
        steps.append(
            Step(
                f"decoder/level{len(steps) + 1}",
                make,
                (skip.name,) if skip else (),
                is_stochastic=encoder.options.drop_path > 0,
            )
        )
        features = outputs
    steps.append(Step("decoder/expand", functools.partial(NormExpand, features, reduction)))
    return Decoder(tuple(steps), features, 1, unit(encoder, [*finer, deepest]), head_size=1, head_bias=False)
