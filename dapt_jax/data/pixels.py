"""Files that Pillow opens: samples of 8 and 16 bits, grey and colour.

The rules are documented in `dapt_jax.data.intensity`.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dapt_jax.data import frames, limits
from dapt_jax.data.intensity import EIGHT_BITS, Range, Samples, integers_or_floats, of_bits
from dapt_jax.data.plane import Plane, Source, plane
from dapt_jax.errors import UserError

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM")
"""Formats that Pillow may open, by content: some of its other readers start programs (PostScript) or never
finish."""

_EXPECTED = "a whole PNG, JPEG, BMP or TIFF file"
_PHOTOMETRIC, _BITS_PER_SAMPLE, _TILE = 262, 258, (322, 323)
# Bytes needed per pixel, by Pillow's mode: its own image, an upright copy, arrays, and 8-bit grey.
_BYTES = {"1": 4, "L": 4, "P": 16, "I;16": 12, "I;16B": 12, "I;16L": 12, "I;16N": 12}
_BYTES_OF_COLOUR, _BYTES_OF_DEEP_COLOUR = 16, 40
RESIZING = 40
"""Bytes needed for resizing per pixel of a side: the weights of a filter as wide as the image."""

# The limit of `dapt_jax.data.limits` is checked before decoding, and gives a one-line error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Faulty metadata of a photograph change no pixel; faulty pixels raise an error.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\b")


@contextmanager
def opened(source: Source, at_least: int = 0) -> Iterator[Image.Image]:
    """Open and load a file; any error of Pillow, here or in the body, becomes one `UserError`.

    Args:
        source: Source of the file; the index of a `Plane` is the page of a TIFF or the frame of a GIF.
        at_least: A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides have at least
            this many pixels; 0 decodes every pixel.
    """
    found = plane(source)
    with limits.border(found.path, _EXPECTED), _image(found) as image:
        if at_least:
            image.draft(image.mode, (at_least, at_least))
        _check_size(found.path, image)
        image.load()
        yield image


@contextmanager
def _image(found: Plane) -> Iterator[Image.Image]:
    """Yield the open file at the right page, in one of the documented formats, not decoded yet."""
    path = found.path
    if not path.is_file():
        missing = "no such image file" if not path.exists() else "cannot be read (it is no file)"
        raise UserError(f"{path}: {missing}; expected an image")
    frames.check_header(path)
    with limits.Bounded(path) as file:
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as error:
            most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise UserError(
                f"{path}: more pixels than Pillow opens ({most:,}); cut it into tiles first"
            ) from error
        except Image.UnidentifiedImageError as error:
            raise UserError(
                f"{path}: not an image that Pillow reads; expected PNG, JPEG, BMP or TIFF (or GIF, WebP, PGM), "
                "or .dcm, .nii, .npy or .mat"
            ) from error
        with image:
            frames.check(path, image.format)
            # Phone cameras write JPEGs with a preview as a second frame (MPO); such a file holds one picture.
            count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if count > 1 or found.index:
                image.seek(found.at(found.index, count, "frame"))
            yield image


def _check_size(path: Path, image: Image.Image) -> None:
    deep = max(_tag(image, _BITS_PER_SAMPLE) or (8,)) > 8
    if deep and image.mode not in ("L", "P") and image.mode[0] not in "IF" and ";16" not in _raw_mode(image):
        raise UserError(
            f"{path}: a TIFF of 16 bits whose colours lie in separate planes; expected them side by side"
        )
    width, height = image.size
    each = _BYTES_OF_DEEP_COLOUR if ";16" in _raw_mode(image) else _BYTES_OF_COLOUR
    size = width * height * _BYTES.get(image.mode, each) + (width + height) * RESIZING
    limits.check(path, size, f"an image of {width} x {height} pixels")
    sides = [_tag(image, number) for number in _TILE]
    if all(isinstance(side, int) for side in sides):
        limits.check(path, sides[0] * sides[1] * 8, f"a tile of {sides[0]} x {sides[1]} pixels")


def extent(source: Plane) -> tuple[int, int]:
    """Return the height and width of the upright image, from the file's header alone."""
    with limits.border(source.path, _EXPECTED), _image(source) as image:
        _check_size(source.path, image)  # for the orientation, Pillow decodes a PNG
        width, height = image.size
        # Values 5 to 8 rotate the image by 90 degrees; the size that Pillow gives for a TIFF is that afterwards.
        rotated = image.format != "TIFF" and (_orientation(image) or 1) >= 5
        return (width, height) if rotated else (height, width)


