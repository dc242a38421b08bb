"""The three encoders of "Enhancing pretraining efficiency for medical image segmentation" (arXiv 2410.18677).

They differ from their namesakes, and so do their weights (Zenodo record 13971513):

| | there | namesake |
|---|---|---|
| ResNet-50 | skips subsampled and filled up with zero channels | projected by 1x1 convolutions |
| Swin | two blocks in each of four stages, no layer norm at the end | 2, 2, 6 and 2, and a norm |
| U-Net | a 3x3 stem of 64 channels before the first stage, biases | neither |

All take images divided by 255. The paper's ResNet scales a branch by 1 - its rate of stochastic depth at test
time; here the inverse scales it during training, so that the network does not depend on the rate. Both are
the same function once scale and bias of the last norm of each block of theirs are multiplied by 1 - its rate:
of the released files, those of the advanced scheme, trained at .1, want this.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax import ops
from dapt_jax.models.encoder import DEFAULT, Encoder, LayerGroup, Options
from dapt_jax.models.encoders import resnet, swin, unet
from dapt_jax.models.entry import register_model
from dapt_jax.models.layers import BatchNorm, Conv, StochasticDepth
from dapt_jax.models.preprocess import UNIT
from dapt_jax.parameters import BatchNormMode


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions; the skip is subsampled and filled up with zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int, stochastic_depth: StochasticDepth):
        inner = outputs // 4
        conv, norm = resnet.TORCHVISION.conv, resnet.TORCHVISION.norm
        self.conv1, self.norm1 = conv(inputs, inner, 1), norm(inner)
        self.conv2, self.norm2 = conv(inner, inner, 3, stride), norm(inner)
        self.conv3, self.norm3 = conv(inner, outputs, 1), norm(outputs)
        self.stride, self.new, self.stochastic_depth = stride, outputs - inputs, stochastic_depth

    def __call__(
        self, x: Float[Array, "b h w c"], mode: BatchNormMode, key: jax.Array | None = None
    ) -> Float[Array, "b h2 w2 d"]:
        def branch(x: jax.Array) -> jax.Array:
            y = jax.nn.relu(self.norm1(self.conv1(x), mode))
            y = jax.nn.relu(self.norm2(self.conv2(y), mode))
            return self.norm3(self.conv3(y), mode)

        skip = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0),) * 3 + ((0, self.new),))
        return jax.nn.relu(self.stochastic_depth.add(x, branch, key, skip))


class DoubleConv(nnx.Module):
    """Two 3x3 convolutions with bias, batch norm and ReLU; `has_pool`: a 2x2 max-pool before them."""

    def __init__(self, inputs: int, outputs: int, *, has_pool: bool = False):
        pad = ((1, 1), (1, 1))
        self.conv1, self.norm1 = Conv(inputs, outputs, 3, padding=pad, bias=True), BatchNorm(outputs)
        self.conv2, self.norm2 = Conv(outputs, outputs, 3, padding=pad, bias=True), BatchNorm(outputs)
        self.has_pool = has_pool

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h2 w2 d"]:
        if self.has_pool:
            x = ops.max_pool(x, 2, 2)
        x = jax.nn.relu(self.norm1(self.conv1(x), mode))
        return jax.nn.relu(self.norm2(self.conv2(x), mode))


class Stem(nnx.Module):
    """A 3x3 convolution with bias."""

    def __init__(self, channels: int, outputs: int):
        self.conv = Conv(channels, outputs, 3, bias=True)

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h w d"]:
        return self.conv(x)


def residual_network(name: str, widths: Sequence[int], depths: Sequence[int], options: Options) -> Encoder:
    """Return the groups `stem`, `stage1/block1`, ... with `widths` output channels per stage."""
    stem = functools.partial(resnet.Stem, resnet.TORCHVISION, options.channels)
    features, reduction = resnet.STEM_FEATURES, 4
    groups = [LayerGroup("stem", stem, features, reduction, intermediate=(features, 2))]
    stochastic_depths = iter(options.stochastic_depths(sum(depths)))
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
        for number in range(1, depth + 1):
            stride, stochastic_depth = 2 if stage > 1 and number == 1 else 1, next(stochastic_depths)
            make = functools.partial(Bottleneck, features, width, stride, stochastic_depth)
            features, reduction = width, reduction * stride
            groups.append(
                LayerGroup(
                    f"stage{stage}/block{number}",
                    make,
                    features,
                    reduction,
                    is_stochastic=stochastic_depth.rate > 0,
                )
            )
    return Encoder(name, groups, preprocess=UNIT.for_channels(options.channels))


def contracting_path(name: str, widths: Sequence[int], options: Options) -> Encoder:
    """Return the groups `stem` and `stage1`, `stage2`, ... of `widths` channels, halved between stages."""
    make: Callable[[], nnx.Module] = functools.partial(Stem, options.channels, widths[0])
    groups = [LayerGroup("stem", make, widths[0], 1)]
    for number, (inputs, outputs) in enumerate(itertools.pairwise((widths[0], *widths)), 1):
        make = functools.partial(DoubleConv, inputs, outputs, has_pool=number > 1)
        groups.append(LayerGroup(f"stage{number}", make, outputs, 2 ** (number - 1)))
    return Encoder(name, groups, preprocess=UNIT.for_channels(options.channels))


def windowed_network(name: str, features: int, heads: Sequence[int], options: Options) -> Encoder:
    """Return the groups of a Swin transformer with two blocks in each stage, without its last norm."""
    whole = swin.network(name, features, (2,) * len(heads), heads, options)
    return Encoder(name, whole.specs[:-1], preprocess=UNIT.for_channels(options.channels))


@register_model("resnet50_hidy2024")
def resnet50_hidy2024(options: Options = DEFAULT) -> Encoder:
    """ResNet-50 without projections, of arXiv 2410.18677: 2048 features, 20,731,456 parameters."""
    return residual_network("resnet50_hidy2024", (256, 512, 1024, 2048), (3, 4, 6, 3), options)


@register_model("unet_hidy2024")
def unet_hidy2024(options: Options = DEFAULT) -> Encoder:
    """U-Net's contracting path with a stem, of arXiv 2410.18677: 1024 features, 18,888,064 parameters."""
    return contracting_path("unet_hidy2024", unet.WIDTHS, options)


@register_model("swin_hidy2024")
def swin_hidy2024(options: Options = DEFAULT) -> Encoder:
    """Swin transformer of 2, 2, 2 and 2 blocks, of arXiv 2410.18677: 768 features, 20,411,850 parameters."""
    return windowed_network("swin_hidy2024", 96, (3, 6, 12, 24), options)
