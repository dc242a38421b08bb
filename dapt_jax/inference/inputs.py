"""Images to predict: listed one by one, read as training images were, and compared with them in format."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dapt_jax.data import formats, identity, lists, mask_names, nifti
from dapt_jax.data.decode import ImageStore
from dapt_jax.data.given_arrays import as_uint8
from dapt_jax.data.paths import IMAGES, Finder, holds_picture, walk
from dapt_jax.data.plane import Plane, Source, file_of
from dapt_jax.data.records import patient_of_file
from dapt_jax.errors import UserError, nearest_beside
from dapt_jax.inference import results
from dapt_jax.inference.target_model import Reading
from dapt_jax.inference.units import INDEX, Naming, UnitRule
from dapt_jax.runtime import streams
from dapt_jax.statistics import PATIENT

NIFTI = (".nii", ".nii.gz")
_SIZES = 2
"""Factor by which an image may be smaller or larger than the training images."""


@dataclasses.dataclass(frozen=True)
class Item:
    """An image to predict.

    Attributes:
        name: Its name in the results: its path below the folder, or as a table writes it.
        source: Its location.
        patient: Its patient; empty where none is named.
        unit: What of the patient it is a part of, such as a volume; empty where nothing names it.
    """

    name: str
    source: Source
    patient: str = ""
    unit: str = ""

    def within(self, naming: Naming | None) -> list[str]:
        """Return the cells that name its unit, as `Naming.columns`."""
        return (
            [results.text_cell(each) for each in (self.patient, self.unit)][: len(naming.columns)]
            if naming
            else []
        )


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


def batches(
    place: Path, reading: Reading, size: int, naming: Naming | None = None, own: Path | None = None
) -> Iterator[Batch]:
    """Yield the images of a place in a fixed order, without holding them or their names.

    Args:
        place: A folder of any depth with image files, DICOM files and NIfTI volumes, whose masks are left out by
            their names; one such file; or a table with a column of images, whose cells may select a slice:
            `scan.nii.gz[12]`.
        reading: How images are read.
        size: Largest number of images of a batch.
        naming: Where images name their patients and units; None to leave that out.
        own: Folder of the predictions: what is written there while images are listed is none of them.

    Raises:
        UserError: The place does not exist, or holds no image.
    """
    waiting: list[Item] = []
    is_empty = True
    for item, volume in _listed(place, reading, naming, own):
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
                dataclasses.replace(
                    item,
                    name=f"{item.name}[{index}]",
                    source=Plane(volume, index, reading.axis, window=reading.shown),
                )
                for index in range(start, min(start + size, count))
            )
            yield Batch(slices, volume, item.name, start + size >= count)
    if waiting:
        yield Batch(tuple(waiting))
    if is_empty:
        wanted = f"{', '.join(IMAGES[:4])}, DICOM or NIfTI files"
        if place.suffix.lower() in lists.TABLES:
            wanted = "rows that name images"
        raise UserError(f"{place}: no images; expected {wanted}")


def _listed(
    place: Path, reading: Reading, naming: Naming | None, own: Path | None
) -> Iterator[tuple[Item, Path | None]]:
    """Yield each image, and each volume as its file: the volume is then the second element."""
    if not place.exists():
        raise UserError(
            f"{place}: no such images; {nearest_beside(place, lambda entry: entry.is_dir() or holds_picture(entry))}"
        )
    if place.suffix.lower() in lists.TABLES:
        yield from _of_table(place, reading, naming)
        return
    for file in _pictures(place, own) if place.is_dir() else filter(_is_read, [place]):
        name = file.relative_to(place).as_posix() if place.is_dir() else file.name
        is_volume = _is_volume(file)
        patient = naming.patient_in(name) if naming else ""
        yield (
            Item(name, file if is_volume else _windowed(file, reading), patient),
            file if is_volume else None,
        )


def _pictures(folder: Path, own: Path | None) -> Iterator[Path]:
    """Yield the images and volumes below a folder, without masks, which their names tell; say how many those are.

    The folder `own` and what is below it are left out.
    """
    left = (os.path.realpath(own),) if own else ()
    of_masks = mask_names.folders_of_masks({file.parent for file in walk(folder, left)}, folder)

    @functools.lru_cache(maxsize=64)  # the folders above a file are those that are not finished
    def beside(parent: Path) -> set[Path]:
        together = [parent / name for name in os.listdir(parent)]
        return mask_names.beside_their_images([file for file in together if file.is_file()])

    left_out, first = 0, ""
    for file in filter(_is_read, walk(folder, left)):
        if file.parent not in of_masks and file not in beside(file.parent):
            yield file
            continue
        left_out, first = left_out + 1, first or file.relative_to(folder).as_posix()
    if left_out:
        streams.say(f"predict: {folder}: left out {left_out} masks by their names, first: {first}")


def _is_read(file: Path) -> bool:
    return _is_volume(file) or holds_picture(file)


def _of_table(table: Path, reading: Reading, naming: Naming | None) -> Iterator[tuple[Item, Path | None]]:
    find = Finder(table.parent)
    wanted = [naming.patient, naming.unit] if naming else []
    named = [column for column in wanted if column]
    for place, cell, *others in lists.iterate(table, "image", identity.IMAGE_NAMES, named):
        if identity.is_missing(cell):
            raise UserError(f"{table}: {place}: no image named")
        of = dict(zip(named, others, strict=True))
        patient, unit = (of.get(column, "") for column in wanted or ("", ""))
        unit, patient = "" if identity.is_missing(unit) else unit, identity.patient(patient)
        file = find(_file(cell))
        if not INDEX.search(cell) and _is_volume(file) and file.is_file():
            yield Item(cell, file, patient, unit), file
        else:
            yield Item(cell, _selected(cell, file, reading), patient, unit), None


def _file(name: str | Path) -> str:
    """Return the name of an image without the slice that it selects."""
    return INDEX.sub("", str(name))


def _selected(name: str | Path, file: Path, reading: Reading) -> Plane:
    """Return the image of a name, of which `[INDEX]` at its end selects a slice of the file."""
    index = INDEX.search(str(name))
    return Plane(file, int(index[1]) if index else None, reading.axis, window=reading.shown)


def _windowed(file: Path, reading: Reading) -> Source:
    return Plane(file, window=reading.shown) if reading.shown else file


def _is_volume(file: Path) -> bool:
    return file.name.lower().endswith(NIFTI)


def read(batch: Batch, reading: Reading, workers: int, naming: Naming | None = None) -> Read:
    """Read a batch of images; those that cannot be read are in `Read.bad`.

    Args:
        batch: The batch.
        reading: How images are read.
        workers: Number of threads.
        naming: Where images name their patients and units; None to leave that out.
    """
    if naming:
        batch = dataclasses.replace(batch, items=tuple(map(_with_patient, batch.items)))
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


def _with_patient(item: Item) -> Item:
    """Return an image with the PatientID of its DICOM file, if nothing else names its patient."""
    return dataclasses.replace(item, patient=item.patient or patient_of_file(file_of(item.source)))


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

    Args:
        paths: The files; `scan.nii.gz[12]` is a slice of one.
        reading: How images are read.

    Raises:
        UserError: No path is given, or a file cannot be read.
    """
    if not paths:
        raise UserError("no images; expected one path or more")
    items = tuple(Item(str(path), _selected(path, Path(_file(path)), reading)) for path in paths)
    found = read(Batch(items), reading, workers=1)
    if found.bad:
        raise UserError(next(iter(found.bad.values())))
    return found.pixels


def units_of(paths: Sequence[str | Path], rule: UnitRule | None) -> list[str] | None:
    """Return the patient of each image file; None where none names one, or units are no patients.

    A file without a patient is of a patient of its own, and so are its slices.
    """
    if rule is None or rule.unit != PATIENT or rule.column:
        return None
    naming = Naming(pattern=rule.pattern)
    files = [_file(path) for path in paths]
    found = [naming.patient_in(file) or patient_of_file(Path(file)) for file in files]
    return [patient or file for patient, file in zip(found, files, strict=True)] if any(found) else None
