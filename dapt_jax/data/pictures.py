"""Pictures of files before they become squares: what tiles and random crops are cut from."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from dapt_jax.data import formats, limits, pixels
from dapt_jax.data.framing import Framing
from dapt_jax.data.intensity import Range
from dapt_jax.data.plane import Plane
from dapt_jax.data.tiles import Recent

Picture = tuple[np.ndarray, Range]
"""Pixels uint8, [h, w] or [h, w, 3], and the black and white values that they come from."""

Ranges = Callable[[], dict[str, Range]]
"""Function that returns the intensity ranges of the set, called only if they are needed."""

DRAFT_MARGIN = 2
"""A JPEG may be decoded at a fraction of its size, but not below this multiple of the wanted size."""


def read(
    found: Plane, framing: Framing, side: int, ranges: Ranges
) -> tuple[Image.Image, tuple[int, int] | None, Range]:
    """Return a whole picture, perhaps decoded at a fraction of its size, its extent, and its range.

    Args:
        found: Location of the picture, which is not a tile.
        framing: Framing that follows.
        side: Side in pixels that the framed picture is needed at.
        ranges: Ranges of the set.

    Returns:
        8-bit grey or RGB; the height and width of the file where the framing depends on them, else None; black
        and white.
    """
    samples = formats.samples(found, 0 if framing.crop else DRAFT_MARGIN * side)
    shown, used = samples.shown(None if samples.known else ranges())
    height, width = shown.shape[:2]
    limits.check(found.path, (width + height) * pixels.RESIZING, f"an image of {width} x {height} pixels")
    # An image decoded at a fraction of its size is framed by the whole, as its mask is.
    extent = None if framing.resize == "squash" else formats.extent(found)
    return Image.fromarray(np.ascontiguousarray(shown)), extent, used


def at_most(found: Plane, framing: Framing, most: int, ranges: Ranges, recent: Recent[Picture]) -> np.ndarray:
    """Return what the square of a picture shows, with a short side of at most `most` pixels.

    Args:
        found: Location of the picture, or of a tile.
        framing: Framing, whose crop is taken, and whose resizing is not.
        most: Largest short side in pixels.
        ranges: Ranges of the set.
        recent: Pictures that tiles were cut from.

    Returns:
        uint8 [h, w] or [h, w, 3], with the aspect ratio of the file.
    """
    if found.tile:
        image = framing.cut(Image.fromarray(found.tile.of(of_tiles(found, ranges, recent)[0])))
    else:
        with limits.border(found.path, "an image"):
            image, extent, _ = read(found, framing, most, ranges)
            image = framing.cut(image, extent)
    short = min(image.size)
    if short > most:
        width, height = (round(side * most / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def of_tiles(found: Plane, ranges: Ranges, recent: Recent[Picture]) -> Picture:
    """Return the resized picture that a tile is cut from.

    Args:
        found: Location of the tile.
        ranges: Ranges of the set.
        recent: Pictures that tiles were cut from, to which this one is added.
    """
    tile, whole = found.tile, found.whole
    assert tile is not None

    def make() -> tuple[Picture, int]:
        with limits.border(whole.path, "an image"):
            samples = formats.samples(whole)
            shown, used = samples.shown(None if samples.known else ranges())
            height, width = tile.picture or (0, 0)
            size = (sum(shown.shape[:2]) + height + width) * pixels.RESIZING + 3 * height * width
            limits.check(whole.path, size, f"an image of {shown.shape[1]} x {shown.shape[0]} pixels")
            image = Image.fromarray(np.ascontiguousarray(shown))
            picture = tile.resized(image, Image.Resampling.BILINEAR)
        return (picture, used), picture.nbytes

    return recent.get(whole, make)


def three_channels(square: np.ndarray) -> np.ndarray:
    """Return colour as it is, and grey [h, w] as three equal channels [h, w, 3]."""
    return square if square.ndim == 3 else np.repeat(square[..., None], 3, axis=2)
