"""EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation and with ReLU6, stem and head widths fixed.

Architecture: Tan & Le, arXiv 1905.11946, table 1; inverted residuals: Sandler et al., arXiv 1801.04381. The Lite variant is
the TensorFlow team's (tensorflow/tpu, efficientnet/lite). Convolutions pad as TensorFlow's "SAME" does: at stride 2 an even
side gets its zeros behind the last pixel, which weights trained so depend on.
"""

import functools
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.models.encoder import DEFAULT, Encoder, NormMode, Options, group
from dapt_jax.models.layers import BatchNorm, Conv
from dapt_jax.models.preprocess import Preprocess

_NORM = {"eps": 1e-3, "momentum": 0.99}
STEM_FEATURES = 32
TOP_FEATURES = 1280


class Stage(NamedTuple):
    """A row of the architecture's table; the stride is the first block's, the others have 1."""

    blocks: int
    size: int
    stride: int
    expansion: int
    features: int


LITE0 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class ConvNormRelu6(nnx.Module):
    """Convolution, batch norm, ReLU6: the stem, and the 1x1 convolution on top."""

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1):
        self.conv = Conv(inputs, outputs, size, stride=stride)
        self.norm = BatchNorm(outputs, **_NORM)

    def __call__(self, x: Float[Array, "b h w c"], norm: NormMode) -> Float[Array, "b h2 w2 d"]:
        return jax.nn.relu6(self.norm(self.conv(x), norm))


class InvertedResidual(nnx.Module):
    """1x1 expansion (none at a ratio of 1), depthwise convolution, linear 1x1 projection, and a skip where shapes allow."""

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int, expansion: int):
        wide = inputs * expansion
        self.expand = Conv(inputs, wide, 1) if expansion > 1 else None
        self.norm_expand = BatchNorm(wide, **_NORM) if expansion > 1 else None
        self.depthwise = Conv(wide, wide, size, stride=stride, groups=wide)
        self.norm_depthwise = BatchNorm(wide, **_NORM)
        self.project = Conv(wide, outputs, 1)
        self.norm_project = BatchNorm(outputs, **_NORM)
        self.has_skip = stride == 1 and inputs == outputs

    def __call__(self, x: Float[Array, "b h w c"], norm: NormMode) -> Float[Array, "b h2 w2 d"]:
        y = x
        if self.expand is not None and self.norm_expand is not None:
            y = jax.nn.relu6(self.norm_expand(self.expand(y), norm))
        y = jax.nn.relu6(self.norm_depthwise(self.depthwise(y), norm))
        y = self.norm_project(self.project(y), norm)
        return x + y if self.has_skip else y


def efficientnet_lite0(options: Options = DEFAULT) -> Encoder:
    """EfficientNet-Lite0 with 16 blocks and 1280 features.

    Groups: `stem`, `stage1/block1` to `stage7/block1`, `top`. With a 1000-way head: 4,652,008 parameters.
    """
    stem = functools.partial(ConvNormRelu6, options.channels, STEM_FEATURES, 3, stride=2)
    groups = [group("stem", stem, STEM_FEATURES, 2)]
    features, reduction = STEM_FEATURES, 2
    for number, stage in enumerate(LITE0, 1):
        for block in range(1, stage.blocks + 1):
            stride = stage.stride if block == 1 else 1
            make = functools.partial(
                InvertedResidual, features, stage.features, stage.size, stride=stride, expansion=stage.expansion
            )
            features, reduction = stage.features, reduction * stride
            groups.append(group(f"stage{number}/block{block}", make, features, reduction))
    top = functools.partial(ConvNormRelu6, features, TOP_FEATURES, 1)
    groups.append(group("top", top, TOP_FEATURES, reduction, level=False))
    preprocess = Preprocess(mean=(127.0,) * 3, std=(128.0,) * 3)
    return Encoder("efficientnet_lite0", groups, preprocess=preprocess.for_channels(options.channels))
