"""The decoder of Swin-Unet (Cao et al., arXiv 2105.05537) on any encoder: Swin blocks and patch expansion."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.models.decoders.pyramid import pyramid, unit
from dapt_jax.models.decoders.step import Decoder, Step
from dapt_jax.models.encoder import DEFAULT, Encoder
from dapt_jax.models.encoders.swin import WINDOW, Block
from dapt_jax.models.layers import Dense, LayerNorm, StochasticDepth
from dapt_jax.parameters import BatchNormMode

HEAD_SIZE = 32
"""Channels of an attention head."""
BLOCKS = 2
FINEST = 4
"""Side of the patches that the last step expands to pixels at once."""


class Expand(nnx.Module):
    """Patch expansion to factor x factor: a dense layer, its outputs laid out in space, and layer norm."""

    def __init__(self, inputs: int, outputs: int, factor: int):
        self.expand = Dense(inputs, outputs * factor**2, bias=False)
        self.norm = LayerNorm(outputs, eps=1e-5)
        self.factor = factor

    def __call__(
        self, x: Float[Array, "b h w c"], skips: Sequence[Float[Array, "b h2 w2 d"]], mode: BatchNormMode
    ) -> Float[Array, "b h2 w2 e"]:
        batch, high, wide, _ = x.shape
        factor = self.factor
        x = self.expand(x).reshape(batch, high, wide, factor, factor, -1).transpose(0, 1, 3, 2, 4, 5)
        return self.norm(x.reshape(batch, high * factor, wide * factor, -1))


class Stage(nnx.Module):
    """Expands by 2, joins the encoder's map of that resolution by a dense layer, and runs two Swin blocks."""

    def __init__(self, inputs: int, skip: int, outputs: int):
        self.expand = Expand(inputs, outputs, 2)
        self.join = Dense(outputs + skip, outputs) if skip else None
        heads = max(outputs // HEAD_SIZE, 1)
        shifts = [0 if number % 2 == 0 else WINDOW // 2 for number in range(BLOCKS)]
        self.blocks = nnx.List([Block(outputs, heads, shift, DEFAULT, StochasticDepth()) for shift in shifts])

    def __call__(
        self, x: Float[Array, "b h w c"], skips: Sequence[Float[Array, "b h2 w2 d"]], mode: BatchNormMode
    ) -> Float[Array, "b h2 w2 e"]:
        x = self.expand(x, (), mode)
        if self.join is not None:
            (skip,) = skips
            x = self.join(jnp.concatenate([x, skip], -1))
        for block in self.blocks:
            x = block(x, mode)
        return x


def swin_unet(encoder: Encoder) -> Decoder:
    """Return stages of half the channels each, up to patches of 4 pixels, and their final expansion."""
    steps, (*finer, deepest) = pyramid(encoder)
    by_reduction = {level.reduction: level for level in finer}
    reduction, features = deepest.reduction, deepest.features
    while reduction > FINEST:
        reduction //= 2
        skip = by_reduction.get(reduction)
        outputs = max(features // (2 * HEAD_SIZE), 1) * HEAD_SIZE
        make = functools.partial(Stage, features, skip.features if skip else 0, outputs)
        steps.append(Step(f"decoder/stage{len(steps) + 1}", make, (skip.name,) if skip else ()))
        features = outputs
    steps.append(Step("decoder/expand", functools.partial(Expand, features, features, reduction)))
    return Decoder(tuple(steps), features, 1, unit(encoder, [*finer, deepest]), head_size=1)
