"""Slices of NIfTI volumes by nibabel, in one orientation whatever the scanner's."""

import functools
import threading
import zlib
from pathlib import Path

import numpy as np

from dapt_jax.data.plane import Plane, Window, medical, one_line
from dapt_jax.errors import UserError

DEFAULT_WINDOW = Window(1, 99, percent=True)
"""MR intensities have no unit; the brightest vessels and a few stray voxels must not set the range."""

_UNREADABLE = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, zlib.error, Warning)
_ONE_AT_A_TIME = threading.Lock()


def pixels(plane: Plane) -> np.ndarray:
    """The slice as uint8 [h, w], by `plane.window` or the volume's 1st and 99th percentile.

    Volumes are turned to canonical orientation (RAS+) first. A slice is shown as radiologists see it: axial with the
    front up, coronal and sagittal with the head up; the patient's right is on the left, and in sagittal slices the front is.

    Raises:
        UserError: see `volume`; or no such slice.
    """
    whole = volume(plane.path)
    window = plane.window or DEFAULT_WINDOW
    if window.percent:
        window = _range(plane.path, _stamp(plane.path), window)
    return window.apply(_slice(plane, whole))


def values(plane: Plane) -> np.ndarray:
    """The numbers of the slice, float32 [h, w], placed as `pixels` places them."""
    return _slice(plane, volume(plane.path))


def extent(plane: Plane) -> tuple[int, int]:
    """Height and width of the slice."""
    height, width = _slice(plane, volume(plane.path)).shape
    return height, width


def volume(path: Path) -> np.ndarray:
    """A volume in canonical orientation, float32 [right, front, up]; the last few are kept, for slices come one by one.

    Raises:
        UserError: the file is unreadable, or its rank is not 3; names the path.
    """
    with _ONE_AT_A_TIME:
        return _volume(path, _stamp(path))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: no such NIfTI file") from error
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _volume(path: Path, stamp: tuple[int, int]) -> np.ndarray:
    library = medical("nibabel", path)
    try:
        image = library.load(path)
        shape = image.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != 3:
            raise UserError(
                f"{path}: a NIfTI image of rank {len(shape)} {list(image.shape)}; expected a volume of rank 3"
            )
        canonical = library.as_closest_canonical(image)
        array = np.asarray(canonical.dataobj, np.float32).reshape(canonical.shape[:3])
    except (library.filebasedimages.ImageFileError, *_UNREADABLE) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); expected a whole NIfTI file") from error
    return np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0)


@functools.lru_cache(maxsize=64)
def _range(path: Path, stamp: tuple[int, int], window: Window) -> Window:
    low, high = np.percentile(volume(path), (window.low, window.high))
    return Window(float(low), float(high))


def _slice(plane: Plane, whole: np.ndarray) -> np.ndarray:
    index = plane.at(plane.index, whole.shape[plane.axis], "slice")
    # A view: numpy.take would bring the whole volume into another order in memory for every slice.
    return np.moveaxis(whole, plane.axis, 0)[index].T[::-1, ::-1]
