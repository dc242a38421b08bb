"""DICOM files by pydicom: rescale slope and intercept, window or look-up table, MONOCHROME1, palettes, frames."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dapt_jax.data.pixels import scaled
from dapt_jax.data.plane import Plane, medical, one_line
from dapt_jax.errors import UserError

# What pydicom raises for files that are cut, corrupt or of a kind it does not know. Its warnings are listed for callers
# who run with `-W error`.
_UNREADABLE = (
    OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, EOFError, Warning
)  # fmt: skip


def pixels(plane: Plane) -> np.ndarray:
    """The picture as it is shown: uint8 [h, w], or [h, w, 3] of a colour image.

    Values are rescaled (slope and intercept), then windowed: by `plane.window` if it is given, else by the file's first
    window or look-up table, else by the rule for integers and floats of `dapt_jax.data.decode.decode`. MONOCHROME1 is
    inverted, so that more is brighter.

    Raises:
        UserError: see `values`.
    """
    dataset, stored = _read(plane)
    library = medical("pydicom.pixels", plane.path)
    try:
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            stored = library.apply_color_lut(stored, dataset)
        if stored.ndim == 3:
            # Palettes have 16 bits a colour, whatever the depth of their indices.
            bits = 8 * stored.dtype.itemsize if stored.max(initial=0) > 255 else 8
            return (stored >> (bits - 8)).astype(np.uint8)
        if dataset.BitsAllocated == 1:
            stored = stored * np.uint8(255)
        rescaled = library.apply_modality_lut(stored, dataset)
        if plane.window:
            shown = plane.window.apply(rescaled)
        elif "WindowCenter" in dataset or "VOILUTSequence" in dataset:
            # The ends of a window, in the values that the library gives: what it maps the least and the most to.
            ends = np.array([np.iinfo(np.int32).min, np.iinfo(np.int32).max], np.int32)
            low, high = (float(end) for end in library.apply_voi_lut(ends, dataset))
            windowed = library.apply_voi_lut(rescaled, dataset)
            shown = np.rint((windowed - low) * (255 / ((high - low) or 1))).clip(0, 255).astype(np.uint8)
        else:
            shown = scaled(rescaled)
    except _UNREADABLE as error:
        raise UserError(f"{plane}: its values cannot be shown ({one_line(error)})") from error
    return 255 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown


def values(plane: Plane) -> np.ndarray:
    """The stored numbers [h, w] or [h, w, 3], as masks have them.

    Raises:
        UserError: not a DICOM file, no pixel data, a transfer syntax that is unknown or that no installed package
            decodes, or several frames of which none is chosen.
    """
    return _read(plane)[1]


def extent(plane: Plane) -> tuple[int, int]:
    """Height and width, from the header alone."""
    dataset = _open(plane.path, stop_before_pixels=True)
    return int(dataset.get("Rows", 0)), int(dataset.get("Columns", 0))


def header(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Elements of the header as text, such as `("PatientID",)`; "" for what is not there."""
    dataset = _open(path, stop_before_pixels=True, specific_tags=list(names))
    return tuple(str(dataset.get(name, "") or "").strip() for name in names)


def _open(path: Path, **options: Any) -> Any:
    library = medical("pydicom", path)
    try:
        return library.dcmread(path, **options)
    except library.errors.InvalidDicomError as error:
        raise UserError(f"{path}: not a DICOM file (it has no DICM mark after its preamble)") from error
    except _UNREADABLE as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); expected a whole DICOM file") from error


def _read(plane: Plane) -> tuple[Any, np.ndarray]:
    dataset = _open(plane.path)
    try:
        return dataset, _stored(plane, dataset)
    except _UNREADABLE as error:
        if "plugin" in str(error) or isinstance(error, NotImplementedError):
            raise UserError(
                f"{plane.path}: its pixels are packed as {dataset.file_meta.TransferSyntaxUID.name}, which no installed "
                "package unpacks; pip install 'pylibjpeg[all]' or export it as Explicit VR"
            ) from error
        raise UserError(f"{plane.path}: its pixels cannot be read ({one_line(error)})") from error


def _stored(plane: Plane, dataset: Any) -> np.ndarray:
    name = next((name for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if name in dataset), "")
    if not name or not dataset[name].value:
        kind = getattr(dataset.get("SOPClassUID", ""), "name", "") or "no class named"
        raise UserError(f"{plane.path}: a DICOM file without pixel data ({kind}); expected an image")
    syntax = dataset.file_meta.get("TransferSyntaxUID", "")
    if not syntax or not syntax.is_transfer_syntax or syntax.is_private:
        raise UserError(f"{plane.path}: unknown transfer syntax {str(syntax) or '(none)'}; export it as Explicit VR")
    frame = plane.at(plane.index, int(dataset.get("NumberOfFrames", 1) or 1), "frame")
    stored: np.ndarray = medical("pydicom.pixels", plane.path).pixel_array(dataset, index=frame)
    return stored
