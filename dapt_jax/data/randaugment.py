"""RandAugment (Cubuk et al., arXiv 1909.13719) on the device, with one magnitude for all operations.

Operations are drawn per image and applied in sequence. Each belongs to one of four groups with its own
parameters: resampling, a table of 256 values per channel, the equalisation table, and blending with another
image. Under `vmap` a `lax.switch` runs every branch for every image, so four groups cost less than fourteen
operations. If images are processed one by one, as `Augment` does on a CPU, only the group that was drawn
runs.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from dapt_jax.data import colour, warp

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "saturation",
    "contrast",
    "sharpness", "posterise", "solarise", "autocontrast", "equalise",
)  # fmt: skip
MOVING = OPERATIONS[1:6]
"""Operations that move pixels; masks follow them."""
BLENDING = ("saturation", "sharpness")
STRONGEST = 30.0
"""Largest magnitude, at which each operation equals the last of the 31 bins of torchvision's RandAugment."""

_PART = np.array(
    [(name in MOVING) + 2 * (name in BLENDING) + 3 * (name == "equalise") for name in OPERATIONS]
)
"""Group in `images` of each operation: 0 is a table look-up."""
_SHEAR, _SHIFT, _DEGREES, _BLEND, _BITS = 0.3, 150 / 331, 30.0, 0.9, 4

Drawn = tuple[Int[Array, " number"], Int[Array, " number"]]
"""Numbers of operations, and 1 where an operation with two directions is reversed."""


def drawn(key: PRNGKeyArray, number: int) -> Drawn:
    """Draw operations uniformly, with replacement."""
    for_operation, for_direction = jax.random.split(key)
    operations = jax.random.randint(for_operation, (number,), 0, len(OPERATIONS))
    return operations, jax.random.bernoulli(for_direction, shape=(number,)).astype(jnp.int32)


def images(
    image: Float[Array, "h w 3"], operations: Drawn, magnitude: float, border: str = warp.MIRROR
) -> Float[Array, "h w 3"]:
    """Apply operations to an image.

    The image holds whole numbers from 0 to 255 before, between and after operations, as uint8 would.

    Args:
        image: Values 0 to 255.
        operations: Result of `drawn`.
        magnitude: Magnitude from 0 to `STRONGEST`.
        border: What lies beyond the image; see `warp.read`.
    """
    parts = [
        functools.partial(part, magnitude=magnitude)
        for part in (_looked_up, functools.partial(_moved, border=border), _blended, _equalised)
    ]

    def one(now: Array, operation: tuple[Array, Array]) -> tuple[Array, None]:
        return _whole(jax.lax.switch(jnp.asarray(_PART)[operation[0]], parts, now, *operation)), None

    return jax.lax.scan(one, _whole(image), operations)[0]


def masks(
    mask: Num[Array, "h w c"], operations: Drawn, magnitude: float, border: str = warp.MIRROR
) -> Num[Array, "h w c"]:
    """Apply the geometric operations of an image to its mask of integers; no new value appears."""
    return jax.lax.scan(lambda now, one: (_moved(now, *one, magnitude, border), None), mask, operations)[0]


def _strength(other_way: Int[Array, ""], magnitude: float) -> Float[Array, ""]:
    """Return the factor by which the difference from the blended image is scaled."""
    return jnp.where(other_way, 1 - _BLEND * magnitude / STRONGEST, 1 + _BLEND * magnitude / STRONGEST)


def _blended(
    image: Float[Array, "h w 3"], operation: Int[Array, ""], other_way: Int[Array, ""], magnitude: float
) -> Float[Array, "h w 3"]:
    """Blend an image with its grey or smoothed version, or extrapolate away from it."""
    is_colour = operation == OPERATIONS.index("saturation")
    base = jnp.where(is_colour, _whole(colour.grey(image))[..., None], _whole(_smoothed(image)))
    return base + _strength(other_way, magnitude) * (image - base)


def _looked_up(
    image: Float[Array, "h w 3"], operation: Int[Array, ""], other_way: Int[Array, ""], magnitude: float
) -> Float[Array, "h w 3"]:
    """Map each value by the table of the operation."""
    table = _whole(_table(image, operation, _strength(other_way, magnitude), magnitude))
    return table[jnp.arange(3), image.astype(jnp.int32)]


