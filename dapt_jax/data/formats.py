"""Selection of the module that reads a file, by the file's name or its first bytes."""

import stat
from pathlib import Path
from types import ModuleType

import numpy as np

from dapt_jax.data import arrays, dicom, limits, nifti, pixels
from dapt_jax.data.geometry import Geometry
from dapt_jax.data.intensity import Samples
from dapt_jax.data.plane import Source, plane
from dapt_jax.errors import UserError

_SUFFIXES = {
    ".dcm": dicom,
    ".dicom": dicom,
    ".nii": nifti,
    ".npy": arrays,
    ".mat": arrays,
    ".h5": arrays,
    ".hdf5": arrays,
}


def module(path: Path) -> ModuleType:
    """Return the module whose `samples`, `values` and `extent` read a file.

    The default is `dapt_jax.data.pixels`, which tries Pillow.

    Raises:
        UserError: The path is a pipe, a device or a folder: reading some of them never ends.
    """
    _check_regular(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-2:] == [".nii", ".gz"]:
        return nifti
    known = _SUFFIXES.get(suffixes[-1] if suffixes else "")
    return known or (dicom if not _is_named_image(suffixes) and _has_dicom_mark(path) else pixels)


def samples(source: Source, at_least: int = 0) -> Samples:
    """Return the values of an image and what its file states about their range.

    Args:
        source: Source of the image.
        at_least: See `dapt_jax.data.pixels.opened`.

    Raises:
        UserError: The file is missing or cannot be read; names it.
    """
    found = plane(source)
    with limits.border(found.path, "an image"):
        reader = module(found.path)
        return pixels.samples(found, at_least) if reader is pixels else reader.samples(found)


def values(source: Source) -> np.ndarray:
    """Return the numbers of a picture in a file that Pillow does not read, as stored.

    Raises:
        UserError: The file is missing or cannot be read; names it.
    """
    found = plane(source)
    with limits.border(found.path, "an image"):
        stored: np.ndarray = module(found.path).values(found)
        return stored


def extent(source: Source) -> tuple[int, int]:
    """Return the height and width of a picture as stored in its file, or of its tile.

    Raises:
        UserError: The file is missing or unreadable.
    """
    found = plane(source)
    if found.tile:
        return found.tile.size, found.tile.size
    with limits.border(found.path, "an image"):
        height, width = module(found.path).extent(found)
    return height, width


def geometry(source: Source) -> Geometry | None:
    """Return the position of a picture in the patient; None if its file does not state it."""
    found = plane(source)
    with limits.border(found.path, "an image"):
        reader = module(found.path)
        return reader.geometry(found) if reader in (dicom, nifti) else None


def spacing(source: Source) -> tuple[float, float] | None:
    """Return the height and width of a pixel in millimetres; None if the file does not state them.

    Resolutions of photographs do not count.
    """
    found = plane(source)
    with limits.border(found.path, "an image"):
        reader = module(found.path)
        return reader.spacing(found) if reader in (dicom, nifti) else None


def _check_regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # absent, too long, not a path: readers say so
        return
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: cannot be read (it is no file); expected an image")


def _is_named_image(suffixes: list[str]) -> bool:
    return bool(suffixes) and suffixes[-1] in (
        ".png",
        ".jpg",
        ".jpeg",
        ".bmp",
        ".tif",
        ".tiff",
        ".webp",
        ".gif",
    )


def _has_dicom_mark(path: Path) -> bool:
    """Return whether a file has the DICOM prefix; DICOM files often have no suffix, or a number instead."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, ValueError):  # absent, or a name that no file can have
        return False
