"""Residual networks (He et al., arXiv 1512.03385) as torchvision and as Keras build them.

The two differ where it matters to pretrained weights:

| | torchvision ("v1.5") | Keras `ResNet50` ("v1") |
|---|---|---|
| stride of a bottleneck | on the 3x3 convolution | on the first 1x1 convolution |
| convolution biases | none | all |
| batch norm epsilon | 1e-5 | 1.001e-5 |
| padding at 3x3 stride 1 | 1 pixel | "SAME", which is 1 pixel |
| input | RGB, ImageNet mean and deviation | BGR, ImageNet mean only |
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax import ops
from dapt_jax.models.encoder import Encoder, Group, NormMode, Preprocess
from dapt_jax.models.layers import BatchNorm, Conv

STEM_FEATURES = 64
_WIDTHS = (64, 128, 256, 512)

TORCHVISION_INPUT = Preprocess(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
KERAS_INPUT = Preprocess(mean=(103.939, 116.779, 123.68), std=(1.0, 1.0, 1.0), bgr=True)


class Flavour(NamedTuple):
    """What sets one family of pretrained residual networks apart from another."""

    bias: bool
    eps: float
    momentum: float
    stride_on_first: bool

    def conv(self, inputs: int, outputs: int, size: int, stride: int = 1) -> Conv:
        """A convolution padded by (size - 1) / 2 on every side."""
        pad = (size - 1) // 2
        return Conv(inputs, outputs, size, stride=stride, padding=((pad, pad), (pad, pad)), bias=self.bias)

    def norm(self, features: int) -> BatchNorm:
        """A batch norm."""
        return BatchNorm(features, eps=self.eps, momentum=self.momentum)


TORCHVISION = Flavour(bias=False, eps=1e-5, momentum=0.9, stride_on_first=False)
KERAS = Flavour(bias=True, eps=1.001e-5, momentum=0.99, stride_on_first=True)


class Stem(nnx.Module):
    """7x7 convolution at stride 2, batch norm, ReLU and a 3x3 max-pool at stride 2."""

    def __init__(self, flavour: Flavour):
        self.conv = flavour.conv(3, STEM_FEATURES, 7, 2)
        self.norm = flavour.norm(STEM_FEATURES)

    def __call__(self, x: Float[Array, "b h w 3"], norm: NormMode) -> Float[Array, "b h4 w4 64"]:
        x = jax.nn.relu(self.norm(self.conv(x), norm))
        # Keras pads with zeros, torchvision with minus infinity: behind a ReLU the maximum is the same.
        return ops.max_pool(x, 3, 2, ((1, 1), (1, 1)))


class _Residual(nnx.Module):
    """What both kinds of block share: the skip, projected where the shape changes."""

    def __init__(self, flavour: Flavour, inputs: int, outputs: int, stride: int):
        has_projection = stride > 1 or inputs != outputs
        self.conv_skip = flavour.conv(inputs, outputs, 1, stride) if has_projection else None
        self.norm_skip = flavour.norm(outputs) if has_projection else None

    def skip(self, x: Float[Array, "b h w c"], norm: NormMode) -> Float[Array, "b h2 w2 d"]:
        """The input, in the shape of the block's output."""
        if self.conv_skip is None or self.norm_skip is None:
            return x
        return self.norm_skip(self.conv_skip(x), norm)


class BasicBlock(_Residual):
    """Two 3x3 convolutions (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, flavour: Flavour, inputs: int, width: int, stride: int):
        super().__init__(flavour, inputs, width, stride)
        self.conv1, self.norm1 = flavour.conv(inputs, width, 3, stride), flavour.norm(width)
        self.conv2, self.norm2 = flavour.conv(width, width, 3), flavour.norm(width)

    def __call__(self, x: Float[Array, "b h w c"], norm: NormMode) -> Float[Array, "b h2 w2 d"]:
        y = jax.nn.relu(self.norm1(self.conv1(x), norm))
        y = self.norm2(self.conv2(y), norm)
        return jax.nn.relu(self.skip(x, norm) + y)


class Bottleneck(_Residual):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide (ResNet-50 and deeper)."""

    expansion = 4

    def __init__(self, flavour: Flavour, inputs: int, width: int, stride: int):
        super().__init__(flavour, inputs, self.expansion * width, stride)
        first, second = (stride, 1) if flavour.stride_on_first else (1, stride)
        self.conv1, self.norm1 = flavour.conv(inputs, width, 1, first), flavour.norm(width)
        self.conv2, self.norm2 = flavour.conv(width, width, 3, second), flavour.norm(width)
        self.conv3, self.norm3 = flavour.conv(width, self.expansion * width, 1), flavour.norm(self.expansion * width)

    def __call__(self, x: Float[Array, "b h w c"], norm: NormMode) -> Float[Array, "b h2 w2 d"]:
        y = jax.nn.relu(self.norm1(self.conv1(x), norm))
        y = jax.nn.relu(self.norm2(self.conv2(y), norm))
        y = self.norm3(self.conv3(y), norm)
        return jax.nn.relu(self.skip(x, norm) + y)


def _group(name: str, make: Callable[[], nnx.Module], features: int, reduction: int) -> Group:
    return Group(name, lambda rngs: make(), features, reduction)


def _resnet(
    name: str,
    block: type[BasicBlock] | type[Bottleneck],
    depths: Sequence[int],
    flavour: Flavour,
    preprocess: Preprocess,
) -> Encoder:
    """Lays out the groups `stem`, `stage1/block1`, ... of a residual network with `depths` blocks per stage."""
    groups = [_group("stem", functools.partial(Stem, flavour), STEM_FEATURES, 4)]
    features, reduction = STEM_FEATURES, 4
    for stage, (depth, width) in enumerate(zip(depths, _WIDTHS, strict=True), 1):
        for number in range(1, depth + 1):
            stride = 2 if stage > 1 and number == 1 else 1
            make = functools.partial(block, flavour, features, width, stride)
            features, reduction = block.expansion * width, reduction * stride
            groups.append(_group(f"stage{stage}/block{number}", make, features, reduction))
    return Encoder(name, groups, preprocess=preprocess)


def resnet18() -> Encoder:
    """ResNet-18 as torchvision has it: 512 features, 11,176,512 parameters without a head."""
    return _resnet("resnet18", BasicBlock, (2, 2, 2, 2), TORCHVISION, TORCHVISION_INPUT)


def resnet34() -> Encoder:
    """ResNet-34 as torchvision has it: 512 features, 21,284,672 parameters without a head."""
    return _resnet("resnet34", BasicBlock, (3, 4, 6, 3), TORCHVISION, TORCHVISION_INPUT)


def resnet50() -> Encoder:
    """ResNet-50 as torchvision has it ("v1.5"): 2048 features, 23,508,032 parameters without a head."""
    return _resnet("resnet50", Bottleneck, (3, 4, 6, 3), TORCHVISION, TORCHVISION_INPUT)


def resnet50_keras() -> Encoder:
    """ResNet-50 as Keras has it ("v1"), the encoder of arXiv 2204.13280: 2048 features."""
    return _resnet("resnet50_keras", Bottleneck, (3, 4, 6, 3), KERAS, KERAS_INPUT)
