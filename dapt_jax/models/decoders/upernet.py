"""UPerNet (Xiao et al., arXiv 1807.10221): pyramid pooling, and a feature pyramid over the other maps.

As in segmentation_models_pytorch: 256 channels, a layer norm on every map of the encoder.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.models.decoders.pyramid import pyramid, unit
from dapt_jax.models.decoders.step import Decoder, Step
from dapt_jax.models.encoder import Encoder
from dapt_jax.models.layers import ConvNormRelu, LayerNorm
from dapt_jax.models.resize import bilinear
from dapt_jax.parameters import BatchNormMode

WIDTH = 256
SIZES = (1, 2, 3, 6)
"""Sides of the grids that the coarsest map is averaged over."""


class PyramidPooling(nnx.Module):
    """Pyramid pooling of the coarsest map (Zhao et al., arXiv 1612.01105)."""

    def __init__(self, inputs: int):
        self.norm = LayerNorm(inputs)
        self.pools = nnx.List([ConvNormRelu(inputs, WIDTH, 1) for _ in SIZES])
        self.fuse = ConvNormRelu(inputs + len(SIZES) * WIDTH, WIDTH, 3)

    def __call__(
        self, x: Float[Array, "b h w c"], skips: Sequence[Float[Array, "b h2 w2 d"]], mode: BatchNormMode
    ) -> Float[Array, "b h w e"]:
        x = self.norm(x)
        size = (x.shape[1], x.shape[2])
        parts = [conv(averaged(x, cells), mode) for conv, cells in zip(self.pools, SIZES, strict=True)]
        return self.fuse(jnp.concatenate([x, *(bilinear(part, size) for part in parts)], -1), mode)


def averaged(x: Float[Array, "b h w c"], cells: int) -> Float[Array, "b cells cells c"]:
    """Average over a grid of cells, which may overlap by a pixel (PyTorch's adaptive pooling)."""

    def weights(side: int) -> jax.Array:
        number = np.arange(cells)
        starts, stops = number * side // cells, -(-(number + 1) * side // cells)
        pixel = np.arange(side)
        inside = (pixel >= starts[:, None]) & (pixel < stops[:, None])
        return jnp.asarray(inside / inside.sum(1, keepdims=True), x.dtype)

    return jnp.einsum("bhwc,ih,jw->bijc", x, weights(x.shape[1]), weights(x.shape[2]))


class Lateral(nnx.Module):
    """Lateral connection: the encoder's map in the decoder's channels, plus the pyramid's coarser map."""

    def __init__(self, inputs: int):
        self.norm = LayerNorm(inputs)
        self.conv = ConvNormRelu(inputs, WIDTH, 1)

    def __call__(
        self, x: None, skips: Sequence[Float[Array, "b _ _ _"]], mode: BatchNormMode
    ) -> Float[Array, "b h w c"]:
        level, coarser = skips
        y = self.conv(self.norm(level), mode)
        return y + bilinear(coarser, (y.shape[1], y.shape[2]))


class Fuse(nnx.Module):
    """Convolves the finer maps of the pyramid, joins all at the finest resolution and fuses them."""

    def __init__(self, maps: int):
        self.convs = nnx.List([ConvNormRelu(WIDTH, WIDTH, 3) for _ in range(maps - 1)])
        self.fuse = ConvNormRelu(maps * WIDTH, WIDTH, 3)

    def __call__(
        self, x: None, skips: Sequence[Float[Array, "b _ _ c"]], mode: BatchNormMode
    ) -> Float[Array, "b h w c"]:
        coarsest, *finer = skips
        maps = [coarsest, *(conv(each, mode) for conv, each in zip(self.convs, finer, strict=True))]
        size = (maps[-1].shape[1], maps[-1].shape[2])
        return self.fuse(jnp.concatenate([bilinear(each, size) for each in reversed(maps)], -1), mode)


def upernet(encoder: Encoder) -> Decoder:
    """Return the decoder over the pyramid levels of a quarter of the image's side and coarser."""
    steps, levels = pyramid(encoder)
    *finer, deepest = [level for level in levels if level.reduction >= min(4, levels[-1].reduction)]
    made = ["decoder/pool"]
    steps.append(Step(made[0], functools.partial(PyramidPooling, deepest.features), emits=made[0]))
    for number, level in enumerate(reversed(finer), 1):
        name = f"decoder/lateral{number}"
        make = functools.partial(Lateral, level.features)
        steps.append(Step(name, make, (level.name, made[-1]), name, has_input=False))
        made.append(name)
    steps.append(Step("decoder/fuse", functools.partial(Fuse, len(made)), tuple(made), has_input=False))
    finest = (finer or [deepest])[0]
    return Decoder(tuple(steps), WIDTH, finest.reduction, unit(encoder, levels), head_size=1)
