"""Location of one picture in a file, and the values shown as black and white.

A picture is a file, or a slice, frame, page or array within one.
"""

import importlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dapt_jax.data.tiles import Tile
from dapt_jax.errors import UserError

_SHOWN = 200
"""Maximum length of an exception's text in an error line: some libraries quote whole files."""


@dataclass(frozen=True)
class Window:
    """The values that become black and white; values beyond them are clipped.

    Attributes:
        low: Value shown as black.
        high: Value shown as white.
        percent: Whether the two are percentiles (of the whole volume for a slice of a volume).
        of_set: Whether they are percentiles of the whole set, which override the windows of its files.
    """

    low: float
    high: float
    percent: bool = False
    of_set: bool = False

    @classmethod
    def parse(cls, text: str) -> "Window | None":
        """Parse a window, such as "-160,240", "1%,99%" or "set"; "" gives None.

        Numbers are values (such as Hounsfield units), percentages are percentiles of each file, and "set"
        uses percentiles of the set.

        Raises:
            UserError: The text has another form, or black is not below white.
        """
        if not text:
            return None
        if text.strip() == "set":
            return cls(1, 99, percent=True, of_set=True)
        found = re.fullmatch(r"\s*(-?[\d.]+)(%?)\s*,\s*(-?[\d.]+)(%?)\s*", text)
        try:
            low, high = (float(found[1]), float(found[3])) if found and found[2] == found[4] else (0.0, 0.0)
        except ValueError:
            low = high = 0.0
        percent = bool(found and found[2])
        if not low < high or (percent and not (low >= 0 and high <= 100)):
            raise UserError(
                f"window={text!r}; expected black and white as values '-160,240' or percentiles '1%,99%', "
                "or 'set' for those of the whole set"
            )
        return cls(low, high, percent)


@dataclass(frozen=True)
class Plane:
    """One two-dimensional picture in a file that may hold several.

    Attributes:
        path: The file.
        index: Slice of a NIfTI volume in the order of its file, frame of a DICOM file, page of a TIFF, or
            picture of an array [n, h, w]; None if the file holds one picture.
        axis: Axis of a NIfTI volume in canonical orientation: 0 sagittal, 1 coronal, 2 axial slices.
        key: Array in an HDF5 file, such as "cjdata/image".
        window: Black and white; None for the rule of the kind of file, see `dapt_jax.data.decode.decode`.
        tile: Square of the picture; None for all of it.
    """

    path: Path
    index: int | None = None
    axis: int = 2
    key: str = ""
    window: Window | None = None
    tile: Tile | None = None

    def __str__(self) -> str:
        key = f":{self.key}" if self.key else ""
        return f"{self.path}{key}" + ("" if self.index is None else f"[{self.index}]") + str(self.tile or "")

    @property
    def whole(self) -> "Plane":
        """The picture that a tile is cut from; itself for a whole picture."""
        return replace(self, tile=None) if self.tile else self

    def at(self, index: int | None, count: int, what: str) -> int:
        """Return the checked index to read, out of `count`.

        Raises:
            UserError: No picture is selected although there are several, or the index is too large.
        """
        if not count:
            raise UserError(f"{self.path}: holds no {what}; expected one or more")
        if index is None and count != 1:
            raise UserError(
                f"{self.path}: holds {count} {what}s, expected one image per file; name one, 0 to {count - 1}"
            )
        if not 0 <= (index or 0) < count:
            raise UserError(f"{self.path}: no {what} {index}; it holds {count}, numbered from 0")
        return index or 0


Source = str | Path | Plane


def plane(source: Source) -> Plane:
    """Return a source as a `Plane`: a path alone is a file that holds one picture."""
    return source if isinstance(source, Plane) else Plane(Path(source))


def file_of(source: Source) -> Path:
    """Return the file of a source."""
    return plane(source).path


def medical(package: str, path: Path) -> Any:
    """Import a package that only medical formats need.

    Raises:
        UserError: It is not installed; names the extra that provides it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{path}: reading it takes {package}; pip install 'dapt_jax[medical]'") from error


def one_line(said: BaseException | str) -> str:
    """Return an exception or a text from a file as one short line without control characters."""
    if isinstance(said, MemoryError):
        return "not enough memory"
    text = "".join(letter if letter.isprintable() else " " for letter in str(said))
    return " ".join(text.split())[:_SHOWN] or ("" if isinstance(said, str) else type(said).__name__)
