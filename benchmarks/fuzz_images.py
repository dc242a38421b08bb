"""The image formats of `benchmarks.fuzz_readers`: well-formed seeds, damage inside packed files, and what readers make of it.

Beside the pixels, a file is asked for its size, spacing and place in the patient, and read as a mask.
"""

import gzip
import random
import zlib
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pydicom.pixels
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from benchmarks.fuzz_damage import damage
from dapt_jax.data import formats, intensity, limits, masks
from dapt_jax.data.decode import decode
from dapt_jax.data.plane import Plane
from dapt_jax.errors import UserError
from tests import medical_files as write
from tests.test_data_decode import png_16_bit_colour

SUFFIXES = {
    "png": ".png",
    "png_16": ".png",
    "png_16_colour": ".png",
    "jpeg": ".jpg",
    "bmp": ".bmp",
    "tiff": ".tif",
    "tiff_packed": ".tif",
    "gif": ".gif",
    "webp": ".webp",
    "pgm": ".pgm",
    "dicom": ".dcm",
    "dicom_rle": ".dcm",
    "dicom_jpeg": ".dcm",
    "dicom_deflated": ".dcm",
    "dicom_enhanced": ".dcm",
    "nifti": ".nii",
    "nifti_gz": ".nii.gz",
    "npy": ".npy",
    "h5": ".h5",
    "mat": ".mat",
}
GUARDED = ()
"""The readers try HDF5 files in another process themselves."""

LIMIT = 64 << 20
"""Bytes of `dapt_jax.data.limits` while fuzzing: what goes beyond shows sooner."""


def write_seeds(folder: Path) -> dict[str, bytes]:
    """A well-formed file of every format."""
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 4096, (20, 24)).astype(np.uint16)
    colour = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
    volume = rng.integers(-1000, 2000, (6, 7, 5)).astype(np.int16)
    paths = {name: folder / f"{name}{suffix}" for name, suffix in SUFFIXES.items()}
    for name in ("png", "jpeg", "bmp", "tiff", "gif", "webp"):
        Image.fromarray(colour).save(paths[name])
    Image.fromarray(deep).save(paths["png_16"])
    png_16_bit_colour(paths["png_16_colour"], rng.integers(0, 4096, (20, 24, 3)))
    Image.fromarray(deep).save(paths["tiff_packed"], compression="tiff_lzw")
    paths["pgm"].write_bytes(b"P5 24 20 4095\n" + deep.astype(">u2").tobytes())
    header = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 40, "WindowWidth": 400, "PixelPaddingValue": 0}
    place = {
        "ImagePositionPatient": [0, 0, 0],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [1, 2],
    }
    table = pydicom.Dataset()
    table.LUTDescriptor = [256, 0, 12]
    table.add_new("LUTData", "OW", np.arange(0, 4096, 16).astype("<u2").tobytes())
    write.dicom(
        paths["dicom"],
        deep,
        RescaleSlope=1,
        RescaleIntercept=-1024,
        VOILUTSequence=[table],
        **header,
        **place,
    )
    for name in ("dicom_rle", "dicom_deflated", "dicom_jpeg"):
        write.dicom(paths[name], deep, **header)
        data = pydicom.dcmread(paths[name])
        if name == "dicom_deflated":
            data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        elif name == "dicom_rle":
            data.compress(pydicom.uid.RLELossless)
        else:
            whole = Path(pydicom.__file__).parent / "data" / "test_files" / "SC_rgb_small_odd_jpeg.dcm"
            data = pydicom.dcmread(whole) if whole.is_file() else data
        data.save_as(paths[name])
    frame = pydicom.Dataset()
    window = pydicom.Dataset()
    window.WindowCenter, window.WindowWidth = 40, 400
    frame.FrameVOILUTSequence = [window]
    write.dicom(
        paths["dicom_enhanced"], deep[None], SharedFunctionalGroupsSequence=[frame], BitsStored=12, HighBit=11
    )
    for name in ("nifti", "nifti_gz"):
        nibabel.Nifti1Image(volume, np.diag([-1.0, -1, 2, 1])).to_filename(paths[name])
    np.save(paths["npy"], deep)
    with h5py.File(paths["h5"], "w") as file:
        file.create_dataset("image", data=deep, chunks=(8, 8), compression="gzip", shuffle=True)
    with h5py.File(paths["mat"], "w") as file:
        file["image"] = deep.astype(np.float64)
    return {name: path.read_bytes() for name, path in paths.items()}


def damaged(name: str, seed: bytes, rng: random.Random) -> bytes:
    """A damaged file; what is packed is spoilt before it is packed half the time, else its checksum hides it."""
    if rng.random() < 0.5:
        if name == "nifti_gz":
            return gzip.compress(damage(gzip.decompress(seed), rng), 1)
        if name == "dicom_deflated":
            start = 128 + 4 + 12 + int.from_bytes(seed[140:144], "little")
            packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
            inner = damage(zlib.decompress(seed[start:], -zlib.MAX_WBITS), rng)
            return seed[:start] + packer.compress(inner) + packer.flush()
        if name in ("png", "png_16", "png_16_colour"):
            return _damaged_png(seed, rng)
        # Most of an image is pixels: spoil what describes them.
        at = 132 if name.startswith("dicom") else 0
        end = {"nifti": 352, "bmp": 54, "jpeg": 400, "npy": 128}.get(name, min(len(seed), 900))
        return seed[:at] + damage(seed[at:end], rng) + seed[end:]
    return damage(seed, rng)


def _damaged_png(seed: bytes, rng: random.Random) -> bytes:
    """A PNG whose chunks are damaged and have true checksums."""
    parts, at = [], 8
    while at + 8 <= len(seed):
        size = int.from_bytes(seed[at : at + 4], "big")
        parts.append((seed[at + 4 : at + 8], seed[at + 8 : at + 8 + size]))
        at += 12 + size
    chosen = rng.randrange(len(parts))
    written = [seed[:8]]
    for number, (kind, content) in enumerate(parts):
        if number == chosen:
            packed = kind == b"IDAT" and rng.random() < 0.7
            content = zlib.compress(damage(zlib.decompress(content), rng)) if packed else damage(content, rng)
        written.append(len(content).to_bytes(4, "big") + kind + content)
        written.append(zlib.crc32(kind + content).to_bytes(4, "big"))
    return b"".join(written)


def read_all(path: Path) -> str:
    """What the readers make of a file: whether it is `read` or `refused` as an image, or what went wrong."""
    key = "image" if path.suffix in (".h5", ".mat") else ""
    source = Plane(path, 0 if ".nii" in path.name else None, key=key)
    outcome = "read"
    for name, ask in (("image", lambda: decode(source, 8)), ("mask", lambda: masks.read(source)),
                      ("extent", lambda: formats.extent(source)), ("spacing", lambda: formats.spacing(source)),
                      ("place", lambda: formats.geometry(source))):  # fmt: skip
        try:
            ask()
        except UserError as error:
            line = str(error)
            outcome = "refused" if name == "image" else outcome  # few images are masks
            if "\n" in line or len(line) > 1500 or path.name not in line or not line.isprintable():
                return f"a line of {len(line)} characters: {line[:160]!r}"
            if "pip install" in line and "[medical]" not in line:
                return f"says that a damaged file wants a package: {line[:160]!r}"
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return outcome


def prepare() -> None:
    """Set the limit of a process that fuzzes, and spare it a histogram of 8 MiB for each image."""
    limits.set_decoded_bytes(LIMIT)
    intensity._CODE_BITS = 14
