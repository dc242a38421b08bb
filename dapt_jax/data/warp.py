"""Geometry of augmentation: source coordinates drawn on the device and read in one resampling."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PRNGKeyArray

GRID = 5
"""Number of cells along a side of a grid distortion, and of knots of an elastic deformation."""

MIRROR, ZERO = "mirror", "zero"
BORDERS = (MIRROR, ZERO)
"""What lies beyond the border of an image."""

Coordinates = Float[Array, "2 h w"]
"""Row and column, in pixels of the source, at which each pixel of a view is read."""


def identity(height: int, width: int) -> Coordinates:
    """Return the identity: every pixel is read at its own position."""
    return jnp.stack(jnp.meshgrid(jnp.arange(float(height)), jnp.arange(float(width)), indexing="ij"))


def turned(at: Coordinates, key: PRNGKeyArray, rotate: float, scale: float) -> Coordinates:
    """Rotate and zoom about the centre.

    The angle is up to `rotate` degrees in either direction, the zoom up to a factor of 1 + `scale` in or out.
    """
    for_angle, for_zoom = jax.random.split(key)
    angle = jnp.deg2rad(rotate) * jax.random.uniform(for_angle, minval=-1.0, maxval=1.0)
    zoom = (1 + scale) ** jax.random.uniform(for_zoom, minval=-1.0, maxval=1.0)
    centre = jnp.asarray([(side - 1) / 2 for side in at.shape[1:]])[:, None, None]
    down, across = at - centre
    cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
    return jnp.stack([cos * down - sin * across, sin * down + cos * across]) + centre


def resized_crop(at: Coordinates, key: PRNGKeyArray, least: float) -> Coordinates:
    """Read a random rectangle instead of the whole image.

    It covers `least` to 1 of the area, with aspect 3:4 to 4:3 (Szegedy et al., arXiv 1409.4842).
    """
    for_area, for_ratio, for_corner = jax.random.split(key, 3)
    area = jax.random.uniform(for_area, minval=least, maxval=1.0)
    ratio = jnp.exp(jax.random.uniform(for_ratio, minval=jnp.log(3 / 4), maxval=jnp.log(4 / 3)))
    share = jnp.minimum(jnp.sqrt(jnp.stack([area / ratio, area * ratio])), 1.0)[:, None, None]
    corner = (1 - share) * jax.random.uniform(for_corner, (2, 1, 1))
    sides = jnp.asarray(at.shape[1:], jnp.float32)[:, None, None]
    return (corner + (at + 0.5) / sides * share) * sides - 0.5


def elastic(at: Coordinates, key: PRNGKeyArray, strength: float) -> Coordinates:
    """Displace smoothly: the knots of a grid move by normal draws (std: `strength` of the side)."""
    sides = jnp.asarray(at.shape[1:], jnp.float32)[:, None, None]
    knots = jax.random.normal(key, (2, GRID, GRID)) * strength * sides
    return at + jax.image.resize(knots, at.shape, "cubic")


def grid_distortion(at: Coordinates, key: PRNGKeyArray, strength: float) -> Coordinates:
    """Stretch and compress rows and columns of cells, each by up to `strength` of its width.

    The total size is preserved.
    """
    widths = 1 + strength * jax.random.uniform(key, (2, GRID), minval=-1.0, maxval=1.0)
    bounds = jnp.concatenate([jnp.zeros((2, 1)), jnp.cumsum(widths, 1)], 1)
    bounds = bounds / bounds[:, -1:]
    even = jnp.linspace(0, 1, GRID + 1)
    places = [jnp.interp(at[axis] / (side - 1), even, bounds[axis]) for axis, side in enumerate(at.shape[1:])]
    return jnp.stack([place * (side - 1) for place, side in zip(places, at.shape[1:], strict=True)])


def read(pixels: Num[Array, "h w c"], at: Coordinates, border: str = MIRROR) -> Num[Array, "h2 w2 c"]:
    """Read pixels at given coordinates.

    Floats are interpolated bilinearly; integers (classes) take the nearest pixel.

    Args:
        pixels: Image, or mask of integers.
        at: Coordinates.
        border: What lies beyond the image: itself mirrored, or `zero`.
    """
    mode = "mirror" if border == MIRROR else "constant"
    order = 0 if jnp.issubdtype(pixels.dtype, jnp.integer) else 1

    def one(channel: Array) -> Array:
        return jax.scipy.ndimage.map_coordinates(channel, list(at), order, mode=mode)

    return jax.vmap(one, in_axes=2, out_axes=2)(pixels)
