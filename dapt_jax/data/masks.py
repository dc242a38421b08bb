"""Masks: a file, a slice of a volume, several files laid over each other, or run lengths in a table."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dapt_jax.data import formats, pixels
from dapt_jax.data.plane import Plane, Source, file_of, plane
from dapt_jax.errors import UserError


@dataclass(frozen=True)
class Parts:
    """Files that each mark one segment.

    Attributes:
        parts: a file or plane, and the value that a pixel gets where it is marked; values of several parts are joined bit
            by bit, so that left and right lung may both be 1, and lesions that overlap 1, 2, 4, ...
        like: the image; a mask without parts is as large as it and empty.
        above: a pixel is marked where its value (of a colour file, its brightest channel) is more than this.
    """

    parts: tuple[tuple[Source, int], ...]
    like: Source
    above: float = 0

    def __str__(self) -> str:
        return " and ".join(str(part) for part, _ in self.parts) or f"no mask of {self.like}"


@dataclass(frozen=True)
class Rle:
    """Run lengths as SIIM-ACR writes them: pairs "gap length" down the columns, each gap counted from the last run's end.

    Attributes:
        runs: texts, one per finding; "-1" and "" mark nothing.
        like: the image, whose size the mask has.
        place: where the runs are written, for error lines.
    """

    runs: tuple[str, ...]
    like: Source
    place: str

    def __str__(self) -> str:
        return f"run lengths in {self.place}"


Mask = Path | Plane | Parts | Rle


def files(mask: Mask) -> Iterator[Path]:
    """The files of a mask, all of which must be there."""
    if isinstance(mask, Parts):
        yield from (file_of(part) for part, _ in mask.parts)
    elif not isinstance(mask, Rle):
        yield file_of(mask)


def read(mask: Mask) -> np.ndarray:
    """A mask as its source has it.

    A mask of 0 and 255 alone is read as 0 and 1, the way most drawing tools store two classes.

    Returns:
        uint8 [h, w].

    Raises:
        UserError: a file is unreadable, its values are not classes from 0 to 255, parts differ in size, or run lengths
            leave the image; names the path.
    """
    if isinstance(mask, Rle):
        return _unrolled(mask)
    if isinstance(mask, Parts):
        return _joined(mask)
    found = plane(mask)
    if formats.module(found.path) is pixels:
        with pixels.opened(found) as image:
            # A palette's indices are the classes; its colours are only for the eye.
            values = np.asarray(ImageOps.exif_transpose(image))
    else:
        values = formats.module(found.path).values(found)
    if values.ndim == 3:
        colour = values[..., :3] if values.shape[-1] >= 3 else values[..., :1]
        if (colour != colour[..., :1]).any():
            raise UserError(f"{mask}: a colour image, expected a mask of class indices (one channel)")
        values = colour[..., 0]
    if values.size and not (values.min() >= 0 and values.max() <= 255 and (values == values.astype(np.uint8)).all()):
        raise UserError(f"{mask}: mask values {values.min()} to {values.max()}, expected classes from 0 to 255")
    classes = values.astype(np.uint8)
    if classes.max(initial=0) == 255 and np.isin(classes, (0, 255)).all():
        classes = classes // 255
    return classes


def extent(mask: Mask) -> tuple[int, int]:
    """Height and width of a mask, from headers where they say it."""
    if isinstance(mask, Rle) or (isinstance(mask, Parts) and not mask.parts):
        return formats.extent(mask.like)
    return formats.extent(mask.parts[0][0] if isinstance(mask, Parts) else mask)


def _joined(mask: Parts) -> np.ndarray:
    if not mask.parts:
        return np.zeros(formats.extent(mask.like), np.uint8)
    joined: np.ndarray | None = None
    for part, value in mask.parts:
        marked = _brightness(plane(part)) > mask.above
        if joined is None:
            joined = np.zeros(marked.shape, np.uint8)
        if marked.shape != joined.shape:
            raise UserError(
                f"{part}: {_size(marked)}, but {mask.parts[0][0]} is {_size(joined)}; expected parts of one size"
            )
        joined |= np.where(marked, np.uint8(value), np.uint8(0))
    assert joined is not None
    return joined


def _brightness(part: Plane) -> np.ndarray:
    if formats.module(part.path) is pixels:
        with pixels.opened(part) as image:
            upright = ImageOps.exif_transpose(image)
            values = np.asarray(upright.convert("RGB") if upright.mode[0] in "PRC" else upright)
    else:
        values = formats.module(part.path).values(part)
    return values[..., :3].max(axis=-1) if values.ndim == 3 else values


def _unrolled(mask: Rle) -> np.ndarray:
    height, width = formats.extent(mask.like)
    flat = np.zeros(width * height, np.uint8)
    for run in mask.runs:
        if run.strip() in ("", "-1"):
            continue
        try:
            numbers = [int(number) for number in run.split()]
        except ValueError as error:
            raise UserError(
                f"{mask.place}: run lengths {run[:30]!r}; expected whole numbers, or -1 for none"
            ) from error
        if len(numbers) % 2 or min(numbers) < 0:
            raise UserError(
                f"{mask.place}: {len(numbers)} run lengths; expected pairs of a gap and a length, none negative"
            )
        position = 0
        for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
            position += gap
            flat[position : position + length] = 1
            position += length
        if position > flat.size:
            raise UserError(f"{mask.place}: run lengths end at pixel {position}, the image has {flat.size}")
    return flat.reshape(width, height).T


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]} pixels"


def resized(classes: np.ndarray, size: int, crop: int | None) -> np.ndarray:
    """Crops and resizes classes as `dapt_jax.data.decode.decode` does images, but to the nearest pixel."""
    return np.asarray(pixels.crop_and_resize(Image.fromarray(classes), size, crop, Image.Resampling.NEAREST))
