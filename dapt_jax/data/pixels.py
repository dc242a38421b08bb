"""From an open image file to 8-bit pixels; the rules are told in `dapt_jax.data.decode.decode`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dapt_jax.errors import UserError

# Pillow's own exceptions for files that are cut, corrupt, or no image at all. Warnings are listed because a
# caller who runs with `-W error` gets Pillow's warnings about damaged files as exceptions.
_UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, Image.DecompressionBombError, Warning)


@contextmanager
def opened(path: str | Path, at_least: int = 0) -> Iterator[Image.Image]:
    """Opens and loads a file; whatever Pillow raises, here or in the body, comes out as one `UserError`.

    Args:
        path: of the file.
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep this many pixels; 0
            decodes every pixel.
    """
    try:
        with Image.open(path) as image:
            # Phone cameras write JPEGs with a preview as a second frame (MPO); those hold one picture.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                raise UserError(f"{path}: holds {frames} frames, expected one image per file; export each frame")
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
        return f"{path}: not an image that Pillow reads; expected PNG, JPEG, BMP or TIFF (export DICOM to PNG first)"
    what = str(error) or type(error).__name__
    return f"{path}: cannot be read ({what}); expected a whole PNG, JPEG, BMP or TIFF file"


def to_8_bit(image: Image.Image) -> Image.Image:
    """Turns an image of any mode into an upright one of 8 bits a sample: grey stays one channel, all else becomes RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGB", "L"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode[0] in "IF":
        return Image.fromarray(_scaled(np.asarray(image)))
    if image.mode in ("P", "PA"):
        # Straight to RGB, Pillow warns about palettes whose transparency is given in bytes.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scaled(values: np.ndarray) -> np.ndarray:
    """Scales grey [h, w] of any number type to uint8; the rule is in `decode`."""
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