def orientation(source: Plane) -> int | None:
    """Return the EXIF orientation of a file, from 1 (upright) to 8; None if it states none."""
    with limits.border(source.path, _EXPECTED), _image(source) as image:
        _check_size(source.path, image)  # for the orientation, Pillow decodes a PNG
        return _orientation(image)


def _orientation(image: Image.Image) -> int | None:
    found = image.getexif().get(ExifTags.Base.Orientation)
    return found if found in range(1, 9) else None


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Return values [h, w] turned as an image with this EXIF orientation is."""
    image = Image.fromarray(np.ascontiguousarray(values))
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


def samples(source: Plane, at_least: int = 0) -> Samples:
    """Return the values of an upright image: grey [h, w], or RGB [h, w, 3].

    An alpha channel is dropped, and palettes are looked up.

    Args:
        source: The file, with a page and a window.
        at_least: As in `opened`.
    """
    with limits.border(source.path, _EXPECTED), _image(source) as image:
        raw = _raw_mode(image)
        if at_least:
            image.draft(image.mode, (at_least, at_least))
        _check_size(source.path, image)
        image.load()
        mode = image.mode
        if mode in ("RGB", "RGBA") and ";16" in raw:
            deep = _sixteen_bits(source, image, raw)
            found = Samples(deep, None, "16-bit colour" if deep.ndim == 3 else "16-bit grey", depth=True)
        elif mode == "L" or mode[0] in "IF":
            array = np.asarray(ImageOps.exif_transpose(image))
            if image.format == "PPM" and mode == "I":
                # Pillow scales grey maps of more than 8 bits to 16 bits by the largest value in their header.
                found = Samples(array.astype(np.uint16), of_bits(16, "greatest value in the header"))
            else:
                # Pillow inverts bilevel and 8-bit white-at-zero images, and no others.
                white = mode != "L" and _tag(image, _PHOTOMETRIC) == 0
                bits = "16-bit" if mode.startswith("I;16") else "32-bit"
                found = integers_or_floats(array, f"{bits} grey", inverted=white)
        else:
            found = Samples(np.asarray(_to_8_bit(ImageOps.exif_transpose(image))), EIGHT_BITS)
    return windowed(found, source)


@dataclass(frozen=True)
class Stored:
    """Values of a file as masks use them.

    Attributes:
        values: [h, w], or [h, w, 3] for a colour file.
        alpha: The alpha channel, uint8 [h, w]; None for a file without one.
        lossy: Whether the format changes values.
        palette: Colours that the values are indices of, uint8 [k, 3]; None for values of another kind.
    """

    values: np.ndarray
    alpha: np.ndarray | None = None
    lossy: bool = False
    palette: np.ndarray | None = None


def stored(source: Plane) -> Stored:
    """Return the stored values of an upright file.

    These are palette indices rather than colours, and the uninverted values of white-at-zero files.

    A palette of only black and white is read by its colours, whichever is first. There, in a file of one bit and in a
    white-at-zero file with two values, white is 255.
    """
    with limits.border(source.path, _EXPECTED), _image(source) as image:
        raw = _raw_mode(image)
        _check_size(source.path, image)
        image.load()
        lossy, mode = is_lossy(image, source.path), image.mode
        if mode in ("RGB", "RGBA") and ";16" in raw:
            deep = _sixteen_bits(source, image, raw)
            return Stored(
                deep, np.asarray(ImageOps.exif_transpose(image))[..., 3] if mode == "RGBA" else None
            )
        values = np.asarray(ImageOps.exif_transpose(image))
        if mode == "P":
            return _of_palette(values, np.array(image.getpalette() or [], np.uint8).reshape(-1, 3))
        if mode == "L" and _tag(image, _PHOTOMETRIC) == 0 and not is_black_and_white(values):
            # For fewer than 8 bits, Pillow has scaled the values as well.
            bits = max(_tag(image, _BITS_PER_SAMPLE) or (8,))
            return Stored((255 - values) // (255 // ((1 << bits) - 1)))
        if mode == "1":  # white is that of 8 bits, which other masks of the set may have
            return Stored(values * np.uint8(255))
        if mode in ("LA", "PA", "RGBA"):
            return Stored(values[..., 0] if mode != "RGBA" else values[..., :3], values[..., -1])
        return Stored(values, lossy=lossy)


def is_lossy(image: Image.Image, path: Path) -> bool:
    """Return whether the format of an open file changes values: JPEG's does, and WebP's of one kind."""
    return image.format in ("JPEG", "MPO") or (image.format == "WEBP" and _is_lossy_webp(path))


def _is_lossy_webp(path: Path) -> bool:
    """Return whether a WebP file, or a frame of it, has a chunk of the lossy kind: "VP8 ", not "VP8L"."""
    with path.open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            if head[:4] == b"VP8 ":
                return True
            length = int.from_bytes(head[4:], "little")
            # A frame of an animation holds the chunks of its picture after 16 bytes of its own.
            file.seek(16 if head[:4] == b"ANMF" else length + length % 2, 1)
    return False


def is_black_and_white(values: np.ndarray) -> bool:
    """Return whether 8-bit values are all 0 or 255, in three bytes of memory for each; np.isin takes up to 32."""
    return bool(((values == 0) | (values == 255)).all())


def _of_palette(indices: np.ndarray, palette: np.ndarray) -> Stored:
    white = (palette == 255).all(axis=1)
    if white[:2].sum() == 1 and not palette[~white].any() and (white[0] or indices.max(initial=0) <= 1):
        return Stored(np.where(indices == white.argmax(), np.uint8(255), np.uint8(0)))
    return Stored(indices, palette=palette)


def windowed(found: Samples, source: Plane) -> Samples:
    """Return samples with the range of the source's window, if it has one, instead of their own."""
    window = source.window
    if window is None:
        return found
    if window.of_set:
        return replace(found, known=None, pool=found.pool or "8-bit images", depth=True)
    if window.percent:
        return replace(found, known=replace(found, depth=False).own_range("the file", window))
    return replace(found, known=Range(window.low, window.high, "window of the setting"))


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode in ("RGB", "L"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("P", "PA"):
        # Converting directly to RGB, Pillow warns about palettes with transparency given in bytes.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _sixteen_bits(source: Plane, image: Image.Image, raw: str) -> np.ndarray:
    """Return the samples of a 16-bit image in colour or grey with alpha, uint16 [h, w, 3] or [h, w].

    Pillow stores such an image as the upper bytes of its samples. Decoding the file again with the opposite
    byte order gives the lower bytes.
    """
    with _image(source) as again:
        if raw == "LA;16B":
            _set_raw_mode(again, "RGBA")
            parts = np.asarray(ImageOps.exif_transpose(again)).astype(np.uint16)
            return parts[..., 0] << 8 | parts[..., 1]
        other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[raw[-1]]
        _set_raw_mode(again, raw[:-1] + other)
        low, high = (np.asarray(ImageOps.exif_transpose(each))[..., :3] for each in (again, image))
        return high.astype(np.uint16) << 8 | low


def _raw_mode(image: Image.Image) -> str:
    tiles: Any = getattr(image, "tile", None)
    args = tiles[0].args if tiles else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _set_raw_mode(image: Any, raw: str) -> None:
    image.tile = [
        tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))
        for tile in image.tile
    ]
    image.load()


def _tag(image: Image.Image, number: int) -> Any:
    tags = getattr(image, "tag_v2", None)
    return tags.get(number) if tags else None
