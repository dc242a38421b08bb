"""ConvNeXt (Liu et al., arXiv 2201.03545): a residual network with the proportions of a transformer."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.models.encoder import DEFAULT, Encoder, LayerGroup, Options
from dapt_jax.models.entry import register_model
from dapt_jax.models.layers import Conv, Dense, LayerNorm, StochasticDepth
from dapt_jax.models.parameters import LayerScale
from dapt_jax.models.preprocess import IMAGENET
from dapt_jax.ops import gelu
from dapt_jax.parameters import BatchNormMode

_THREE = ((3, 3), (3, 3))


class Stem(nnx.Module):
    """4x4 patches at stride 4, and layer norm."""

    def __init__(self, channels: int, features: int):
        self.conv = Conv(channels, features, 4, stride=4, padding="VALID", bias=True)
        self.norm = LayerNorm(features)

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h4 w4 d"]:
        return self.norm(self.conv(x))


class Downsample(nnx.Module):
    """Layer norm, and 2x2 patches at stride 2."""

    def __init__(self, inputs: int, outputs: int):
        self.norm = LayerNorm(inputs)
        self.conv = Conv(inputs, outputs, 2, stride=2, padding="VALID", bias=True)

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h2 w2 d"]:
        return self.conv(self.norm(x))


class Block(nnx.Module):
    """7x7 depthwise convolution, layer norm, an MLP of four times the width, and layer scale."""

    def __init__(self, features: int, stochastic_depth: StochasticDepth):
        self.depthwise = Conv(features, features, 7, padding=_THREE, groups=features, bias=True)
        self.norm = LayerNorm(features)
        self.expand = Dense(features, 4 * features)
        self.project = Dense(4 * features, features)
        self.gamma = LayerScale(jnp.zeros(features))
        self.stochastic_depth = stochastic_depth

    def __call__(
        self, x: Float[Array, "b h w c"], mode: BatchNormMode, key: jax.Array | None = None
    ) -> Float[Array, "b h w c"]:
        def branch(x: jax.Array) -> jax.Array:
            y = self.norm(self.depthwise(x))
            return self.project(gelu(self.expand(y))) * self.gamma[...].astype(x.dtype)

        return self.stochastic_depth.add(x, branch, key)


class Top(nnx.Module):
    """Global average pooling to a map of one pixel, and layer norm."""

    def __init__(self, features: int):
        self.norm = LayerNorm(features)

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b 1 1 c"]:
        return self.norm(x.mean((1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype))


def network(name: str, depths: Sequence[int], widths: Sequence[int], options: Options) -> Encoder:
    """Return the groups `stem`, `stage1/block1`, ..., `stage2/downsample`, `stage2/block1`, ..., `top`."""
    make: Callable[[], nnx.Module] = functools.partial(Stem, options.channels, widths[0])
    groups = [LayerGroup("stem", make, widths[0], 4)]
    reduction, previous = 4, widths[0]
    stochastic_depths = iter(options.stochastic_depths(sum(depths)))
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
        if stage > 1:
            reduction *= 2
            make = functools.partial(Downsample, previous, width)
            groups.append(LayerGroup(f"stage{stage}/downsample", make, width, reduction))
        for number in range(1, depth + 1):
            stochastic_depth = next(stochastic_depths)
            make = functools.partial(Block, width, stochastic_depth)
            groups.append(
                LayerGroup(
                    f"stage{stage}/block{number}",
                    make,
                    width,
                    reduction,
                    is_stochastic=stochastic_depth.rate > 0,
                )
            )
        previous = width
    groups.append(LayerGroup("top", functools.partial(Top, previous), previous, 0, level=False))
    return Encoder(name, groups, preprocess=IMAGENET.for_channels(options.channels))


@register_model("convnext_tiny", timm="convnext_tiny", torchvision="convnext_tiny")
def convnext_tiny(options: Options = DEFAULT) -> Encoder:
    """ConvNeXt-T: 768 features, 27,820,128 parameters without a head."""
    return network("convnext_tiny", (3, 3, 9, 3), (96, 192, 384, 768), options)


@register_model("convnext_small", timm="convnext_small", torchvision="convnext_small")
def convnext_small(options: Options = DEFAULT) -> Encoder:
    """ConvNeXt-S: 768 features, 49,454,688 parameters without a head."""
    return network("convnext_small", (3, 3, 27, 3), (96, 192, 384, 768), options)


@register_model("convnext_base", timm="convnext_base", torchvision="convnext_base")
def convnext_base(options: Options = DEFAULT) -> Encoder:
    """ConvNeXt-B: 1024 features, 87,566,464 parameters without a head."""
    return network("convnext_base", (3, 3, 27, 3), (128, 256, 512, 1024), options)
