"""Grey-scale elements of a DICOM header: modality and VOI transforms, padding and inversion.

pydicom's `apply_modality_lut` and `apply_voi_lut` assume that every header is complete. This module also
handles tags without values, empty sequences, tables of 8 bits packed two to a word, and functional groups of
enhanced objects.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dapt_jax.data.intensity import DEPTHS, Range, of_bits
from dapt_jax.errors import UserError

if TYPE_CHECKING:
    from pydicom import Dataset


@dataclass(frozen=True)
class Table:
    """A look-up table.

    Attributes:
        entries: Output for each input, uint8 or uint16 [n].
        first: The input of the first entry; inputs beyond either end use the nearest entry.
        bits: Depth of the output.
    """

    entries: np.ndarray
    first: int
    bits: int

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return the outputs for values of any type; non-finite values map to the first output."""
        if values.dtype.kind == "f":
            values = np.rint(np.nan_to_num(values, nan=self.first, posinf=2**31, neginf=-(2**31)))
        places = (values.astype(np.float64) - self.first).clip(0, len(self.entries) - 1)
        found: np.ndarray = self.entries[places.astype(np.int64)]
        return found


def groups(dataset: "Dataset", frame: int) -> list[Any]:
    """Return the places of a frame's attributes, the most specific first.

    These are the frame's own functional groups, the shared ones, and the object.
    """
    found = []
    for name, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = _items(dataset, name)
        if index < len(items):
            found.append(items[index])
    return [*found, dataset]


def macros(dataset: "Dataset", frame: int, sequence: str) -> Iterator[Any]:
    """Yield the items of a frame's functional group, the most specific first, then the object itself."""
    *inner, whole = groups(dataset, frame)
    for group in inner:
        yield from _items(group, sequence)[:1]
    yield whole


def modality(dataset: "Dataset", frame: int, path: Path) -> tuple[Table | None, float, float]:
    """Return the modality table of a frame, or its slope and intercept (1 and 0 if the header has none)."""
    for item in macros(dataset, frame, "PixelValueTransformationSequence"):
        for entry in _items(item, "ModalityLUTSequence"):
            if found := table(entry, dataset, path, signed=_signed(dataset)):
                return found, 1.0, 0.0
        slope, intercept = (_number(item.get(name)) for name in ("RescaleSlope", "RescaleIntercept"))
        if slope is None and item is dataset:
            slope = _number(item.get("DoseGridScaling"))
        if slope or intercept is not None:
            return None, slope or 1.0, intercept or 0.0
    return None, 1.0, 0.0


def interest(
    dataset: "Dataset", frame: int, path: Path, values: np.ndarray, signed: bool
) -> tuple[np.ndarray, Range | None]:
    """Return the displayed values and their range, by the frame's VOI table or window.

    The first complete one is used: a table takes precedence over a window, and the frame's own over shared
    ones. Tags without a value count as absent.
    """
    for item in macros(dataset, frame, "FrameVOILUTSequence"):
        for entry in _items(item, "VOILUTSequence"):
            if found := table(entry, dataset, path, signed=signed):
                return found.apply(values), of_bits(found.bits, f"table of the file ({found.bits} bits)")
        centres, widths = (_numbers(item.get(name)) for name in ("WindowCenter", "WindowWidth"))
        shape = str(item.get("VOILUTFunction", "") or "LINEAR").strip().upper()
        for centre, width in zip(centres, widths, strict=False):
            if centre is None or width is None or width <= 0:
                continue
            if shape == "SIGMOID":
                ramp = 1 / (1 + np.exp((-4 * (values.astype(np.float64) - centre) / width).clip(-700, 700)))
                return ramp, Range(0.0, 1.0, "sigmoid window of the file")
            if shape not in ("LINEAR", "LINEAR_EXACT"):
                raise UserError(
                    f"{path}: VOI LUT function {shape[:40]!r}; expected LINEAR, LINEAR_EXACT or SIGMOID"
                )
            # PS3.3 C.11.2.1.2: widths below 1 are valid for LINEAR_EXACT only.
            exact = shape == "LINEAR_EXACT" or width < 1
            middle, half = (centre, width / 2) if exact else (centre - 0.5, (width - 1) / 2)
            return values, Range(middle - half, middle + half, "window of the file")
    return values, None