def _whole(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.clip(jnp.round(values), 0, 255)


def _moved(
    pixels: Num[Array, "h w c"],
    operation: Int[Array, ""],
    other_way: Int[Array, ""],
    magnitude: float,
    border: str = warp.MIRROR,
) -> Num[Array, "h w c"]:
    """Read pixels where the operation says."""
    height, width, _ = pixels.shape
    matrix = jnp.asarray(_matrices(height, width, magnitude))[other_way, operation]
    at = warp.identity(height, width)
    return warp.read(
        pixels,
        jnp.einsum("ij,jhw->ihw", matrix[:, :2], at, precision="highest") + matrix[:, 2, None, None],
        border,
    )


def _matrices(height: int, width: int, magnitude: float) -> Float[np.ndarray, "2 operations 2 3"]:
    """Return affine maps from a pixel's coordinates to its source, by direction and operation."""
    share = magnitude / STRONGEST
    found = np.tile(np.eye(2, 3), (2, len(OPERATIONS), 1, 1))
    for other_way, sign in enumerate((1.0, -1.0)):
        of = dict(zip(OPERATIONS, found[other_way], strict=True))
        shear, turn = sign * _SHEAR * share, sign * math.radians(_DEGREES * share)
        # A shear fixes the corner of the first pixel: half a pixel before the centre of that pixel.
        of["shear_x"][1] = (shear, 1, shear / 2)
        of["shear_y"][0] = (1, shear, shear / 2)
        of["translate_x"][1, 2] = -sign * math.floor(_SHIFT * share * width)
        of["translate_y"][0, 2] = -sign * math.floor(_SHIFT * share * height)
        rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        centre = np.array([(height - 1) / 2, (width - 1) / 2])
        of["rotate"][:] = np.column_stack([rotation, centre - rotation @ centre])
    return found.astype(np.float32)


def _table(
    image: Float[Array, "h w 3"], operation: Int[Array, ""], strength: Float[Array, ""], magnitude: float
) -> Float[Array, "3 256"]:
    """Return the new value of each value from 0 to 255, by channel."""
    values = jnp.arange(256.0)
    share = magnitude / STRONGEST
    step = 2 ** round(_BITS * share)
    mean = _whole(colour.grey(image)).mean()
    low, high = (bound((0, 1))[:, None] for bound in (image.min, image.max))
    spread = jnp.where(high > low, high - low, 1.0)
    by_name = {
        "brightness": strength * values,
        "contrast": mean + strength * (values - mean),
        "posterise": values // step * step,
        "solarise": jnp.where(values < 255 * (1 - share), values, 255 - values),
        "autocontrast": jnp.where(high > low, (values - low) * 255 / spread, values),
    }
    table = jnp.broadcast_to(values, (3, 256))
    for name, other in by_name.items():
        table = jnp.where(operation == OPERATIONS.index(name), other, table)
    return table


def _equalised(image: Float[Array, "h w 3"], *_: Any, magnitude: float) -> Float[Array, "h w 3"]:
    """Equalise the histogram of each channel, with Pillow's integer arithmetic and without a magnitude."""
    places = image.astype(jnp.int32) + 256 * jnp.arange(3)
    counts = jnp.zeros(3 * 256, jnp.int32).at[places.reshape(-1)].add(1).reshape(3, 256)
    of_last = jnp.take_along_axis(counts, image.max((0, 1)).astype(jnp.int32)[:, None], 1)
    step = (counts[0].sum() - of_last) // 255
    below = jnp.cumsum(counts, 1) - counts
    table = jnp.where(step > 0, (below + step // 2) // jnp.maximum(step, 1), jnp.arange(256))
    return table[jnp.arange(3), image.astype(jnp.int32)].astype(jnp.float32)


def _smoothed(image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    """Return an image smoothed by a 3 by 3 kernel with centre weight 5; border pixels are unchanged."""
    height, width, _ = image.shape
    shifts = [image[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    inner = (sum(shifts[1:], shifts[0]) + 4 * image[1:-1, 1:-1]) / 13
    return image.at[1:-1, 1:-1].set(inner)
