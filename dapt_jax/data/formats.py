"""Which module reads a file: by its name, and where that says nothing, by its first bytes."""

from pathlib import Path
from types import ModuleType

from dapt_jax.data import arrays, dicom, nifti, pixels
from dapt_jax.data.plane import Source, plane

_SUFFIXES = {
    ".dcm": dicom,
    ".dicom": dicom,
    ".nii": nifti,
    ".npy": arrays,
    ".mat": arrays,
    ".h5": arrays,
    ".hdf5": arrays,
}


def module(path: Path) -> ModuleType:
    """The module whose `pixels`, `values` and `extent` read a file; `dapt_jax.data.pixels` where Pillow is to try."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-2:] == [".nii", ".gz"]:
        return nifti
    known = _SUFFIXES.get(suffixes[-1] if suffixes else "")
    return known or (dicom if not _is_named_image(suffixes) and _has_dicom_mark(path) else pixels)


def extent(source: Source) -> tuple[int, int]:
    """Height and width of a picture as its file has it.

    Raises:
        UserError: the file is missing or unreadable.
    """
    found = plane(source)
    height, width = module(found.path).extent(found)
    return height, width


def _is_named_image(suffixes: list[str]) -> bool:
    return bool(suffixes) and suffixes[-1] in (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")


def _has_dicom_mark(path: Path) -> bool:
    """DICOM files often have no suffix, or numbers in its place."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False
