"""Levels of one resolution, as plain transformers have, made a pyramid."""

import functools
from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.models.decoders.step import Step
from dapt_jax.models.encoder import Encoder, Level, NormMode
from dapt_jax.models.resize import bilinear

_FACTORS = (4.0, 2.0, 1.0, 0.5)


class Rescale(nnx.Module):
    """The one map that it reads, enlarged or shrunk."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(
        self, x: None, skips: Sequence[Float[Array, "b h2 w2 d"]], norm: NormMode
    ) -> Float[Array, "b h3 w3 d"]:
        sides = (max(round(side * self.factor), 1) for side in skips[0].shape[1:3])
        return bilinear(skips[0], (next(sides), next(sides)))


def pyramid(encoder: Encoder) -> tuple[list[Step], list[Level]]:
    """The steps before a decoder, and the levels that it then finds, finest first.

    None, and the encoder's own, where these differ in resolution. Else the maps of four depths at 4, 2, 1 and 1/2 times
    their side, as ViTDet (Li et al., arXiv 2203.16527) and BEiT's UPerNet do it, without their learnt convolutions.
    """
    levels = list(encoder.levels)
    if len({level.reduction for level in levels}) == len(levels):
        return [], levels
    steps: list[Step] = []
    made: list[Level] = []
    for factor, level in zip(_FACTORS[-len(levels) :], levels, strict=True):
        name = f"decoder/rescale{len(steps) + 1}"
        steps.append(Step(name, functools.partial(Rescale, factor), (level.name,), name, has_input=False))
        made.append(Level(name, level.features, round(level.reduction / factor)))
    return steps, made
