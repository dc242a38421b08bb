"""The files of `mode=predict`: a CSV that grows, masks in the images' own geometry, and overlays."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from jaxtyping import Float
from PIL import Image

from dapt_jax.data import nifti
from dapt_jax.data.framing import Framing
from dapt_jax.data.plane import Plane, medical
from dapt_jax.errors import UserError
from dapt_jax.runtime import atomic_files, safe_paths

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters by which a spreadsheet takes a cell for a formula."""

COLOURS = ((230, 85, 13), (0, 114, 178), (0, 158, 115), (204, 121, 167), (240, 228, 66), (86, 180, 233))


def text_cell(value: str) -> str:
    """Return a text as a cell of one line that no spreadsheet runs: formulas start with an apostrophe.

    >>> text_cell("=1+1.png"), text_cell("a.png")
    ("'=1+1.png", 'a.png')
    """
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in value)
    return f"'{shown}" if shown.startswith(_FORMULA) or value.startswith(_FORMULA) else shown


def line(cells: Sequence[str]) -> bytes:
    """Return a row of a CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def number(value: float) -> str:
    """Return a number as a cell; empty for NaN."""
    return "" if np.isnan(value) else f"{float(value):.6g}"


def class_header(classes: Sequence[str], *, spreads: bool) -> list[str]:
    """Return the columns of `class_cells`."""
    return ["predicted", *(f"p_{name}" for name in classes), *(f"sd_{name}" for name in classes if spreads)]


def class_cells(
    classes: Sequence[str],
    probabilities: Float[np.ndarray, " classes"],
    spread: Sequence[float] | Float[np.ndarray, " classes"],
    *,
    multi_label: bool,
) -> list[str]:
    """Return the cells of one prediction: classes, probabilities, spreads; empty ones of probabilities of NaN.

    Args:
        classes: Names of the classes.
        probabilities: Their probabilities.
        spread: Standard deviations over members; empty for none.
        multi_label: Whether every class of a probability of .5 or more is predicted, or the most likely one.
    """
    if np.isnan(probabilities).any():
        return [""] * (1 + len(classes) + len(spread))
    chosen = classes[int(probabilities.argmax())]
    if multi_label:
        chosen = "|".join(name for name, each in zip(classes, probabilities, strict=True) if each >= 0.5)
    return [text_cell(chosen), *map(number, [*probabilities, *spread])]


def has_rows(path: Path) -> bool:
    """Return whether a table is there and holds a whole row below its header."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return bool(file.readline()) and file.readline().endswith(b"\n")


