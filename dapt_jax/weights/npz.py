"""Reading of `.npz` files: those of NumPy, and exported TensorFlow checkpoints."""

import io
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dapt_jax.errors import UserError
from dapt_jax.weights.archive import Archive
from dapt_jax.weights.source import Stored, Weights, metadata_of

METADATA = "__metadata__"
"""Name of the array of bytes that holds what a file of ours says of its arrays, as JSON."""
_HEADER = 10_000
"""Maximum number of bytes in the header of a numeric array, which usually has about 100."""
_TWO_BYTES = np.dtype("V2")
_TF = ("/.ATTRIBUTES/VARIABLE_VALUE", ":0")
"""Suffix that TensorFlow appends to the name of a variable."""


def read(path: Path) -> Weights:
    """Read the arrays of an `.npz` by name, without TensorFlow's suffixes.

    Raises:
        UserError: The file is damaged, contains pickled objects, or has no arrays.
    """
    archive = Archive(path)
    names = [name for name in archive.names if name.endswith(".npy")]
    if not names:
        raise UserError(
            f"{path}: a zip file without arrays; expected an .npz, or a file that torch.save wrote"
        )
    arrays: dict[str, Stored] = {}
    for name in names:
        key = name.removesuffix(".npy")
        for ending in _TF:
            key = key.removesuffix(ending)
        if key in arrays:
            raise UserError(f"{path}: {key[:80]!r} is there twice")
        arrays[key] = _stored(archive, name)
    about = arrays.pop(METADATA, None)
    metadata = metadata_of(about.read().tobytes(), f"{path}: {METADATA}") if about else {}
    return Weights(arrays, str(path), path=path, metadata=metadata)


def _stored(archive: Archive, name: str) -> Stored:
    """Return one array, of which only the header is read now."""
    data = archive.read(name)
    head = io.BytesIO(data[:_HEADER])
    try:
        version = np.lib.format.read_magic(head)
        reader = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, is_fortran, dtype = reader(head)
    except (
        Exception
    ) as error:  # NumPy reads the header as a Python literal: errors from TokenError to RecursionError
        told = " ".join(str(error).split())[:120]
        raise UserError(f"{archive.path}: {name[:80]!r} is not an array ({told})") from None
    if dtype.hasobject or (dtype.kind not in "fiubc" and dtype != _TWO_BYTES):
        raise UserError(
            f"{archive.path}: not an .npz of plain arrays: {name[:80]!r} is of NumPy type {dtype}"
        )
    start, size = head.tell(), int(np.prod(shape, dtype=object)) * dtype.itemsize
    if any(side < 0 for side in shape) or len(data) - start != size:
        raise UserError(
            f"{archive.path}: {name[:80]!r} is damaged: {len(data) - start:,} bytes for shape {shape} and "
            f"type {dtype}"
        )

    def build() -> np.ndarray:
        flat = np.frombuffer(archive.read(name)[start:], dtype)
        return flat.reshape(shape, order="F" if is_fortran else "C")

    return Stored(shape, _as_bfloat16(dtype), lambda: build().view(_as_bfloat16(dtype)))


def _as_bfloat16(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return bfloat16 for two bytes without a type, as NumPy saves it; nothing else is saved so."""
    return np.dtype(ml_dtypes.bfloat16) if dtype == _TWO_BYTES else dtype
