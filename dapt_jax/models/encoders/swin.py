"""Swin transformers (Liu et al., arXiv 2103.14030) for any image size, with borders as in torchvision."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.models.attention import Attention, Mlp
from dapt_jax.models.encoder import DEFAULT, Encoder, LayerGroup, Options
from dapt_jax.models.entry import register_model
from dapt_jax.models.layers import Conv, Dense, LayerNorm, StochasticDepth, dropout, split
from dapt_jax.models.parameters import RelativePositionBias
from dapt_jax.models.preprocess import IMAGENET
from dapt_jax.parameters import BatchNormMode

WINDOW = 7
_EPS = 1e-5
_APART = -100.0
"""Attention bias between two patches of a shifted window that are not neighbours in the image."""


class Stem(nnx.Module):
    """4x4 patches at stride 4, and layer norm."""

    def __init__(self, channels: int, features: int):
        self.conv = Conv(channels, features, 4, stride=4, padding="VALID", bias=True)
        self.norm = LayerNorm(features, eps=_EPS)

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h4 w4 d"]:
        return self.norm(self.conv(x))


class Merge(nnx.Module):
    """Patch merging: layer norm of concatenated 2x2 patches, and a dense layer to half of their channels."""

    def __init__(self, features: int):
        self.norm = LayerNorm(4 * features, eps=_EPS)
        self.reduce = Dense(4 * features, 2 * features, bias=False)

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h2 w2 d"]:
        batch, high, wide, features = x.shape
        x = jnp.pad(x, ((0, 0), (0, high % 2), (0, wide % 2), (0, 0)))
        windows = x.reshape(batch, -(-high // 2), 2, -(-wide // 2), 2, features)
        # Among the four, the pixel below comes before the one on the right.
        joined = windows.transpose(0, 1, 3, 4, 2, 5).reshape(
            batch, -(-high // 2), -(-wide // 2), 4 * features
        )
        return self.reduce(self.norm(joined))


class Block(nnx.Module):
    """Pre-norm block: attention within windows, shifted or not, and an MLP, each added to its input."""

    def __init__(
        self, features: int, heads: int, shift: int, options: Options, stochastic_depth: StochasticDepth
    ):
        self.norm1 = LayerNorm(features, eps=_EPS)
        self.attention = Attention(features, heads)
        self.relative_bias = RelativePositionBias(jnp.zeros(((2 * WINDOW - 1) ** 2, heads)))
        self.norm2 = LayerNorm(features, eps=_EPS)
        self.mlp = Mlp(features, options.dropout)
        self.shift, self.dropout, self.stochastic_depth = shift, options.dropout, stochastic_depth

    def __call__(
        self, x: Float[Array, "b h w c"], mode: BatchNormMode, key: jax.Array | None = None
    ) -> Float[Array, "b h w c"]:
        keys = split(key, 4)

        def attend(x: jax.Array) -> jax.Array:
            return dropout(self._attend(self.norm1(x)), self.dropout, keys[0])

        def mix(x: jax.Array) -> jax.Array:
            return self.mlp(self.norm2(x), keys[2])

        x = self.stochastic_depth.add(x, attend, keys[1])
        return self.stochastic_depth.add(x, mix, keys[3])

    def _attend(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, high, wide, features = x.shape
        rows, columns = -(-high // WINDOW), -(-wide // WINDOW)
        padded = jnp.pad(x, ((0, 0), (0, rows * WINDOW - high), (0, columns * WINDOW - wide), (0, 0)))
        # A side that is a single window has no neighbouring window to exchange with.
        shift = (self.shift if rows > 1 else 0, self.shift if columns > 1 else 0)
        if any(shift):
            padded = jnp.roll(padded, (-shift[0], -shift[1]), (1, 2))
        windows = padded.reshape(batch, rows, WINDOW, columns, WINDOW, features).transpose(0, 1, 3, 2, 4, 5)
        bias = self.relative_bias[...][relative_index(WINDOW)].transpose(2, 0, 1)[None]
        if any(shift):
            apart = jnp.asarray(_apart((rows, columns), shift))[:, None]
            bias = jnp.tile(bias + apart, (batch, 1, 1, 1))
        y = self.attention(windows.reshape(-1, WINDOW**2, features), bias=bias)
        y = y.reshape(batch, rows, columns, WINDOW, WINDOW, features).transpose(0, 1, 3, 2, 4, 5)
        y = y.reshape(padded.shape)
        if any(shift):
            y = jnp.roll(y, shift, (1, 2))
        return y[:, :high, :wide]


@functools.cache
def relative_index(window: int) -> np.ndarray:
    """Return, for each pair of positions in a window, the row of the bias table: (window^2, window^2)."""
    rows, columns = (each.ravel() for each in np.indices((window, window)))
    return (rows[:, None] - rows + window - 1) * (2 * window - 1) + columns[:, None] - columns + window - 1


@functools.cache
def _apart(counts: tuple[int, int], shift: tuple[int, int]) -> np.ndarray:
    """Return the attention mask of every window of a shifted image, (windows, window^2, window^2)."""
    regions = [
        np.repeat([0, 1, 2], [(count - 1) * WINDOW, WINDOW - by, by]) if by else np.zeros(count * WINDOW, int)
        for count, by in zip(counts, shift, strict=True)
    ]
    numbers = 3 * regions[0][:, None] + regions[1]
    windows = (
        numbers.reshape(counts[0], WINDOW, counts[1], WINDOW).transpose(0, 2, 1, 3).reshape(-1, WINDOW**2)
    )
    return np.where(windows[:, :, None] == windows[:, None], 0, _APART).astype(np.float32)


class Top(nnx.Module):
    """Layer norm."""

    def __init__(self, features: int):
        self.norm = LayerNorm(features, eps=_EPS)

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h w c"]:
        return self.norm(x)


def network(
    name: str, features: int, depths: Sequence[int], heads: Sequence[int], options: Options
) -> Encoder:
    """Return the groups `stem`, `stage1/block1`, ..., `stage2/merge`, `stage2/block1`, ..., `top`."""
    make: Callable[[], nnx.Module] = functools.partial(Stem, options.channels, features)
    groups = [LayerGroup("stem", make, features, 4)]
    reduction = 4
    stochastic_depths = iter(options.stochastic_depths(sum(depths)))
    for stage, (depth, count) in enumerate(zip(depths, heads, strict=True), 1):
        if stage > 1:
            make = functools.partial(Merge, features)
            features, reduction = 2 * features, 2 * reduction
            groups.append(LayerGroup(f"stage{stage}/merge", make, features, reduction))
        for number in range(1, depth + 1):
            stochastic_depth, shift = next(stochastic_depths), 0 if number % 2 else WINDOW // 2
            make = functools.partial(Block, features, count, shift, options, stochastic_depth)
            is_stochastic = stochastic_depth.rate > 0 or options.dropout > 0
            groups.append(
                LayerGroup(
                    f"stage{stage}/block{number}", make, features, reduction, is_stochastic=is_stochastic
                )
            )
    groups.append(LayerGroup("top", functools.partial(Top, features), features, reduction, level=False))
    return Encoder(name, groups, preprocess=IMAGENET.for_channels(options.channels))


@register_model("swin_tiny", timm="swin_tiny_patch4_window7_224", torchvision="swin_t")
def swin_tiny(options: Options = DEFAULT) -> Encoder:
    """Swin-T: 768 features, 27,519,354 parameters without a head."""
    return network("swin_tiny", 96, (2, 2, 6, 2), (3, 6, 12, 24), options)


@register_model("swin_small", timm="swin_small_patch4_window7_224", torchvision="swin_s")
def swin_small(options: Options = DEFAULT) -> Encoder:
    """Swin-S: 768 features, 48,837,258 parameters without a head."""
    return network("swin_small", 96, (2, 2, 18, 2), (3, 6, 12, 24), options)


@register_model("swin_base", timm="swin_base_patch4_window7_224", torchvision="swin_b")
def swin_base(options: Options = DEFAULT) -> Encoder:
    """Swin-B: 1024 features, 86,743,224 parameters without a head."""
    return network("swin_base", 128, (2, 2, 18, 2), (4, 8, 16, 32), options)
