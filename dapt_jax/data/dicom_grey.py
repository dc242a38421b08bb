"""What a DICOM header says about grey: modality table or rescale, table or window of interest, padding, inversion.

Own code where pydicom's `apply_modality_lut` and `apply_voi_lut` take every header to be whole: tags without
values, empty sequences, tables of 8 bits packed two to a word, functional groups of enhanced objects.
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
        entries: Output of each input, uint8 or uint16 [n].
        first: The input of the first entry; inputs beyond either end take the nearest.
        bits: Depth of the output.
    """

    entries: np.ndarray
    first: int
    bits: int

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return the outputs of numbers of any type; of what is not finite, the first."""
        if values.dtype.kind == "f":
            values = np.rint(np.nan_to_num(values, nan=self.first, posinf=2**31, neginf=-(2**31)))
        places = (values.astype(np.float64) - self.first).clip(0, len(self.entries) - 1)
        found: np.ndarray = self.entries[places.astype(np.int64)]
        return found


def groups(dataset: "Dataset", frame: int) -> list[Any]:
    """Return where a frame's attributes may stand, the most specific first: its own groups, shared groups, the object."""
    found = []
    for name, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = _items(dataset, name)
        if index < len(items):
            found.append(items[index])
    return [*found, dataset]


def macros(dataset: "Dataset", frame: int, sequence: str) -> Iterator[Any]:
    """Yield the items of a functional group's sequence for a frame, the most specific first, then the object itself."""
    *inner, whole = groups(dataset, frame)
    for group in inner:
        yield from _items(group, sequence)[:1]
    yield whole


def modality(dataset: "Dataset", frame: int, path: Path) -> tuple[Table | None, float, float]:
    """Return the modality table of a frame, or slope and intercept (1 and 0 where the header has none)."""
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
    """Return the values that are shown, and their range, by the frame's table or window of interest.

    The first that is whole: a table goes before a window, the frame's own before those that it shares. Tags
    that are there without a value count as absent.
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
            # PS3.3 C.11.2.1.2: widths below 1 are of LINEAR_EXACT alone.
            exact = shape == "LINEAR_EXACT" or width < 1
            middle, half = (centre, width / 2) if exact else (centre - 0.5, (width - 1) / 2)
            return values, Range(middle - half, middle + half, "window of the file")
    return values, None


def padding(dataset: "Dataset", stored: np.ndarray) -> np.ndarray | None:
    """Return which stored values are padding, bool of their shape; None where the header names none."""
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
    """Whether the least value is white: as the presentation shape says, and where there is none, the photometric type."""
    shape = str(dataset.get("PresentationLUTShape", "") or "").strip().upper()
    if shape in ("IDENTITY", "INVERSE"):
        return shape == "INVERSE"
    return photometric(dataset) == "MONOCHROME1"


def photometric(dataset: "Dataset") -> str:
    """Return the photometric interpretation in capitals; "" where there is none."""
    return str(dataset.get("PhotometricInterpretation", "") or "").strip().upper()


def table(item: "Dataset", dataset: "Dataset", path: Path, signed: bool) -> Table | None:
    """Read a table of a sequence's item; None where it is there without a value.

    The output's depth is the descriptor's, unless the entries exceed it or leave three quarters of it unused:
    then it is the least usual depth that holds them.

    Raises:
        UserError: It has fewer entries than it says.
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
    """The entries of a table, as many as there are up to `count`; of 8 bits they may lie two to a word."""
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
    """A value of ambiguous type, which implicit files may leave as bytes."""
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
    """A number, or None for what is none: empty, text, NaN."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None
