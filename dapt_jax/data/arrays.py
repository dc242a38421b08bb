"""Pictures in arrays on disk: NumPy's .npy, and HDF5 files, which MATLAB's .mat files of version 7.3 are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dapt_jax.data.pixels import scaled
from dapt_jax.data.plane import Plane, one_line
from dapt_jax.errors import UserError, nearest


def pixels(plane: Plane) -> np.ndarray:
    """The picture as uint8 [h, w] or [h, w, 3], by `plane.window` or the rule of `dapt_jax.data.decode.decode`."""
    found = values(plane)
    return plane.window.apply(found) if plane.window else scaled(found)


def values(plane: Plane) -> np.ndarray:
    """The numbers [h, w], or [h, w, 3] of a colour picture.

    Raises:
        UserError: no such file, array or picture; pickled objects; or a shape that is no picture's.
    """
    with _opened(plane) as array:
        shape = _shape(plane, array)
        found = np.asarray(array[()] if len(shape) == array.ndim else array[plane.index or 0])
    # MATLAB stores columns first.
    found = found.T if plane.path.suffix == ".mat" else found
    return found.reshape(_picture(found.shape))


def extent(plane: Plane) -> tuple[int, int]:
    """Height and width, without reading the numbers."""
    with _opened(plane) as array:
        shape = _shape(plane, array)
    height, width = _picture(shape[::-1] if plane.path.suffix == ".mat" else shape)[:2]
    return height, width


def scalar(path: Path, key: str) -> np.ndarray:
    """A small array of an HDF5 file, flat: a label, or the codes of a text."""
    with _opened(Plane(path, key=key)) as array:
        return np.asarray(array[()]).ravel()


def length(path: Path) -> int:
    """Number of pictures in a .npy file [n, h, w] or [n, h, w, channels]."""
    with _opened(Plane(path)) as array:
        if array.ndim < 3:
            raise UserError(f"{path}: an array {list(array.shape)}, expected pictures [n, h, w]")
        return len(array)


def _picture(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A picture's shape without an axis of one channel, wherever it is."""
    if len(shape) == 3 and shape[0] == 1:
        return shape[1:]
    return shape[:2] if len(shape) == 3 and shape[2] == 1 else shape


def _shape(plane: Plane, array: Any) -> tuple[int, ...]:
    if array.dtype.kind not in "buif":
        raise UserError(f"{plane}: an array of {array.dtype}, expected numbers")
    shape = tuple(array.shape)
    if plane.index is not None:
        plane.at(plane.index, shape[0] if shape else 0, "picture")
        shape = shape[1:]
    picture = _picture(shape)
    if len(picture) != 2 and not (len(picture) == 3 and picture[2] == 3):
        raise UserError(f"{plane}: an array {list(shape)}, expected a picture [h, w] or [h, w, 3]")
    return shape


@contextmanager
def _opened(plane: Plane) -> Iterator[Any]:
    """The array, read only where it is indexed."""
    path = plane.path
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            if "allow_pickle" in str(error) or "Python objects" in str(error):
                raise UserError(
                    f"{path}: holds pickled objects, which can run code; expected an array of numbers"
                ) from error
            raise UserError(f"{path}: cannot be read ({one_line(error)}); expected a whole .npy file") from error
        yield array
        return
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        hint = "; save it in MATLAB with -v7.3" if path.suffix == ".mat" else ""
        raise UserError(f"{path}: not an HDF5 file ({one_line(error)}){hint}") from error
    with file:
        found = file.get(plane.key) if plane.key else None
        if not isinstance(found, h5py.Dataset):
            names: list[str] = []
            file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
            raise UserError(f"{path}: no array {plane.key!r}; {nearest(plane.key, names)}")
        yield found
