"""From an open image file to 8-bit pixels; the rules are told in `dapt_jax.data.decode.decode`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dapt_jax.data.plane import Plane, Source, Window, plane
from dapt_jax.errors import UserError

# Pillow's own exceptions for files that are cut, corrupt, or no image at all. Warnings are listed because a
# caller who runs with `-W error` gets Pillow's warnings about damaged files as exceptions.
_UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, Image.DecompressionBombError, Warning)


@contextmanager
def opened(source: Source, at_least: int = 0) -> Iterator[Image.Image]:
    """Opens and loads a file; whatever Pillow raises, here or in the body, comes out as one `UserError`.

    Args:
        source: of the file; the index of a `Plane` is the page of a TIFF or the frame of a GIF.
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep this many pixels; 0
            decodes every pixel.
    """
    found = plane(source)
    path = found.path
    try:
        with Image.open(path) as image:
            # Phone cameras write JPEGs with a preview as a second frame (MPO); those hold one picture.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1 or found.index:
                image.seek(found.at(found.index, frames, "frame"))
            if at_least:
                image.draft(image.mode, (at_least, at_least))
            image.load()
            yield image
    except _UNREADABLE as error:
        raise UserError(_reason(path, error)) from error


def _reason(path: str | Path, error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such image file"
    if isinstance(error, Image.DecompressionBombError):
        return f"{path}: more pixels than Pillow opens ({2 * (Image.MAX_IMAGE_PIXELS or 0):,}); cut it into tiles first"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"{path}: not an image that Pillow reads; expected PNG, JPEG, BMP or TIFF, or .dcm, .nii, .npy or .mat"
    what = str(error) or type(error).__name__
    return f"{path}: cannot be read ({what}); expected a whole PNG, JPEG, BMP or TIFF file"


def extent(source: Plane) -> tuple[int, int]:
    """Height and width of the upright image, from the file's header alone."""
    try:
        with Image.open(source.path) as image:
            if source.index:
                image.seek(source.index)
            width, height = image.size
            # Values 5 to 8 of the EXIF orientation turn the image by a quarter.
            return (width, height) if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5 else (height, width)
    except _UNREADABLE as error:
        raise UserError(_reason(source.path, error)) from error


def to_8_bit(image: Image.Image, window: Window | None = None) -> Image.Image:
    """Turns an image of any mode into an upright one of 8 bits a sample: grey stays one channel, all else becomes RGB.

    Args:
        image: as Pillow opened it.
        window: black and white of a grey image; None for the rule that `decode` tells.
    """
    image = ImageOps.exif_transpose(image)
    if window and (image.mode == "L" or image.mode[0] in "IF"):
        return Image.fromarray(window.apply(np.asarray(image)))
    if image.mode in ("RGB", "L"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode[0] in "IF":
        return Image.fromarray(scaled(np.asarray(image)))
    if image.mode in ("P", "PA"):
        # Straight to RGB, Pillow warns about palettes whose transparency is given in bytes.
        image = image.convert("RGBA")
    return image.convert("RGB")


def scaled(values: np.ndarray) -> np.ndarray:
    """Scales numbers of any type and shape to uint8 of that shape; the rule is in `decode`."""
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "f":
        values = np.where(np.isfinite(values), values, 0)
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(values * 255).astype(np.uint8)
    if values.dtype.kind != "f" and low >= 0 and high < 1 << 16:
        bits = next(bits for bits in (8, 12, 16) if high < 1 << bits)
        return (values >> (bits - 8)).astype(np.uint8)
    span = float(high) - float(low)
    return np.rint((values.astype(np.float64) - float(low)) * (255 / span if span else 0)).astype(np.uint8)


def crop_and_resize(image: Image.Image, size: int, crop: int | None, how: Image.Resampling) -> Image.Image:
    """Cuts out the centre (`crop` pixels, None for all) and resizes it to a square of `size` pixels."""
    width, height = image.size
    if crop:
        across, down = min(crop, width), min(crop, height)
        left, top = (width - across) // 2, (height - down) // 2
        image = image.crop((left, top, left + across, top + down))
    return image if image.size == (size, size) else image.resize((size, size), how)
