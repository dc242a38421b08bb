"""Small files in the true formats, written by the libraries that own them."""

import struct
import zlib
from pathlib import Path

import h5py
import nibabel
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def dicom(path: Path, values: np.ndarray | None, syntax: str = ExplicitVRLittleEndian, **elements) -> Path:
    """Writes uint8, uint16 or int16 [h, w], [frames, h, w] or (with SamplesPerPixel=3) [h, w, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    if values is not None:
        bits = 8 * values.dtype.itemsize
        colour = elements.get("SamplesPerPixel", 1) == 3
        data.Rows, data.Columns = values.shape[:2] if colour else values.shape[-2:]
        data.BitsAllocated = data.BitsStored = bits
        data.HighBit = bits - 1
        data.PixelRepresentation = int(values.dtype.kind == "i")
        data.SamplesPerPixel = 1
        data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
        if colour:
            data.PlanarConfiguration = 0
        if values.ndim == 3 and not colour:
            data.NumberOfFrames = len(values)
        data.PixelData = values.tobytes()
        data["PixelData"].VR = "OB" if bits == 8 else "OW"
    for name, value in elements.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    if syntax != ExplicitVRLittleEndian:
        # The library refuses to write what it does not know; files in the wild are not asked.
        old, new = str(ExplicitVRLittleEndian).encode(), syntax.encode()
        assert len(new) <= len(old)
        path.write_bytes(path.read_bytes().replace(old, new.ljust(len(old), b"\0"), 1))
    return path


def nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine).to_filename(path)
    return path


def matlab(path: Path, **arrays: np.ndarray) -> Path:
    """Writes arrays as MATLAB 7.3 does: columns first, in a structure cjdata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[f"cjdata/{name}"] = np.asarray(array).T
    return path


def image(path: Path, values: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def png_16_bits(path: Path, values: np.ndarray) -> Path:
    """Writes uint16 [h, w, 2] as grey and alpha, which Pillow cannot write."""
    height, width, _ = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 4, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def run_lengths(mask: np.ndarray) -> str:
    """SIIM-ACR's run lengths, spelt out pixel by pixel: down the columns, each gap from the last run's end."""
    runs, gap, length = [], 0, 0
    for value in mask.T.ravel():
        if value:
            length += 1
        elif length:
            runs += [gap, length]
            gap, length = 1, 0
        else:
            gap += 1
    if length:
        runs += [gap, length]
    return " ".join(map(str, runs)) or "-1"
