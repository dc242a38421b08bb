"""Densely connected networks (Huang et al., arXiv 1608.06993) as in torchvision and in Keras.

The two differ only in the epsilon and momentum of batch norm.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax import ops
from dapt_jax.models.encoder import DEFAULT, Encoder, LayerGroup, Options
from dapt_jax.models.entry import register_model
from dapt_jax.models.layers import BatchNorm, Conv, average_pool
from dapt_jax.models.preprocess import IMAGENET
from dapt_jax.parameters import BatchNormMode

STEM_FEATURES = 64
GROWTH = 32
_BOTTLENECK = 4 * GROWTH
_ONE = ((1, 1), (1, 1))


class Norm(NamedTuple):
    """Batch-norm settings of a family of pretrained networks."""

    eps: float
    momentum: float

    def __call__(self, features: int) -> BatchNorm:
        """Return a batch norm layer."""
        return BatchNorm(features, eps=self.eps, momentum=self.momentum)


TORCHVISION = Norm(1e-5, 0.9)
KERAS = Norm(1.001e-5, 0.99)


class Stem(nnx.Module):
    """7x7 convolution at stride 2, batch norm, ReLU and a 3x3 max-pool at stride 2."""

    def __init__(self, norm: Norm, channels: int):
        self.conv = Conv(channels, STEM_FEATURES, 7, stride=2, padding=((3, 3), (3, 3)))
        self.norm = norm(STEM_FEATURES)

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h4 w4 64"]:
        return self.tapped(x, mode)[0]

    def tapped(
        self, x: Float[Array, "b h w c"], mode: BatchNormMode
    ) -> tuple[Float[Array, "b h4 w4 64"], Float[Array, "b h2 w2 64"]]:
        """Return the output, and the map before the max-pool."""
        x = jax.nn.relu(self.norm(self.conv(x), mode))
        return ops.max_pool(x, 3, 2, _ONE), x


class Layer(nnx.Module):
    """A 1x1 and a 3x3 convolution, each after norm and ReLU; the output is concatenated to the input."""

    def __init__(self, norm: Norm, inputs: int):
        self.norm1, self.conv1 = norm(inputs), Conv(inputs, _BOTTLENECK, 1)
        self.norm2, self.conv2 = norm(_BOTTLENECK), Conv(_BOTTLENECK, GROWTH, 3, padding=_ONE)

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h w d"]:
        y = self.conv1(jax.nn.relu(self.norm1(x, mode)))
        y = self.conv2(jax.nn.relu(self.norm2(y, mode)))
        return jnp.concatenate([x, y], -1)


class Transition(nnx.Module):
    """Halves channels by a 1x1 convolution and sides by an average pool."""

    def __init__(self, norm: Norm, inputs: int):
        self.norm, self.conv = norm(inputs), Conv(inputs, inputs // 2, 1)

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h2 w2 d"]:
        return average_pool(self.conv(jax.nn.relu(self.norm(x, mode))))


class Top(nnx.Module):
    """Batch norm and ReLU."""

    def __init__(self, norm: Norm, inputs: int):
        self.norm = norm(inputs)

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h w c"]:
        return jax.nn.relu(self.norm(x, mode))


def network(name: str, depths: Sequence[int], norm: Norm, options: Options) -> Encoder:
    """Return groups `stem`, `stage1/layer1`, ..., `stage1/transition`, ..., `top`.

    `depths` is the number of layers per stage.
    """
    make: Callable[[], nnx.Module] = functools.partial(Stem, norm, options.channels)
    groups = [LayerGroup("stem", make, STEM_FEATURES, 4, intermediate=(STEM_FEATURES, 2))]
    features, reduction = STEM_FEATURES, 4
    for stage, depth in enumerate(depths, 1):
        for number in range(1, depth + 1):
            make = functools.partial(Layer, norm, features)
            features += GROWTH
            groups.append(LayerGroup(f"stage{stage}/layer{number}", make, features, reduction))
        if stage < len(depths):
            make = functools.partial(Transition, norm, features)
            features, reduction = features // 2, 2 * reduction
            groups.append(LayerGroup(f"stage{stage}/transition", make, features, reduction))
    groups.append(LayerGroup("top", functools.partial(Top, norm, features), features, reduction))
    return Encoder(name, groups, preprocess=IMAGENET.for_channels(options.channels))


@register_model("densenet121", timm="densenet121", torchvision="densenet121")
def densenet121(options: Options = DEFAULT) -> Encoder:
    """DenseNet-121 as in torchvision: 1024 features, 6,953,856 parameters without a head."""
    return network("densenet121", (6, 12, 24, 16), TORCHVISION, options)


@register_model("densenet169", timm="densenet169", torchvision="densenet169")
def densenet169(options: Options = DEFAULT) -> Encoder:
    """DenseNet-169 as in torchvision: 1664 features, 12,484,480 parameters without a head."""
    return network("densenet169", (6, 12, 32, 32), TORCHVISION, options)


@register_model("densenet121_keras")
def densenet121_keras(options: Options = DEFAULT) -> Encoder:
    """DenseNet-121 as in Keras."""
    return network("densenet121_keras", (6, 12, 24, 16), KERAS, options)


@register_model("densenet169_keras")
def densenet169_keras(options: Options = DEFAULT) -> Encoder:
    """DenseNet-169 as in Keras."""
    return network("densenet169_keras", (6, 12, 32, 32), KERAS, options)
