"""Images in arrays on disk: NumPy's .npy files and HDF5 files, including MATLAB 7.3's .mat files."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dapt_jax.data import hdf5, hdf5_trial, limits
from dapt_jax.data.intensity import Samples, integers_or_floats
from dapt_jax.data.pixels import windowed
from dapt_jax.data.plane import Plane, one_line
from dapt_jax.errors import UserError, nearest

_HEADER_BYTES = 1 << 20
# Files written by Python 2 are read like any others.
warnings.filterwarnings("ignore", message="Reading `.npy` or `.npz` file required", category=UserWarning)
_NAMES = 1000


def pixels(plane: Plane) -> np.ndarray:
    """Return the picture as uint8 [h, w] or [h, w, 3]; see `samples`."""
    return samples(plane).shown()[0]


def samples(plane: Plane) -> Samples:
    """Return the values of a picture and their range.

    The range is `plane.window`, or follows from the type of the array and the values of the set.
    """
    return windowed(integers_or_floats(values(plane), plane.path.suffix.lower().lstrip(".")), plane)


def values(plane: Plane) -> np.ndarray:
    """Return the values [h, w], or [h, w, 3] of a colour picture.

    Raises:
        UserError: The file, array or picture does not exist, the file holds pickled objects, or the shape is
            not that of a picture.
    """
    with _opened(plane) as array:
        shape = _shape(plane, array)
        found = np.asarray(array[()] if len(shape) == array.ndim else array[plane.index or 0])
    # MATLAB stores columns first.
    found = found.T if plane.path.suffix.lower() == ".mat" else found
    return found.reshape(_picture(found.shape))


def extent(plane: Plane) -> tuple[int, int]:
    """Return the height and width without reading the values."""
    with _opened(plane) as array:
        shape = _shape(plane, array)
    height, width = _picture(shape[::-1] if plane.path.suffix.lower() == ".mat" else shape)[:2]
    return height, width


def scalar(path: Path, key: str) -> np.ndarray:
    """Return a small array of an HDF5 file, flattened: a label, or the character codes of a text."""
    with _opened(Plane(path, key=key)) as array:
        listed = hdf5.chunk_list_bytes(array.shape, array.chunks)
        limits.check(path, array.size * array.dtype.itemsize + listed, f"{key}")
        return np.asarray(array[()]).ravel()


def length(path: Path) -> int:
    """Return the number of pictures in a .npy file [n, h, w] or [n, h, w, channels]."""
    with _opened(Plane(path)) as array:
        if array.ndim < 3:
            raise UserError(f"{path}: an array {list(array.shape)}, expected pictures [n, h, w]")
        return len(array)


def _picture(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a picture's shape without its axis of one channel, wherever that axis is."""
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
    if 0 in picture:
        raise UserError(
            f"{plane}: an array {list(shape)} without pixels, expected a picture [h, w] or [h, w, 3]"
        )
    size = int(np.prod(picture, dtype=object)) * (2 * array.dtype.itemsize + 18)
    if isinstance(array, h5py.Dataset) and array.chunks:
        size += hdf5.chunk_list_bytes(shape, array.chunks[array.ndim - len(shape) :])
    limits.check(plane.path, size, f"a picture {list(picture)} of {array.dtype}")
    return shape


def _check_header(path: Path) -> None:
    """Refuse a .npy header that claims an implausible length.

    NumPy allocates a buffer of the length that the header claims.
    """
    with path.open("rb") as file:
        start = file.read(12)
    # Versions from 2 on have four bytes for the length, version 1 has two.
    if start[:6] == b"\x93NUMPY" and start[6] > 1 and int.from_bytes(start[8:12], "little") > _HEADER_BYTES:
        raise UserError(
            f"{path}: cannot be read (a header of more than {_HEADER_BYTES:,} bytes); expected a .npy file"
        )


@contextmanager
def _opened(plane: Plane) -> Iterator[Any]:
    """Yield the array, which is read only where it is indexed."""
    path = plane.path
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix.lower() == ".npy":
        with limits.border(path, "a whole .npy file"):
            _check_header(path)
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=_HEADER_BYTES)
            except ValueError as error:
                if "allow_pickle" in str(error) or "Python objects" in str(error):
                    raise UserError(
                        f"{path}: holds pickled objects, which can run code; expected an array of numbers"
                    ) from error
                raise
            yield array
        return
    with path.open("rb") as file:
        start = file.read(8)
    if start != hdf5_trial.MAGIC and path.suffix.lower() == ".mat" and not h5py.is_hdf5(path):
        raise UserError(f"{path}: not an HDF5 file (another mark at its start); save it in MATLAB with -v7.3")
    hdf5_trial.check(path)
    with limits.border(path, "a whole HDF5 file"):
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise UserError(f"{path}: not an HDF5 file ({one_line(error)})") from error
        with file:
            found = hdf5_trial.follow(file, plane.key) if plane.key else None
            if not isinstance(found, h5py.Dataset):
                names = [name for name, _ in hdf5_trial.datasets(file, _NAMES)]
                raise UserError(f"{path}: no array {plane.key!r}; {nearest(plane.key, names)}")
            hdf5_trial.check_dataset(path, plane.key, found)
            yield found
