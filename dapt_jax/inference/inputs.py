"""Images to predict: listed one by one, read as training images were, and compared with them in format."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dapt_jax.data import formats, identity, lists, nifti
from dapt_jax.data.decode import ImageStore
from dapt_jax.data.given_arrays import as_uint8
from dapt_jax.data.paths import IMAGES, Finder, holds_picture, walk
from dapt_jax.data.plane import Plane, Source
from dapt_jax.errors import UserError, nearest
from dapt_jax.inference.target_model import Reading

TABLES = (".csv", ".tsv")
NIFTI = (".nii", ".nii.gz")
_INDEX = re.compile(r"\[(\d+)\]$")
_SIZES = 2
"""Factor by which an image may be smaller or larger than the training images."""


@dataclasses.dataclass(frozen=True)
class Item:
    """An image to predict.

    Attributes:
        name: Its name in the results: its path below the folder, or as a table writes it.
        source: Its location.
    """

    name: str
    source: Source


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images that are predicted together.

    Attributes:
        items: The images.
        volume: The NIfTI file that all of them are slices of; None for other images.
        name: Name of the volume.
        ends_unit: Whether the next batch is of other files: a volume is written whole.
    """

    items: tuple[Item, ...]
    volume: Path | None = None
    name: str = ""
    ends_unit: bool = True


@dataclasses.dataclass(frozen=True)
class Read:
    """A batch of images as read.

    Attributes:
        batch: The batch.
        pixels: uint8 [k, size, size, 3] of the images that can be read.
        rows: Their places in the batch, [k].
        extents: Height and width of each image's file, by place.
        unlike: Differences from the training images in format, in words, by place; images without any are
            absent.
        bad: Reasons why images cannot be read, by place.
    """

    batch: Batch
    pixels: np.ndarray
    rows: np.ndarray
    extents: dict[int, tuple[int, int]]
    unlike: dict[int, str]
    bad: dict[int, str]


def batches(place: Path, reading: Reading, size: int) -> Iterator[Batch]:
    """Yield the images of a place in a fixed order, without holding them or their names.

    Args:
        place: A folder of any depth with image files, DICOM files and NIfTI volumes; one such file; or a
            table with a column of images, whose cells may select a slice: `scan.nii.gz[12]`.
        reading: How images are read.
        size: Largest number of images of a batch.

    Raises:
        UserError: The place does not exist, or holds no image.
    """
    waiting: list[Item] = []
    is_empty = True
    for item, volume in _listed(place, reading):
        is_empty = False
        if volume is None:
            waiting.append(item)
            if len(waiting) == size:
                yield Batch(tuple(waiting))
                waiting = []
            continue
        if waiting:
            yield Batch(tuple(waiting))
            waiting = []
        try:
            count = nifti.length(volume, reading.axis)
        except UserError:  # reading it says why, like every image that cannot be read
            yield Batch((item,))
            continue
        for start in range(0, count, size):
            slices = tuple(
                Item(f"{item.name}[{index}]", Plane(volume, index, reading.axis, window=reading.shown))
                for index in range(start, min(start + size, count))
            )
            yield Batch(slices, volume, item.name, start + size >= count)
    if waiting:
        yield Batch(tuple(waiting))
    if is_empty:
        raise UserError(f"{place}: no images; expected {', '.join(IMAGES[:4])}, DICOM or NIfTI files")


def _listed(place: Path, reading: Reading) -> Iterator[tuple[Item, Path | None]]:
    """Yield each image, and each volume as its file: the volume is then the second element."""
    if not place.exists():
        there = sorted(entry.name for entry in place.parent.iterdir()) if place.parent.is_dir() else []
        raise UserError(
            f"{place}: no such images; "
            f"{nearest(place.name, there) if there else 'expected a folder or a file'}"
        )
    if place.suffix.lower() in TABLES:
        yield from _of_table(place, reading)
        return
    files = walk(place) if place.is_dir() else iter([place])
    for file in files:
        name = file.relative_to(place).as_posix() if place.is_dir() else file.name
        if _is_volume(file):
            yield Item(name, file), file
        elif holds_picture(file):
            yield Item(name, _windowed(file, reading)), None


