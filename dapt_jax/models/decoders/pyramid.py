"""A feature pyramid from levels of equal resolution, as plain transformers produce them."""

import functools
import math
from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.models.decoders.step import Step
from dapt_jax.models.encoder import Encoder, Level
from dapt_jax.models.resize import bilinear
from dapt_jax.parameters import BatchNormMode

_REDUCTIONS = (4, 8, 16, 32)


class Rescale(nnx.Module):
    """Resizes its input map by a factor."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(
        self, x: None, skips: Sequence[Float[Array, "b h2 w2 d"]], mode: BatchNormMode
    ) -> Float[Array, "b h3 w3 d"]:
        sides = (max(round(side * self.factor), 1) for side in skips[0].shape[1:3])
        return bilinear(skips[0], (next(sides), next(sides)))


def pyramid(encoder: Encoder) -> tuple[list[Step], list[Level]]:
    """Return the steps before a decoder, and the pyramid levels that the decoder reads, finest first.

    Where the encoder's levels differ in resolution, there are no steps, and the levels are the encoder's.
    Otherwise they are the maps of four depths (of fewer, if the encoder is truncated), resized to 1/4 to 1/32 of
    the image's side, as in ViTDet (Li et al., arXiv 2203.16527) and BEiT's UPerNet, but without their learnt
    convolutions.
    """
    levels = list(encoder.pyramid_levels)
    # The only level of a truncated transformer differs from no other, but the output of its group is tokens.
    if len({level.reduction for level in levels}) == len(levels) and (len(levels) > 1 or encoder.has_maps):
        return [], levels
    steps: list[Step] = []
    made: list[Level] = []
    for reduction, level in zip(_REDUCTIONS[-len(levels) :], levels, strict=True):
        name = f"decoder/rescale{len(steps) + 1}"
        make = functools.partial(Rescale, level.reduction / reduction)
        steps.append(Step(name, make, (level.name,), name, has_input=False))
        made.append(Level(name, level.features, reduction))
    return steps, made


def unit(encoder: Encoder, levels: Sequence[Level]) -> int:
    """Return the number that image sides must be multiples of to give every level integer sides."""
    return math.lcm(*(level.reduction for level in (*encoder.pyramid_levels, *levels)))
