"""DICOM files read by pydicom: stored values to grey, colour, frames, and positions of slices in the patient.

The order of operations is that of `dapt_jax.data.intensity`; `dapt_jax.data.dicom_grey` reads the header
elements that it needs.
"""

import logging
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dapt_jax.data import dicom_grey, limits
from dapt_jax.data.geometry import Geometry
from dapt_jax.data.intensity import EIGHT_BITS, Range, Samples, of_bits
from dapt_jax.data.pixels import windowed
from dapt_jax.data.plane import Plane, medical, one_line
from dapt_jax.errors import UserError

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

_WHOLE = "a whole DICOM file"
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_CHUNK = 1 << 20
_RLE_RATIO = 64
_NO_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation: a mask",
    "1.2.840.10008.5.1.4.1.1.66.7": "a segmentation of labels: a mask",
    "1.2.840.10008.5.1.4.1.1.481.2": "a radiotherapy dose",
    "1.2.840.10008.5.1.4.1.1.30": "a parametric map",
}
"""Storage classes (DICOM PS3.4, annex B.5) whose pixels are no picture, and what they are."""
_RLE, _DEFLATED = "1.2.840.10008.1.2.5", b"1.2.840.10008.1.2.1.99"
_OUTLIERS = 1e-3

warnings.filterwarnings("ignore", module=r"pydicom\b")


def pixels(plane: Plane) -> np.ndarray:
    """Return the picture as displayed: uint8 [h, w], or [h, w, 3] for colour.

    Where the range depends on a set, the picture is a set of its own.
    """
    return samples(plane).shown()[0]


def samples(plane: Plane) -> Samples:
    """Return the values of a frame after the modality transform, and their range from the header.

    The values are also mapped by the VOI table, if there is one.

    Without a window or VOI table, the range is the depth (BitsStored) of unsigned values that are not
    rescaled, if that is less than the bits allocated; else that of the set of images with the same modality
    and unit.

    Raises:
        UserError: See `values`; or the photometric interpretation is unknown, or the pixels are those of a
            segmentation, a dose or a map of parameters.
    """
    dataset, stored, frame = _read(plane, as_picture=True)
    with limits.border(plane.path, "a DICOM image whose values can be shown"):
        kind = dicom_grey.photometric(dataset)
        if kind == "PALETTE COLOR":
            return windowed(_palette(dataset, stored, plane), plane)
        if stored.ndim == 3:
            return windowed(_colour(dataset, stored), plane)
        return _grey(dataset, stored, frame, plane)


def _grey(dataset: "Dataset", stored: np.ndarray, frame: int, plane: Plane) -> Samples:
    path, window = plane.path, plane.window
    padding = dicom_grey.padding(dataset, stored)
    inverted = dicom_grey.is_inverted(dataset)
    if dataset.BitsAllocated == 1:
        return Samples(stored * np.uint8(255), Range(0, 255, "one bit", 8), inverted=inverted)
    table, slope, intercept = dicom_grey.modality(dataset, frame, path)
    known: Range | None = None
    plain = not table and slope == 1 and intercept == 0
    values = table.apply(stored) if table else stored if plain else _rescaled(stored, slope, intercept)
    if window and not window.of_set and not window.percent:
        known = Range(window.low, window.high, "window of the setting")
    elif window is None:
        signed = stored.dtype.kind in "if" or intercept < 0
        values, known = dicom_grey.interest(dataset, frame, path, values, signed)
        if known is None and table:
            known = of_bits(table.bits, f"modality table of the file ({table.bits} bits)")
        elif known is None and plain:
            known = _declared(dataset, stored, padding)
    units = str(dataset.get("Units", "") or dataset.get("RescaleType", "") or "") if not plain else ""
    pool = " ".join(
        filter(None, ("DICOM", str(dataset.get("Modality", "") or ""), units, "" if plain else "rescaled"))
    )
    found = Samples(values, known, pool, padding, inverted, depth=plain)
    if window and window.percent and not window.of_set:
        return replace(found, known=replace(found, depth=False).own_range("the file", window))
    return found