def _of_table(table: Path, reading: Reading) -> Iterator[tuple[Item, Path | None]]:
    find = Finder(table.parent)
    for place, cell in lists.iterate(table, "image", identity.IMAGE_NAMES):
        if identity.is_missing(cell):
            raise UserError(f"{table}: {place}: no image named")
        file, index = find(_INDEX.sub("", cell)), _INDEX.search(cell)
        if index is None and _is_volume(file) and file.is_file():
            yield Item(cell, file), file
        else:
            number = int(index[1]) if index else None
            yield Item(cell, Plane(file, number, reading.axis, window=reading.shown)), None


def _windowed(file: Path, reading: Reading) -> Source:
    return Plane(file, window=reading.shown) if reading.shown else file


def _is_volume(file: Path) -> bool:
    return file.name.lower().endswith(NIFTI)


def read(batch: Batch, reading: Reading, workers: int) -> Read:
    """Read a batch of images; those that cannot be read are in `Read.bad`.

    Args:
        batch: The batch.
        reading: How images are read.
        workers: Number of threads.
    """
    sources = [item.source for item in batch.items]
    every = len(sources) * reading.image_size**2 * 3
    store = ImageStore.from_files(
        sources, reading.image_size, reading.crop or None, every, reading.resize, reading.of_set
    )
    bad = {each.index: each.reason for each in store.verify(workers)}
    for row, source in enumerate(sources):
        if reading.tile_size and row not in bad and (why := reading.refusal(formats.extent(source))):
            bad[row] = f"{source}: {why}"
    rows = np.array([row for row in range(len(sources)) if row not in bad], np.int64)
    good = store.take(rows)
    pixels = good.batch(range(len(rows)))
    extents, unlike = {}, {}
    for row, image, used in zip(rows.tolist(), pixels, good.ranges(), strict=True):
        extents[row] = formats.extent(sources[row])
        if found := differences(reading, image, extents[row], used.origin):
            unlike[row] = found
    return Read(batch, pixels, rows, extents, unlike, bad)


def differences(reading: Reading, image: np.ndarray, extent: tuple[int, int] | None, origin: str) -> str:
    """Return how an image's format differs from the training images', in words; empty where it does not.

    Args:
        reading: The training images.
        image: The image as read, uint8 [h, w, 3].
        extent: Height and width of its file; None for an array.
        origin: Origin of its black and white.
    """
    found = []
    is_grey = is_grey_image(image)
    if reading.colour != "both" and is_grey != (reading.colour == "grey"):
        found.append(f"{'grey' if is_grey else 'colour'}, training images are {_of_colour(reading.colour)}")
    if reading.kinds and origin not in reading.kinds:
        found.append(f"black and white by {origin}, of training images by {' or '.join(reading.kinds[:2])}")
    if extent and reading.sides:
        low, high = reading.sides
        if min(extent) * _SIZES < low or max(extent) > high * _SIZES:
            found.append(f"{extent[1]} x {extent[0]} pixels, sides of training images are {low} to {high}")
    return "; ".join(found)


def _of_colour(colour: str) -> str:
    return "grey" if colour == "grey" else "in colour"


def is_grey_image(image: np.ndarray) -> bool:
    """Return whether all channels of an image are equal."""
    return bool((image[..., :1] == image).all())


def from_array(images: np.ndarray, reading: Reading) -> np.ndarray:
    """Return an array of images as uint8 [n, size, size, 3].

    Args:
        images: uint8, or floats from 0 to 1; [n, h, w, 3], [n, h, w, 1] or [n, h, w].
        reading: How images are read.

    Raises:
        UserError: The array has another type, shape or range, or no image.
    """
    images = as_uint8(images)
    if why := reading.refusal(images.shape[1:3]):
        raise UserError(f"images are {why}")
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=3)
    return reading.framing.images(images)


def from_paths(paths: Sequence[str | Path], reading: Reading) -> np.ndarray:
    """Return image files as uint8 [n, size, size, 3], read as the training images were.

    Raises:
        UserError: No path is given, or a file cannot be read.
    """
    if not paths:
        raise UserError("no images; expected one path or more")
    items = tuple(Item(str(path), _windowed(Path(path), reading)) for path in paths)
    found = read(Batch(items), reading, workers=1)
    if found.bad:
        raise UserError(next(iter(found.bad.values())))
    return found.pixels
