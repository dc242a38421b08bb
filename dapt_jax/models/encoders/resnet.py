"""Residual networks (He et al., arXiv 1512.03385) as torchvision and as Keras build them.

The two differ in ways that matter to pretrained weights:

| | torchvision ("v1.5") | Keras `ResNet50` ("v1") |
|---|---|---|
| stride of a bottleneck | on the 3x3 convolution | on the first 1x1 convolution |
| convolution biases | none | all |
| batch norm epsilon | 1e-5 | 1.001e-5 |
| padding at 3x3 stride 1 | 1 pixel | "SAME", which is 1 pixel |
| input | RGB, ImageNet mean and deviation | BGR, ImageNet mean only |

The D variant (He et al., arXiv 1812.01187, section 4) is torchvision's with three 3x3 convolutions for a stem
and an average pool before the projection of a skip. Wide residual networks (Zagoruyko & Komodakis, arXiv
1605.07146) widen the 3x3 convolution, ResNeXt (Xie et al., arXiv 1611.05431) splits it into groups.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax import ops
from dapt_jax.models.encoder import DEFAULT, Encoder, LayerGroup, Options
from dapt_jax.models.entry import register_model
from dapt_jax.models.layers import BatchNorm, Conv, ConvNormRelu, StochasticDepth, average_pool
from dapt_jax.models.preprocess import IMAGENET, Preprocess
from dapt_jax.parameters import BatchNormMode

STEM_FEATURES = 64
_WIDTHS = (64, 128, 256, 512)

KERAS_INPUT = Preprocess(mean=(103.939, 116.779, 123.68), std=(1.0, 1.0, 1.0), bgr=True)


class Flavour(NamedTuple):
    """Settings of a family of pretrained residual networks."""

    bias: bool
    eps: float
    momentum: float
    stride_on_first: bool
    is_deep: bool = False

    def conv(self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> Conv:
        """Return a convolution padded by (size - 1) / 2 on every side."""
        pad = (size - 1) // 2
        pads = ((pad, pad), (pad, pad))
        return Conv(inputs, outputs, size, stride=stride, padding=pads, groups=groups, bias=self.bias)

    def norm(self, features: int) -> BatchNorm:
        """Return a batch norm layer."""
        return BatchNorm(features, eps=self.eps, momentum=self.momentum)


TORCHVISION = Flavour(bias=False, eps=1e-5, momentum=0.9, stride_on_first=False)
TORCHVISION_D = TORCHVISION._replace(is_deep=True)
KERAS = Flavour(bias=True, eps=1.001e-5, momentum=0.99, stride_on_first=True)


class Shape(NamedTuple):
    """The 3x3 convolutions of bottlenecks: groups, and the width of one group in the first stage."""

    groups: int = 1
    base: int = 64


PLAIN = Shape()


class Stem(nnx.Module):
    """7x7 convolution at stride 2 (deep: three of 3x3), batch norm, ReLU and a 3x3 max-pool at stride 2."""

    def __init__(self, flavour: Flavour, channels: int):
        self.before = nnx.List()
        if flavour.is_deep:
            half = STEM_FEATURES // 2
            self.before += [ConvNormRelu(channels, half, 3, stride=2), ConvNormRelu(half, half, 3)]
            self.conv = flavour.conv(half, STEM_FEATURES, 3)
        else:
            self.conv = flavour.conv(channels, STEM_FEATURES, 7, 2)
        self.norm = flavour.norm(STEM_FEATURES)

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h4 w4 64"]:
        return self.tapped(x, mode)[0]

    def tapped(
        self, x: Float[Array, "b h w c"], mode: BatchNormMode
    ) -> tuple[Float[Array, "b h4 w4 64"], Float[Array, "b h2 w2 64"]]:
        """Return the output, and the map before the max-pool."""
        for layer in self.before:
            x = layer(x, mode)
        x = jax.nn.relu(self.norm(self.conv(x), mode))
        # Keras pads with zeros, torchvision with minus infinity: after a ReLU the maximum is the same.
        return ops.max_pool(x, 3, 2, ((1, 1), (1, 1))), x


class _Residual(nnx.Module):
    """Common part of both kinds of block: the skip, projected where the shape changes, and the sum."""

    def __init__(
        self, flavour: Flavour, inputs: int, outputs: int, stride: int, stochastic_depth: StochasticDepth
    ):
        has_projection = stride > 1 or inputs != outputs
        self.has_pool = flavour.is_deep and stride > 1
        self.conv_skip = (
            flavour.conv(inputs, outputs, 1, 1 if self.has_pool else stride) if has_projection else None
        )
        self.norm_skip = flavour.norm(outputs) if has_projection else None
        self.stochastic_depth = stochastic_depth

    def __call__(
        self, x: Float[Array, "b h w c"], mode: BatchNormMode, key: jax.Array | None = None
    ) -> Float[Array, "b h2 w2 d"]:
        skip = average_pool(x, ceil=True) if self.has_pool else x
        if self.conv_skip is not None and self.norm_skip is not None:
            skip = self.norm_skip(self.conv_skip(skip), mode)
        branch = functools.partial(self.branch, mode=mode)
        return jax.nn.relu(self.stochastic_depth.add(x, branch, key, skip))

    def branch(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h2 w2 d"]:
        """Return what is added to the skip."""
        raise NotImplementedError


class BasicBlock(_Residual):
    """Two 3x3 convolutions (ResNet-18 and -34)."""

    expansion = 1

    def __init__(
        self,
        flavour: Flavour,
        inputs: int,
        width: int,
        stride: int,
        stochastic_depth: StochasticDepth,
        shape: Shape,
    ):
        super().__init__(flavour, inputs, width, stride, stochastic_depth)
        self.conv1, self.norm1 = flavour.conv(inputs, width, 3, stride), flavour.norm(width)
        self.conv2, self.norm2 = flavour.conv(width, width, 3), flavour.norm(width)

    def branch(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h2 w2 d"]:
        y = jax.nn.relu(self.norm1(self.conv1(x), mode))
        return self.norm2(self.conv2(y), mode)


class Bottleneck(_Residual):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide (ResNet-50 and deeper)."""

    expansion = 4

    def __init__(
        self,
        flavour: Flavour,
        inputs: int,
        width: int,
        stride: int,
        stochastic_depth: StochasticDepth,
        shape: Shape,
    ):
        outputs, inner = self.expansion * width, width * shape.base // _WIDTHS[0] * shape.groups
        super().__init__(flavour, inputs, outputs, stride, stochastic_depth)
        first, second = (stride, 1) if flavour.stride_on_first else (1, stride)
        self.conv1, self.norm1 = flavour.conv(inputs, inner, 1, first), flavour.norm(inner)
        self.conv2, self.norm2 = flavour.conv(inner, inner, 3, second, shape.groups), flavour.norm(inner)
        self.conv3, self.norm3 = flavour.conv(inner, outputs, 1), flavour.norm(outputs)

    def branch(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h2 w2 d"]:
        y = jax.nn.relu(self.norm1(self.conv1(x), mode))
        y = jax.nn.relu(self.norm2(self.conv2(y), mode))
        return self.norm3(self.conv3(y), mode)


def network(
    name: str,
    block: type[BasicBlock] | type[Bottleneck],
    depths: Sequence[int],
    flavour: Flavour,
    options: Options,
    shape: Shape = PLAIN,
) -> Encoder:
    """Return the groups `stem`, `stage1/block1`, ... of a residual network with `depths` blocks per stage."""
    make: Callable[[], nnx.Module] = functools.partial(Stem, flavour, options.channels)
    groups = [LayerGroup("stem", make, STEM_FEATURES, 4, intermediate=(STEM_FEATURES, 2))]
    features, reduction = STEM_FEATURES, 4
    stochastic_depths = iter(options.stochastic_depths(sum(depths)))
    for stage, (depth, width) in enumerate(zip(depths, _WIDTHS, strict=True), 1):
        for number in range(1, depth + 1):
            stride, stochastic_depth = 2 if stage > 1 and number == 1 else 1, next(stochastic_depths)
            make = functools.partial(block, flavour, features, width, stride, stochastic_depth, shape)
            features, reduction = block.expansion * width, reduction * stride
            groups.append(
                LayerGroup(
                    f"stage{stage}/block{number}",
                    make,
                    features,
                    reduction,
                    is_stochastic=stochastic_depth.rate > 0,
                )
            )
    preprocess = KERAS_INPUT if flavour is KERAS else IMAGENET
    return Encoder(name, groups, preprocess=preprocess.for_channels(options.channels))


@register_model("resnet18", timm="resnet18", torchvision="resnet18")
def resnet18(options: Options = DEFAULT) -> Encoder:
    """ResNet-18 as in torchvision: 512 features, 11,176,512 parameters without a head."""
    return network("resnet18", BasicBlock, (2, 2, 2, 2), TORCHVISION, options)


@register_model("resnet34", timm="resnet34", torchvision="resnet34")
def resnet34(options: Options = DEFAULT) -> Encoder:
    """ResNet-34 as in torchvision: 512 features, 21,284,672 parameters without a head."""
    return network("resnet34", BasicBlock, (3, 4, 6, 3), TORCHVISION, options)


@register_model("resnet50", timm="resnet50", torchvision="resnet50")
def resnet50(options: Options = DEFAULT) -> Encoder:
    """ResNet-50 as in torchvision ("v1.5"): 2048 features, 23,508,032 parameters without a head."""
    return network("resnet50", Bottleneck, (3, 4, 6, 3), TORCHVISION, options)


@register_model("resnet101", timm="resnet101", torchvision="resnet101")
def resnet101(options: Options = DEFAULT) -> Encoder:
    """ResNet-101 as in torchvision: 2048 features, 42,500,160 parameters without a head."""
    return network("resnet101", Bottleneck, (3, 4, 23, 3), TORCHVISION, options)


@register_model("resnet152", timm="resnet152", torchvision="resnet152")
def resnet152(options: Options = DEFAULT) -> Encoder:
    """ResNet-152 as in torchvision: 2048 features, 58,143,808 parameters without a head."""
    return network("resnet152", Bottleneck, (3, 8, 36, 3), TORCHVISION, options)


@register_model("resnet50d", timm="resnet50d")
def resnet50d(options: Options = DEFAULT) -> Encoder:
    """ResNet-50-D as in timm: 2048 features, 23,527,264 parameters without a head."""
    return network("resnet50d", Bottleneck, (3, 4, 6, 3), TORCHVISION_D, options)


@register_model("wide_resnet50_2", timm="wide_resnet50_2", torchvision="wide_resnet50_2")
def wide_resnet50_2(options: Options = DEFAULT) -> Encoder:
    """Wide ResNet-50-2 as in torchvision: 2048 features, 66,834,240 parameters without a head."""
    return network("wide_resnet50_2", Bottleneck, (3, 4, 6, 3), TORCHVISION, options, Shape(base=128))


@register_model("resnext50", timm="resnext50_32x4d", torchvision="resnext50_32x4d")
def resnext50(options: Options = DEFAULT) -> Encoder:
    """ResNeXt-50 (32x4d) as in torchvision: 2048 features, 22,979,904 parameters without a head."""
    return network("resnext50", Bottleneck, (3, 4, 6, 3), TORCHVISION, options, Shape(groups=32, base=4))


@register_model("resnet50_keras")
def resnet50_keras(options: Options = DEFAULT) -> Encoder:
    """ResNet-50 as in Keras ("v1"), the encoder of arXiv 2204.13280: 2048 features."""
    return network("resnet50_keras", Bottleneck, (3, 4, 6, 3), KERAS, options)


@register_model("resnet101_keras")
def resnet101_keras(options: Options = DEFAULT) -> Encoder:
    """ResNet-101 as in Keras ("v1"): 2048 features."""
    return network("resnet101_keras", Bottleneck, (3, 4, 23, 3), KERAS, options)


@register_model("resnet152_keras")
def resnet152_keras(options: Options = DEFAULT) -> Encoder:
    """ResNet-152 as in Keras ("v1"): 2048 features."""
    return network("resnet152_keras", Bottleneck, (3, 8, 36, 3), KERAS, options)