def padding(dataset: "Dataset", stored: np.ndarray) -> np.ndarray | None:
    """Return which stored values are padding, bool of their shape; None if the header defines none."""
    name = "PixelPaddingValue"
    if stored.dtype.kind == "f":
        name = (
            "FloatPixelPaddingValue"
            if "FloatPixelPaddingValue" in dataset
            else "DoubleFloatPixelPaddingValue"
        )
    first = _number(_word(dataset.get(name), dataset))
    if first is None:
        return None
    limit = name.replace("PaddingValue", "PaddingRangeLimit")
    last = _number(_word(dataset.get(limit), dataset))
    low, high = sorted((first, first if last is None else last))
    if stored.dtype.kind != "f" and not _signed(dataset):
        low, high = (
            value + 65536 if value < 0 and dataset.BitsAllocated == 16 else value for value in (low, high)
        )
        low, high = sorted((low, high))
    elif stored.dtype.kind != "f" and dataset.BitsAllocated == 16:
        low, high = sorted(value - 65536 if value > 32767 else value for value in (low, high))
    marked: np.ndarray = (stored >= low) & (stored <= high)
    return marked if marked.any() else None


def is_inverted(dataset: "Dataset") -> bool:
    """Return whether the smallest value is white.

    The presentation shape decides or, if it is missing, the photometric interpretation.
    """
    shape = str(dataset.get("PresentationLUTShape", "") or "").strip().upper()
    if shape in ("IDENTITY", "INVERSE"):
        return shape == "INVERSE"
    return photometric(dataset) == "MONOCHROME1"


def photometric(dataset: "Dataset") -> str:
    """Return the photometric interpretation in upper case; "" if it is missing."""
    return str(dataset.get("PhotometricInterpretation", "") or "").strip().upper()


def table(item: "Dataset", dataset: "Dataset", path: Path, signed: bool) -> Table | None:
    """Read the table of a sequence item; None if it is present without a value.

    The output's depth is that of the descriptor, unless the entries exceed it or leave three quarters of it
    unused: then it is the smallest usual depth that holds them.

    Raises:
        UserError: The table has fewer entries than its descriptor states.
    """
    descriptor = [_number(value) for value in _sequence(item.get("LUTDescriptor"))]
    raw = item.get("LUTData")
    if (
        len(descriptor) != 3
        or None in descriptor
        or raw is None
        or (hasattr(raw, "__len__") and not len(raw))
    ):
        return None
    count, first, depth = (int(value) for value in descriptor if value is not None)
    count = (count & 0xFFFF) or 1 << 16
    if signed and first > 0x7FFF:
        first -= 1 << 16
    elif not signed and first < 0:
        first += 1 << 16
    entries = _entries(raw, count, depth, dataset)
    if len(entries) < count:
        raise UserError(
            f"{path}: a look-up table of {len(entries)} entries, its descriptor says {count}; it is damaged"
        )
    most = int(entries.max())
    if not most:
        return None
    if depth not in range(1, 17) or most >= 1 << depth or most < 1 << max(depth - 2, 0):
        depth = next(
            bits for bits in (*range(1, 8), *DEPTHS) if most < 1 << bits and (bits >= 8 or depth < 8)
        )
    return Table(entries, first, depth)


def _entries(raw: bytes | Sequence[int], count: int, depth: int, dataset: "Dataset") -> np.ndarray:
    """Return at most `count` entries of a table; 8-bit entries may be packed two to a word."""
    little = _is_little(dataset)
    if not isinstance(raw, bytes):
        words = np.array([int(value) & 0xFFFF for value in _sequence(raw)], np.uint16)
        if len(words) >= count or depth > 8:
            return words[:count]
        return np.frombuffer(words.astype("<u2").tobytes(), np.uint8)[:count]
    if depth <= 8 and len(raw) < 2 * count:
        return np.frombuffer(raw, np.uint8)[:count]
    return np.frombuffer(raw[: len(raw) // 2 * 2], "<u2" if little else ">u2")[:count].astype(np.uint16)


def _is_little(dataset: "Dataset") -> bool:
    syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    return bool(getattr(syntax, "is_little_endian", True))


def _signed(dataset: "Dataset") -> bool:
    return int(dataset.get("PixelRepresentation", 0) or 0) == 1


def _word(value: object, dataset: "Dataset") -> object:
    """Return a value of ambiguous type, which files with implicit VR may store as bytes."""
    if isinstance(value, bytes) and len(value) == 2:
        return int.from_bytes(value, "little" if _is_little(dataset) else "big", signed=_signed(dataset))
    return value


def _items(dataset: "Dataset", name: str) -> Sequence[Any]:
    found = dataset.get(name)
    return (
        found
        if found is not None and not isinstance(found, str | bytes) and hasattr(found, "__len__")
        else ()
    )


def _sequence(value: Any) -> Sequence[Any]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    return value if hasattr(value, "__len__") and not isinstance(value, str | bytes) else (value,)


def _numbers(value: object) -> list[float | None]:
    return [_number(each) for each in _sequence(value)]


def _number(value: Any) -> float | None:
    """Return a number, or None for a value that is empty, text or NaN."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None