class Table:
    """A CSV to which whole rows are appended; after a kill it goes on behind the last whole row.

    Attributes:
        path: The file.
        header: Its columns; the first is the name of the image.
    """

    def __init__(self, path: Path, header: Sequence[str]):
        """Open the file, or make it; rows that are there already stay until `keep` is called.

        Raises:
            UserError: The file has other columns.
        """
        self.path, self.header = path, tuple(header)
        path.parent.mkdir(parents=True, exist_ok=True)
        first = line(self.header)
        if not path.exists() or path.stat().st_size < len(first):
            path.write_bytes(first)
        self._file: IO[bytes] = path.open("r+b")
        if self._file.readline() != first:
            self._file.close()
            raise UserError(
                f"{path}: has other columns than {', '.join(self.header)}; expected another --workdir"
            )

    def names(self) -> Iterator[tuple[str, int]]:
        """Yield the first cell of each whole row, and where the row ends in the file."""
        with self.path.open("rb") as file:
            end = len(file.readline())
            for row in file:
                end += len(row)
                if not row.endswith(b"\n"):
                    return
                yield next(csv.reader([row.decode()]))[0], end

    def keep(self, end: int) -> None:
        """Remove what follows a place in the file, from which `append` goes on; 0 for all rows."""
        self._file.seek(end or len(line(self.header)))
        self._file.truncate()

    def append(self, rows: Sequence[Sequence[str]]) -> None:
        """Append rows."""
        self._file.write(b"".join(map(line, rows)))
        self._file.flush()

    def close(self) -> None:
        """Write everything to the disk and close the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def place(folder: Path, name: str, suffix: str) -> Path:
    """Return the path of the mask or overlay of an image below a folder.

    >>> place(Path("masks"), "../b/1.dcm", ".png").as_posix()
    'masks/__/b/1.dcm.png'

    Args:
        folder: The folder.
        name: Name of the image; of an absolute name the parts remain. A step out of a folder stays one, as `__`:
            `../b/1.dcm` and `b/1.dcm` are two images.
        suffix: Suffix that is added to the name, which stays whole: `a.png` and `a.jpg` are two images.
    """
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part.strip("/")]
    parts = ["__" if part == ".." else part.replace(":", "_") for part in parts]
    return safe_paths.below(folder, "/".join([*parts[:-1], parts[-1] + suffix]), name)


def at_size(probabilities: np.ndarray, extent: tuple[int, int], framing: Framing) -> np.ndarray:
    """Return probabilities of pixels at the size of the image's file, float32 [h, w, outputs].

    Outside of what the square shows, which the model does not see, they are zero: background.

    Args:
        probabilities: float32 [side, side, outputs].
        extent: Height and width of the file's image.
        framing: How the file's image became the square.
    """
    top, left, bottom, right = framing.box(extent)
    first_row, first_column, last_row, last_column = framing.inside(extent)
    shown = probabilities[first_row:last_row, first_column:last_column]
    whole = np.zeros((*extent, shown.shape[-1]), np.float32)
    for output in range(shown.shape[-1]):
        layer = Image.fromarray(np.ascontiguousarray(shown[..., output]))
        resized = layer.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
        whole[top:bottom, left:right, output] = np.asarray(resized)
    return whole


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write a grey or colour picture atomically."""
    with atomic_files.replacing(path, durable=False) as file:
        Image.fromarray(pixels).save(file, "PNG")


def overlay(image: np.ndarray, mask: np.ndarray, segments: int, *, overlapping: bool) -> np.ndarray:
    """Return an image with its predicted segments in colour, uint8 [h, w, 3].

    Args:
        image: uint8 [h, w, 3].
        mask: uint8 [h, w]: values of segments, or bit fields.
        segments: Number of segments, the background included.
        overlapping: Whether the mask is of bit fields.
    """
    found = image.astype(np.float32)
    for place in range(segments - 1):
        region = (mask >> place & 1).astype(bool) if overlapping else mask == place + 1
        colour = np.asarray(COLOURS[place % len(COLOURS)], np.float32)
        found[region] = 0.55 * found[region] + 0.45 * colour
    return found.astype(np.uint8)


class VolumeMask:
    """The mask of a NIfTI volume, slice by slice, in the volume's own geometry.

    Attributes:
        file: Where it is written.
    """

    def __init__(self, volume: Path, axis: int, file: Path):
        """Start with background everywhere.

        Args:
            volume: The NIfTI file.
            axis: Axis of its slices: 0 sagittal, 1 coronal, 2 axial.
            file: See the attribute.
        """
        self.file = file
        self._library = medical("nibabel", volume)
        self._image = self._library.load(volume, mmap=False)
        self._shape = tuple(self._image.shape[:3])
        codes = self._library.io_orientation(self._image.affine)
        self._axis = int(np.flatnonzero(codes[:, 0] == axis)[0])
        self.values = np.zeros(self._shape, np.uint8)

    def put(self, plane: Plane, shown: np.ndarray) -> None:
        """Set a slice.

        Args:
            plane: The slice.
            shown: Its mask, uint8 [h, w], oriented as the slice is read.
        """
        np.moveaxis(self.values, self._axis, 0)[plane.index or 0] = nifti.as_stored(plane, shown)

    def write(self) -> None:
        """Write the volume atomically, with affine, codes and units of the image."""
        made = self._library.Nifti1Image(self.values, self._image.affine)
        source = self._image.header
        for name in ("sform", "qform"):
            if f"{name}_code" in source:
                affine, code = getattr(self._image, f"get_{name}")(coded=True)
                getattr(made, f"set_{name}")(affine, int(code))  # code 0: the file names no coordinates
        if hasattr(source, "get_xyzt_units"):
            made.header.set_xyzt_units(source.get_xyzt_units()[0])
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f".partial-{self.file.name}")
        self._library.save(made, partial)
        partial.replace(self.file)