def _rescaled(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    if stored.dtype.kind in "ui" and slope == 1 and intercept == int(intercept) and abs(intercept) < 1 << 30:
        return stored.astype(np.int32 if stored.dtype.itemsize < 4 else np.int64) + int(intercept)
    return stored.astype(np.float64) * slope + intercept


def _declared(dataset: "Dataset", stored: np.ndarray, padding: np.ndarray | None) -> Range | None:
    """Return the range of the depth that the header declares, if it is informative.

    It must be smaller than the container's depth and must not be contradicted by the values.
    """
    bits, allocated = int(dataset.get("BitsStored", 0) or 0), int(dataset.BitsAllocated)
    if stored.dtype.kind != "u" or not 0 < bits <= 16 or (bits == allocated and bits != 8):
        return None
    above = stored >= 1 << bits if padding is None else (stored >= 1 << bits) & ~padding
    if above.mean() > _OUTLIERS:
        return None
    return of_bits(bits, f"depth in the header ({bits} bits)")


def _palette(dataset: "Dataset", stored: np.ndarray, plane: Plane) -> Samples:
    library = medical("pydicom.pixels", plane.path)
    coloured = library.apply_color_lut(stored, dataset)[..., :3]
    if coloured.dtype == np.uint8:
        return Samples(coloured, EIGHT_BITS)
    # Palettes have 16 bits per colour, whatever the depth of their indices; some hold 8-bit values. The
    # table, not the image, decides which.
    count, first = (int(value) for value in dataset.RedPaletteColorLookupTableDescriptor[:2])
    inputs = np.arange(first, first + ((count & 0xFFFF) or 1 << 16), dtype=np.int64)
    bits = 8 if library.apply_color_lut(inputs[None], dataset)[..., :3].max() < 1 << 8 else 16
    return Samples(coloured, of_bits(bits, f"palette of the file ({bits} bits)"))


def _colour(dataset: "Dataset", stored: np.ndarray) -> Samples:
    bits, allocated = int(dataset.get("BitsStored", 0) or 0), int(dataset.BitsAllocated)
    if stored.dtype == np.uint8:
        return Samples(stored, EIGHT_BITS)
    if 8 <= bits < allocated or (bits == allocated == 16 and stored.dtype.kind != "u"):
        return Samples(stored, of_bits(bits, f"depth in the header ({bits} bits)"))
    if allocated > 16:
        return Samples(stored, of_bits(bits, f"depth in the header ({bits} bits)"))
    return Samples(stored, None, "DICOM colour", depth=True)


def values(plane: Plane) -> np.ndarray:
    """Return the stored values [h, w] or [h, w, 3], as masks use them.

    Raises:
        UserError: The file is not DICOM, has no pixel data, has a transfer syntax that is unknown or that no
            installed package decodes, or holds several frames of which none is selected.
    """
    return _read(plane)[1]


def extent(plane: Plane) -> tuple[int, int]:
    """Return the height and width, from the header alone."""
    dataset = _open(plane.path, stop_before_pixels=True)
    with limits.border(plane.path, _WHOLE):
        return int(dataset.get("Rows", 0) or 0), int(dataset.get("Columns", 0) or 0)


def geometry(plane: Plane) -> Geometry | None:
    """Return the position of the frame in the patient, in RAS+; None if the header does not state it.

    DICOM's own axes point left, posterior and superior.
    """
    dataset = _open(plane.path, stop_before_pixels=True)
    with limits.border(plane.path, _WHOLE):
        frame = plane.index or 0
        position = _vector(dataset, frame, "PlanePositionSequence", "ImagePositionPatient", 3)
        turned = _vector(dataset, frame, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
        steps = _spacing(dataset, frame)
        if position is None or turned is None or steps is None:
            return None
        to_ras = np.array([-1.0, -1.0, 1.0])
        return Geometry(position * to_ras, turned[3:] * to_ras * steps[0], turned[:3] * to_ras * steps[1])


def spacing(plane: Plane) -> tuple[float, float] | None:
    """Return the height and width of a pixel in the patient, in millimetres.

    The result is None if the header does not state them.

    The spacing at the detector (ImagerPixelSpacing) is not the spacing in the patient and is ignored.
    """
    dataset = _open(plane.path, stop_before_pixels=True)
    with limits.border(plane.path, _WHOLE):
        return _spacing(dataset, plane.index or 0)


def _spacing(dataset: "Dataset", frame: int) -> tuple[float, float] | None:
    found = _vector(dataset, frame, "PixelMeasuresSequence", "PixelSpacing", 2)
    return None if found is None or (found <= 0).any() else (float(found[0]), float(found[1]))


def _vector(dataset: "Dataset", frame: int, sequence: str, name: str, length: int) -> np.ndarray | None:
    for item in dicom_grey.macros(dataset, frame, sequence):
        try:
            found = np.array([float(value) for value in item.get(name) or ()])
        except (TypeError, ValueError):
            continue
        if found.shape == (length,) and np.isfinite(found).all():
            return found
    return None


def header(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return elements of the header as text, such as `("PatientID",)`; "" for missing elements."""
    dataset = _open(path, stop_before_pixels=True, specific_tags=list(names))
    with limits.border(path, _WHOLE):
        return tuple(str(dataset.get(name, "") or "").strip() for name in names)


def _open(path: Path, **options: Any) -> Any:
    library = medical("pydicom", path)
    # pydicom reports what it repairs on standard error, including parts of the file.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with limits.border(path, _WHOLE):
        try:
            _check_deflated(path)
            with limits.Bounded(path) as file:
                return library.dcmread(file, **options)
        except library.errors.InvalidDicomError as error:
            raise UserError(f"{path}: not a DICOM file (it has no DICM mark after its preamble)") from error


def _check_deflated(path: Path) -> None:
    """Refuse a deflated file that inflates to more than the limit, because pydicom inflates it completely."""
    with path.open("rb") as file:
        head = file.read(_CHUNK)
        if _DEFLATED not in head:
            return
        at = 132
        while head[at : at + 2] == b"\x02\x00":
            long = head[at + 4 : at + 6] in (b"OB", b"OW", b"UN", b"SQ", b"UT")
            size = int.from_bytes(head[at + 8 : at + 12] if long else head[at + 6 : at + 8], "little")
            at += (12 if long else 8) + size
        file.seek(at)
        unpacker, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while not unpacker.eof and (chunk := file.read(_CHUNK)):
            while chunk and not unpacker.eof:
                size += len(unpacker.decompress(chunk, _CHUNK))
                chunk = unpacker.unconsumed_tail
                limits.check(path, 2 * size, "its deflated content")


def _read(plane: Plane, as_picture: bool = False) -> tuple[Any, np.ndarray, int]:
    """Return the data set, its stored values, and the number of the frame."""
    dataset = _open(plane.path)
    if as_picture and (other := _NO_IMAGES.get(str(dataset.get("SOPClassUID", "")))):
        raise UserError(f"{plane.path}: a DICOM object that holds {other}, no picture; expected an image")
    with limits.border(plane.path, "pixels as the header describes them"):
        try:
            return _stored(plane, dataset)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            if _lacks_a_package(dataset.file_meta.TransferSyntaxUID, error, plane.path):
                raise UserError(
                    f"{plane.path}: its pixels are packed as "
                    f"{one_line(dataset.file_meta.TransferSyntaxUID.name)}, which no installed package "
                    "unpacks; pip install 'pylibjpeg[all]' or export it as Explicit VR"
                ) from error
            raise UserError(
                f"{plane.path}: its pixels cannot be read ({one_line(error)}); expected {_WHOLE}"
            ) from error


def _lacks_a_package(syntax: "UID", error: Exception, path: Path) -> bool:
    """Return whether only a decoder for the compression is missing.

    For a damaged file, pydicom's error lists plug-ins as well.
    """
    if str(syntax) not in medical("pydicom.uid", path).UID_dictionary:
        return False
    known = medical("pydicom.pixels", path).get_decoder(syntax).is_available
    # Some decoders support a syntax but not all of its depths: Pillow's JPEG decoder supports 8 bits.
    return not known or "missing dependencies" in str(error) or "does not support" in str(error)


def _stored(plane: Plane, dataset: "Dataset") -> tuple[Any, np.ndarray, int]:
    path = plane.path
    name = next(
        (name for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if name in dataset), ""
    )
    if not name or not dataset[name].value:
        kind = one_line(getattr(dataset.get("SOPClassUID", ""), "name", "")) or "no class named"
        raise UserError(f"{path}: a DICOM file without pixel data ({kind}); expected an image")
    syntax = dataset.file_meta.get("TransferSyntaxUID", "")
    known = medical("pydicom.uid", path).UID_dictionary
    if str(syntax) not in known or not syntax.is_transfer_syntax:
        raise UserError(
            f"{path}: unknown transfer syntax {one_line(str(syntax)) or '(none)'}; export it as Explicit VR"
        )
    try:
        medical("pydicom.pixels", path).get_decoder(syntax)
    except NotImplementedError as error:  # videos, audio, and what was retired
        raise UserError(
            f"{path}: no package unpacks images of transfer syntax {one_line(syntax.name)}; export it as Explicit VR"
        ) from error
    kind, bands = dicom_grey.photometric(dataset), int(dataset.get("SamplesPerPixel", 1) or 1)
    expected = (*_GREY, "PALETTE COLOR") if bands == 1 else _COLOUR
    if kind not in expected or bands not in (1, 3):
        raise UserError(
            f"{path}: photometric interpretation {one_line(kind) or '(none)'} with {bands} samples a "
            f"pixel; expected one of {', '.join((*_GREY, 'PALETTE COLOR'))} with 1, or "
            f"{', '.join(_COLOUR)} with 3"
        )
    dataset.PhotometricInterpretation = kind
    frame = plane.at(plane.index, int(dataset.get("NumberOfFrames", 1) or 1), "frame")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    wide = max(int(dataset.get("BitsAllocated", 8) or 8) // 8, 1)
    # Stored values, a copy, rescaled values, indices into a table, and the picture.
    size = rows * columns * bands * (2 * wide + 26)
    limits.check(path, size, f"a frame of {columns} x {rows} pixels")
    if str(syntax) == _RLE:
        _check_run_lengths(path, dataset, rows * columns * bands * wide)
    # pydicom takes the lowest bits of a word for its value, wherever the header says that they lie.
    below = _bits_below(dataset)
    stored: np.ndarray = medical("pydicom.pixels", path).pixel_array(
        dataset, index=frame, correct_unused_bits=not below
    )
    exact = bands == 1 and (not syntax.is_encapsulated or str(syntax) == _RLE)
    return dataset, _bits_of_values(path, dataset, stored, below, exact), frame


def _check_run_lengths(path: Path, dataset: "Dataset", frame_bytes: int) -> None:
    """Refuse run-length encoded data that decode to more than the limit; two bytes become at most 128."""
    packed = len(dataset.PixelData)
    if packed * _RLE_RATIO > max(limits.decoded_bytes(), 0) and packed > 4 * frame_bytes * int(
        dataset.get("NumberOfFrames", 1) or 1
    ):
        limits.check(path, packed * _RLE_RATIO, "its run lengths")


def _bits_below(dataset: "Dataset") -> int:
    """Return how many bits of a word lie below its value; fewer than 0 for a header that cannot be."""
    bits, high = int(dataset.get("BitsStored", 0) or 0), dataset.get("HighBit")
    return 0 if not bits or high is None else int(high) + 1 - bits


def _bits_of_values(
    path: Path, dataset: "Dataset", stored: np.ndarray, below: int, exact: bool
) -> np.ndarray:
    """Return stored values from the bits of their words that hold them: BitsStored, up to HighBit.

    Old objects keep overlays in the other bits, and some have their values at the upper end.

    Args:
        path: The file.
        dataset: Its header.
        stored: Words as pydicom returns them.
        below: Number of bits below the values.
        exact: Whether these are the words of the file, rather than what a decoder or a conversion of colours made.

    Raises:
        UserError: There are bits below, but the words are not exact, the bits are set although no overlay explains
            them, or the values would not fit.
    """
    bits, wide = int(dataset.get("BitsStored", 0) or 0), 8 * stored.dtype.itemsize
    overlaid = any(
        element.tag.group >> 8 == 0x60 and element.tag.element == 0x0102 and element.value
        for element in dataset.group_dataset(0x6000)
    )
    if stored.dtype.kind not in "iu" or not below:
        shared = overlaid and stored.dtype.kind == "u" and 0 < bits < wide
        return stored & stored.dtype.type((1 << bits) - 1) if shared else stored
    fits = exact and 0 < below <= wide - bits
    if not fits or (not overlaid and (stored & stored.dtype.type((1 << below) - 1)).any()):
        raise UserError(
            f"{path}: BitsStored {bits} with HighBit {dataset.HighBit}: which of {wide} bits hold its values is not "
            f"known; expected HighBit {bits - 1}"
        )
    return stored << stored.dtype.type(wide - bits - below) >> stored.dtype.type(wide - bits)
