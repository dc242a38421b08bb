"""Slices of NIfTI volumes, read by nibabel: file order for indices, one orientation for display."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dapt_jax.data import limits
from dapt_jax.data.geometry import Geometry, Turn
from dapt_jax.data.intensity import PERCENTILES, Range, Samples, Statistics, foreground_span
from dapt_jax.data.plane import Plane, Window, medical
from dapt_jax.errors import UserError

_WHOLE = "a whole NIfTI file"
_EXACT = 1 << 24
_ONE_AT_A_TIME = threading.Lock()
Stamp = tuple[int, int]


def pixels(plane: Plane) -> np.ndarray:
    """Return the slice as uint8 [h, w]; see `samples`."""
    return samples(plane).shown()[0]


def samples(plane: Plane) -> Samples:
    """Return the values of a slice and their range.

    The range is `plane.window`, or percentiles of the volume's foreground.

    A slice is displayed by radiological convention: axial with anterior up, coronal and sagittal with
    superior up; the patient's right is on the left, and in sagittal slices anterior is on the left. Slices
    are numbered in the file's own order: `[k]` is index k of the stored array along the axis closest to
    `plane.axis`, as in other tools.

    Raises:
        UserError: See `volume`; or the slice does not exist.
    """
    found = values(plane)
    window = plane.window or PERCENTILES
    if window.of_set:
        return Samples(found, None, "NIfTI volumes")
    if window.percent:
        return Samples(found, _range(plane.path, _stamp(plane.path), window))
    return Samples(found, Range(window.low, window.high, "window of the setting"))


def values(plane: Plane) -> np.ndarray:
    """Return the values of the slice, float32 [h, w], oriented as by `samples`.

    NaN and infinity are those of the file.
    """
    index = _canonical_index(plane)
    return volume(plane.path).slice(plane.axis, index).T[::-1, ::-1]


def as_shown(plane: Plane, stored: np.ndarray) -> np.ndarray:
    """Orient an array [i, j] of a slice, with axes in the file's order, as `samples` orients the slice."""
    return _stored_to_shown(plane).apply(stored)


def as_stored(plane: Plane, shown: np.ndarray) -> np.ndarray:
    """Invert `as_shown`."""
    return _stored_to_shown(plane).inverse.apply(shown)


def _stored_to_shown(plane: Plane) -> Turn:
    codes = _header(plane.path, _stamp(plane.path)).codes
    first, second = (axis for axis in range(3) if codes[axis, 0] != plane.axis)
    rows, columns = codes[first, 1] > 0, codes[second, 1] > 0
    # In the displayed slice, both canonical axes are reversed, and the later of them is the row axis.
    return Turn(bool(rows), bool(columns), swap=bool(codes[first, 0] < codes[second, 0]))


def extent(plane: Plane) -> tuple[int, int]:
    """Return the height and width of the slice, from the header alone."""
    _canonical_index(plane)
    _, shape = _canonical(plane.path)
    first, second = (side for axis, side in enumerate(shape) if axis != plane.axis)
    return second, first


def length(path: Path, axis: int = 2) -> int:
    """Return the number of slices along an axis of the patient: 0 sagittal, 1 coronal, 2 axial."""
    return int(_canonical(path)[1][axis])


def slices(path: Path, axis: int = 2) -> Iterator[np.ndarray]:
    """Yield the slices of a volume, float32, in the file's own order, which `[k]` uses as well."""
    whole, count = volume(path), length(path, axis)
    for index in range(count)[:: -1 if _is_reversed(_header(path, _stamp(path)).codes, axis) else 1]:
        yield whole.slice(axis, index)


def geometry(plane: Plane) -> Geometry | None:
    """Return the position of the displayed slice in the patient.

    The result is None if the header has no coordinates (both codes 0).
    """
    header = _header(plane.path, _stamp(plane.path))
    if not header.placed:
        return None
    affine, shape = _canonical(plane.path)
    column, row = (axis for axis in range(3) if axis != plane.axis)
    corner = np.ones(4)
    corner[plane.axis] = _canonical_index(plane)
    corner[row], corner[column] = shape[row] - 1, shape[column] - 1
    return Geometry((affine @ corner)[:3], -affine[:3, row], -affine[:3, column])


def spacing(plane: Plane) -> tuple[float, float] | None:
    """Return the height and width of a pixel in millimetres.

    The result is None if the header's unit is unknown and its size a placeholder.
    """
    header = _header(plane.path, _stamp(plane.path))
    affine, _ = _canonical(plane.path)
    sizes = np.linalg.norm(affine[:3, :3], axis=0) * header.unit
    column, row = (axis for axis in range(3) if axis != plane.axis)
    return (float(sizes[row]), float(sizes[column])) if header.unit and (sizes > 0).all() else None


def affine_of(path: Path) -> str:
    """Return the affine of a file, for an error message."""
    rows = _header(path, _stamp(path)).affine[:3]
    return "[" + "; ".join(" ".join(f"{value:.4g}" for value in row) for row in rows) + "]"


@dataclass(frozen=True)
class Volume:
    """A volume in canonical orientation [right, anterior, superior], as stored: only slices are scaled.

    Attributes:
        stored: Values in the type of the file.
        slope: Slope in the header.
        intercept: Intercept in the header.
    """

    stored: np.ndarray
    slope: float
    intercept: float

    def slice(self, axis: int, index: int) -> np.ndarray:
        """Return a slice, float32."""
        # A view: numpy.take would reorder the whole volume in memory for every slice.
        return self._scaled(np.moveaxis(self.stored, axis, 0)[index])

    def _scaled(self, part: np.ndarray) -> np.ndarray:
        if (self.slope, self.intercept) == (1, 0):
            return part.astype(np.float32)
        return (part.astype(np.float64) * self.slope + self.intercept).astype(np.float32)

    def span(self, window: Window) -> tuple[float, float]:
        """Return percentiles of the foreground: exact, or, for large volumes, from a histogram."""
        if self.stored.size <= _EXACT:
            return foreground_span(self._scaled(self.stored), window)
        counted = Statistics()
        for index in range(self.stored.shape[2]):
            counted.add(self.slice(2, index))
        found = counted.range("the volume", depth=False, window=window)
        return found.low, found.high


