"""Vision transformers (Dosovitskiy et al., arXiv 2010.11929) for any grid, and self-supervised variants.

| | positions | registers | layer scale | layer norm epsilon |
|---|---|---|---|---|
| supervised (AugReg), MAE (arXiv 2111.06377) | learnt | 0 | no | 1e-6 |
| DINOv2 (arXiv 2304.07193, registers 2309.16588) | learnt | 0 or 4 | yes | 1e-6 |
| DINOv3 (arXiv 2508.10104) | rotary | 4 | yes | 1e-5 |

Groups: `stem`, `block1` to the last, `top`. Between groups the activation is tokens (b, n, c): the class
token, registers, and the patches of a square image row by row. Learnt positions are those of the pretraining
grid; for other image sizes they are resampled in the forward pass, so parameters keep their shapes.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.errors import UserError
from dapt_jax.models.attention import Attention, Mlp
from dapt_jax.models.encoder import Encoder, LayerGroup, Options
from dapt_jax.models.entry import register_model
from dapt_jax.models.layers import Conv, LayerNorm, StochasticDepth, dropout, split
from dapt_jax.models.parameters import LayerScale, Position, Token
from dapt_jax.models.preprocess import HALF, IMAGENET, Preprocess
from dapt_jax.parameters import BatchNormMode


class Variant(NamedTuple):
    """Settings of a family of pretrained transformers.

    Attributes:
        patch: Side of a patch in pixels.
        image_size: Side in pixels of the images that learnt positions are for.
        registers: Number of tokens besides the class token that correspond to no patch.
        has_scale: Whether residual branches have layer scale.
        is_rotary: Whether positions rotate queries and keys instead of being learnt.
        eps: Epsilon of layer norm.
        antialias: Whether learnt positions are smoothed where their grid shrinks: see `resampled`.
        preprocess: Preprocessing that the weights expect.
    """

    patch: int = 16
    image_size: int = 224
    registers: int = 0
    has_scale: bool = False
    is_rotary: bool = False
    eps: float = 1e-6
    antialias: bool = True
    preprocess: Preprocess = IMAGENET


class Size(NamedTuple):
    """Width and depth."""

    features: int
    blocks: int
    heads: int


SMALL, BASE, LARGE = Size(384, 12, 6), Size(768, 12, 12), Size(1024, 24, 16)
SUPERVISED = Variant(preprocess=HALF)
MAE = Variant()
DINOV2 = Variant(patch=14, image_size=518, has_scale=True, antialias=False)
DINOV2_REGISTERS = DINOV2._replace(registers=4, antialias=True)
DINOV3 = Variant(image_size=256, registers=4, has_scale=True, is_rotary=True, eps=1e-5)
ROTARY_BASE = 100.0
"""Ratio of the longest to the shortest period of the rotary positions."""


class Stem(nnx.Module):
    """Patches, class token, registers and learnt positions."""

    def __init__(self, variant: Variant, features: int, channels: int, drop: float):
        side = variant.image_size // variant.patch
        self.patch, self.drop, self.antialias = variant.patch, drop, variant.antialias
        self.conv = Conv(channels, features, variant.patch, stride=variant.patch, padding="VALID", bias=True)
        self.class_token = Token(jnp.zeros((1, 1, features)))
        registers = (1, variant.registers, features)
        self.register_tokens = Token(jnp.zeros(registers)) if variant.registers else None
        self.position = None if variant.is_rotary else Position(jnp.zeros((1, 1 + side**2, features)))

    def __call__(
        self, x: Float[Array, "b h w c"], mode: BatchNormMode, key: jax.Array | None = None
    ) -> Float[Array, "b n d"]:
        high, wide = x.shape[1:3]
        if high != wide or high % self.patch:
            near = max(min(high, wide) // self.patch, 1) * self.patch
            raise UserError(
                f"images of {high} x {wide} pixels: vision transformers take squares whose side is a "
                f"multiple of their patch's {self.patch}, such as {near} x {near}"
            )
        patches = self.conv(x)
        batch, side, _, features = patches.shape
        first = self.class_token[...].astype(x.dtype)
        patches = patches.reshape(batch, side**2, features)
        if self.position is not None:
            position = resampled(self.position[...], side, antialias=self.antialias).astype(x.dtype)
            first, patches = first + position[:, :1], patches + position[:, 1:]
        extra = (
            [first] if self.register_tokens is None else [first, self.register_tokens[...].astype(x.dtype)]
        )
        tokens = jnp.broadcast_to(
            jnp.concatenate(extra, 1), (batch, sum(part.shape[1] for part in extra), features)
        )
        return dropout(jnp.concatenate([tokens, patches], 1), self.drop, key)


def resampled(position: Float[Array, "1 n c"], side: int, *, antialias: bool = True) -> Float[Array, "1 m c"]:
    """Resample the positions of a square grid to another grid; the class token's is unchanged.

    With antialiasing as in timm and DINOv2 with registers: cubic convolution with coefficient -0.5, widened
    where the grid shrinks. Without, as DINOv2 without registers does: coefficient -0.75, four neighbours
    whatever the sizes, edges repeated.

    Args:
        position: Positions, the class token's first, then the grid's row by row.
        side: Side of the new grid.
        antialias: Whether to smooth.
    """
    old = round((position.shape[1] - 1) ** 0.5)
    if old == side:
        return position
    first, grid = position[:, :1], position[:, 1:].reshape(1, old, old, -1).astype(jnp.float32)
    if antialias:
        grid = jax.image.resize(grid, (1, side, side, grid.shape[-1]), "cubic")
    else:
        weights = cubic(old, side)
        grid = jnp.einsum("im,jn,bmnc->bijc", weights, weights, grid, precision="highest")
    return jnp.concatenate([first, grid.reshape(1, side**2, -1).astype(position.dtype)], 1)


def cubic(old: int, new: int) -> np.ndarray:
    """Return the matrix float32 (new, old) of cubic convolution along one axis, without antialiasing.

    Keys (1981) with coefficient -0.75, as PyTorch's and ONNX's default; pixel centres lie at halves, and
    places outside take the value at the edge.

    >>> cubic(3, 3).round(6).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]

    Args:
        old: Number of values.
        new: Number of values after resampling.
    """
    at = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        place = np.floor(at).astype(int) + offset
        distance = np.abs(at - place)
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
        np.add.at(matrix, (np.arange(new), np.clip(place, 0, old - 1)), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)


def rotation(side: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine and sine (side squared, size) of a square grid's positions.

    Half of the angles are those of rows, half those of columns. Positions run from -1 to 1 over the image
    whatever the grid (Siméoni et al., arXiv 2508.10104, section 3.2).

    Args:
        side: Side of the grid.
        size: Channels of a head.
    """
    centres = 2 * (np.arange(side, dtype=np.float32) + 0.5) / side - 1
    periods = ROTARY_BASE ** (np.arange(size // 4, dtype=np.float32) / (size // 4))
    rows, columns = np.meshgrid(centres, centres, indexing="ij")
    angles = np.stack([rows.ravel(), columns.ravel()], 1)[:, :, None] * (2 * np.pi / periods)
    angles = np.tile(angles.reshape(side**2, size // 2), 2).astype(np.float32)
    return np.cos(angles), np.sin(angles)


class Block(nnx.Module):
    """Pre-norm block: attention and an MLP, each after a layer norm and added to its input."""

    def __init__(self, variant: Variant, size: Size, options: Options, stochastic_depth: StochasticDepth):
        features = size.features
        self.norm1 = LayerNorm(features, eps=variant.eps)
        self.attention = Attention(features, size.heads, qkv_bias=not variant.is_rotary)
        self.gamma1 = LayerScale(jnp.zeros(features)) if variant.has_scale else None
        self.norm2 = LayerNorm(features, eps=variant.eps)
        self.mlp = Mlp(features, options.dropout)
        self.gamma2 = LayerScale(jnp.zeros(features)) if variant.has_scale else None
        self.extra, self.is_rotary = 1 + variant.registers, variant.is_rotary
        self.head_size, self.dropout = features // size.heads, options.dropout
        self.stochastic_depth = stochastic_depth

    def __call__(
        self, x: Float[Array, "b n c"], mode: BatchNormMode, key: jax.Array | None = None
    ) -> Float[Array, "b n c"]:
        keys = split(key, 4)
        turn = rotation(grid_side(x, self.extra), self.head_size) if self.is_rotary else None

        def attend(x: jax.Array) -> jax.Array:
            y = dropout(self.attention(self.norm1(x), rotation=turn), self.dropout, keys[0])
            return _scaled(y, self.gamma1)

        def mix(x: jax.Array) -> jax.Array:
            return _scaled(self.mlp(self.norm2(x), keys[2]), self.gamma2)

        x = self.stochastic_depth.add(x, attend, keys[1])
        return self.stochastic_depth.add(x, mix, keys[3])


def _scaled(y: jax.Array, gamma: LayerScale | None) -> jax.Array:
    return y if gamma is None else y * gamma[...].astype(y.dtype)


class Top(nnx.Module):
    """Layer norm."""

    def __init__(self, features: int, eps: float):
        self.norm = LayerNorm(features, eps=eps)

    def __call__(self, x: Float[Array, "b n c"], mode: BatchNormMode) -> Float[Array, "b n c"]:
        return self.norm(x)


def grid_side(x: Float[Array, "b n c"], extra: int) -> int:
    """Return the side of the grid of patches among tokens, `extra` of which are not patches."""
    return round((x.shape[1] - extra) ** 0.5)


def as_map(extra: int, x: Float[Array, "b n c"]) -> Float[Array, "b h w c"]:
    """Return the patches among tokens as a map, dropping the `extra` first tokens."""
    side = grid_side(x, extra)
    return x[:, extra:].reshape(x.shape[0], side, side, x.shape[2])


def network(name: str, size: Size, variant: Variant, options: Options) -> Encoder:
    """Return a transformer; its pyramid levels are four blocks at equal distances, including the last."""
    reduction = variant.patch
    make: Callable[[], nnx.Module] = functools.partial(
        Stem, variant, size.features, options.channels, options.dropout
    )
    is_stochastic = options.dropout > 0
    groups = [LayerGroup("stem", make, size.features, reduction, level=False, is_stochastic=is_stochastic)]
    for number, stochastic_depth in enumerate(options.stochastic_depths(size.blocks), 1):
        make = functools.partial(Block, variant, size, options, stochastic_depth)
        is_level = number * 4 % size.blocks < 4 if size.blocks >= 4 else None
        groups.append(
            LayerGroup(
                f"block{number}",
                make,
                size.features,
                reduction,
                level=is_level or None,
                is_stochastic=is_stochastic or stochastic_depth.rate > 0,
            )
        )
    top = functools.partial(Top, size.features, variant.eps)
    groups.append(LayerGroup("top", top, size.features, reduction, level=False))
    return Encoder(
        name,
        groups,
        preprocess=variant.preprocess.for_channels(options.channels),
        image_size=variant.image_size,
        as_map=functools.partial(as_map, 1 + variant.registers),
        token_patch=0 if variant.is_rotary else variant.patch,  # rotary positions are those of a whole grid
    )


VARIANTS: dict[str, Variant] = {}
"""Settings of every registered transformer by its name."""

_SIZES = {"small": SMALL, "base": BASE, "large": LARGE}
_VARIANTS = (
    ("vit_{}", SUPERVISED, "vit_{}_patch16_224", tuple(_SIZES)),
    ("vit_{}_mae", MAE, "vit_{}_patch16_224", ("base", "large")),
    ("vit_{}_dinov2", DINOV2, "vit_{}_patch14_dinov2", tuple(_SIZES)),
    ("vit_{}_dinov2_registers", DINOV2_REGISTERS, "vit_{}_patch14_reg4_dinov2", tuple(_SIZES)),
    ("vit_{}_dinov3", DINOV3, "vit_{}_patch16_dinov3", tuple(_SIZES)),
)
_TORCHVISION = {"vit_base": "vit_b_16", "vit_large": "vit_l_16"}
for _name, _variant, _timm, _sizes in _VARIANTS:
    for _size in _sizes:
        _full = _name.format(_size)
        _register = register_model(_full, timm=_timm.format(_size), torchvision=_TORCHVISION.get(_full, ""))
        VARIANTS[_full] = _variant
        _register(functools.partial(network, _full, _SIZES[_size], _variant))
