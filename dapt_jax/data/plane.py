"""Where one picture lies: a file, or a slice, frame, page or array within one; and which of its values are black and white."""

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dapt_jax.errors import UserError


@dataclass(frozen=True)
class Window:
    """The values that become black and white; what lies beyond them is clipped.

    Attributes:
        low: black.
        high: white.
        percent: whether the two are percentiles (of the whole volume, where the picture is a slice of one).
    """

    low: float
    high: float
    percent: bool = False

    @classmethod
    def parse(cls, text: str) -> "Window | None":
        """Reads "-160,240" (values, such as Hounsfield units) or "1%,99%" (percentiles); "" is None.

        Raises:
            UserError: anything else, or black that is not below white.
        """
        if not text:
            return None
        found = re.fullmatch(r"\s*(-?[\d.]+)(%?)\s*,\s*(-?[\d.]+)(%?)\s*", text)
        try:
            low, high = (float(found[1]), float(found[3])) if found and found[2] == found[4] else (0.0, 0.0)
        except ValueError:
            low = high = 0.0
        percent = bool(found and found[2])
        if not low < high or (percent and not (low >= 0 and high <= 100)):
            raise UserError(f"window={text!r}; expected black and white as values '-160,240' or percentiles '1%,99%'")
        return cls(low, high, percent)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Turns values of any number type and shape into uint8; what is not finite counts as 0."""
        values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = self.low, self.high
        if self.percent:
            low, high = np.percentile(values, (low, high))
        span = high - low
        return np.rint(np.clip((values - low) / (span or 1), 0, 1) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Plane:
    """One two-dimensional picture in a file that may hold several.

    Attributes:
        path: the file.
        index: the slice of a NIfTI volume, frame of a DICOM file, page of a TIFF, or picture of an array [n, h, w]; None
            where the file holds one.
        axis: of a NIfTI volume in canonical orientation: 0 sagittal, 1 coronal, 2 axial slices.
        key: the array in an HDF5 file, such as "cjdata/image".
        window: black and white; None for the rule of the kind of file, see `dapt_jax.data.decode.decode`.
    """

    path: Path
    index: int | None = None
    axis: int = 2
    key: str = ""
    window: Window | None = None

    def __str__(self) -> str:
        key = f":{self.key}" if self.key else ""
        return f"{self.path}{key}" + ("" if self.index is None else f"[{self.index}]")

    def at(self, index: int | None, count: int, what: str) -> int:
        """The index to read among `count`, checked.

        Raises:
            UserError: none was chosen though there are several, or there are fewer.
        """
        if index is None and count != 1:
            raise UserError(
                f"{self.path}: holds {count} {what}s, expected one image per file; name one, 0 to {count - 1}"
            )
        if not 0 <= (index or 0) < count:
            raise UserError(f"{self.path}: no {what} {index}; it holds {count}, numbered from 0")
        return index or 0


Source = str | Path | Plane


def plane(source: Source) -> Plane:
    """A source as a `Plane`: a path alone is a file that holds one picture."""
    return source if isinstance(source, Plane) else Plane(Path(source))


def file_of(source: Source) -> Path:
    """The file in which a source lies."""
    return plane(source).path


def medical(package: str, path: Path) -> Any:
    """Imports a package that only medical formats need.

    Raises:
        UserError: it is not installed; names the extra that has it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{path}: reading it takes {package}; pip install 'dapt_jax[medical]'") from error


def one_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