def volume(path: Path) -> Volume:
    """Return a volume.

    The most recent volumes are cached within the limit, because slices are read one by one.

    Raises:
        UserError: The file is unreadable, is not three-dimensional, or exceeds the limit; names the path.
    """
    key = path, _stamp(path)
    with _ONE_AT_A_TIME:
        found = _volumes.pop(key, None)
        if found is None:
            header = _header(*key)
            # Free memory before anything is read.
            while (
                _volumes
                and header.stored_bytes + sum(v.stored.nbytes for v in _volumes.values()) > _kept_bytes()
            ):
                _volumes.popitem(last=False)
            found = _read(path, header)
        _volumes[key] = found
        return found


def _kept_bytes() -> int:
    return limits.decoded_bytes() // 2


def _stamp(path: Path) -> Stamp:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: no such NIfTI file") from error
    return stat.st_size, stat.st_mtime_ns


class _Header:
    """Header: shape [3], affine, orientation codes [3, 2] as stored, presence of coordinates, unit in mm."""

    def __init__(self, path: Path, image: Any, library: ModuleType):
        shape = image.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) == 3 and min(shape) < 1:
            raise UserError(f"{path}: a volume {list(shape)} without voxels; expected some along every axis")
        if len(shape) != 3:
            raise UserError(
                f"{path}: a NIfTI image of rank {len(shape)} {list(image.shape)}; expected a volume of rank 3"
            )
        kind = image.get_data_dtype()
        if kind.kind not in "uif":
            raise UserError(f"{path}: voxels of type {kind}; expected numbers")
        self.shape, self.affine = tuple(map(int, shape)), np.asarray(image.affine, float)
        codes = (
            library.io_orientation(self.affine) if np.isfinite(self.affine).all() else np.full((3, 2), np.nan)
        )
        if np.isnan(codes).any() or abs(np.linalg.det(self.affine[:3, :3])) < 1e-12:
            raise UserError(
                f"{path}: its affine names no orientation; expected one with three independent axes"
            )
        self.codes = codes.astype(int)
        header = image.header
        coded = "sform_code" in header and "qform_code" in header
        self.placed = not coded or bool(int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0)
        unit = header.get_xyzt_units()[0] if hasattr(header, "get_xyzt_units") else "mm"
        # Many writers omit the unit; every tool reads NIfTI without a unit in millimetres.
        self.unit = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}.get(unit, 0.0)
        voxels = int(np.prod(self.shape, dtype=object))
        self.stored_bytes = voxels * kind.itemsize
        # Stored values and, for small volumes, copies to sort.
        size = self.stored_bytes + 20 * min(voxels, _EXACT)
        limits.check(path, size, f"a volume of {' x '.join(map(str, self.shape))} voxels")
        start = int(header["vox_offset"]) if "vox_offset" in header else 0
        limits.check(path, start, "what lies before its voxels")
        named = path.name.lower().endswith(".gz")
        if not named and path.stat().st_size < start + self.stored_bytes and path.suffix.lower() == ".nii":
            raise UserError(f"{path}: {path.stat().st_size:,} bytes, cut short; expected {_WHOLE}")


_volumes: OrderedDict[tuple[Path, Stamp], Volume] = OrderedDict()


@functools.lru_cache(maxsize=256)
def _header(path: Path, stamp: Stamp) -> _Header:
    library = medical("nibabel", path)
    # nibabel reports what it repairs on standard error, in addition to the exception.
    library.imageglobals.logger.setLevel("CRITICAL")
    with limits.border(path, _WHOLE):
        return _Header(path, library.load(path), library)


def _canonical(path: Path) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the affine and shape of the volume in canonical orientation."""
    library, header = medical("nibabel", path), _header(path, _stamp(path))
    affine = header.affine @ library.orientations.inv_ornt_aff(header.codes, header.shape)
    shape = [0, 0, 0]
    for axis, (to, _) in enumerate(header.codes):
        shape[to] = header.shape[axis]
    return affine, tuple(shape)


def _is_reversed(codes: np.ndarray, axis: int) -> bool:
    return bool(codes[codes[:, 0] == axis, 1][0] < 0)


def _canonical_index(plane: Plane) -> int:
    """Return the slice's index in canonical orientation, from its index in the file."""
    count = length(plane.path, plane.axis)
    index = plane.at(plane.index, count, "slice")
    return (
        count - 1 - index
        if _is_reversed(_header(plane.path, _stamp(plane.path)).codes, plane.axis)
        else index
    )


def _read(path: Path, header: _Header) -> Volume:
    library = medical("nibabel", path)
    with limits.border(path, _WHOLE):
        # Not memory-mapped: if a mapped file becomes shorter, the process is killed.
        proxy = library.load(path, mmap=False).dataobj
        stored = np.asarray(proxy.get_unscaled()).reshape(header.shape)
        slope, intercept = float(proxy.slope), float(proxy.inter)
        return Volume(library.orientations.apply_orientation(stored, header.codes), slope, intercept)


@functools.lru_cache(maxsize=4096)
def _range(path: Path, stamp: Stamp, window: Window) -> Range:
    low, high = volume(path).span(window)
    return Range(low, high, f"{window.low:g}% to {window.high:g}% of the volume")
