"""Reading of weight files in any of the usual formats as arrays by name."""

import json
import mmap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from dapt_jax.data import limits
from dapt_jax.errors import UserError
from dapt_jax.weights import (
    keras_hdf5,
    npz,
    onnx,
    orbax_folder,
    pickled_arrays,
    sharded,
    torch_pickle,
    unreadable,
)
from dapt_jax.weights.archive import MEMBERS, Archive
from dapt_jax.weights.source import Weights

FORMATS = (
    "PyTorch (.pth, .pt, .tar, .bin, .ckpt), .safetensors, .npz, Keras (.h5, .keras), a pickle of arrays "
    "(.pkl), ONNX (.onnx), an index of several files (.index.json), or an orbax folder"
)
_TORCH = (".pth", ".pt", ".tar", ".bin", ".ckpt")
SUFFIXES = (*_TORCH, ".safetensors", ".npz", ".h5", ".keras", ".pkl", ".onnx", ".json")
"""Suffixes of weight files, in small letters."""
_HEADER = 8 << 20
"""Maximum number of bytes in a safetensors header; that of a large model has 0.1 MB."""
_SIGNS = 12
"""Maximum number of brackets and commas per array in a safetensors header."""
_SAFETENSORS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read(path: str | Path) -> Weights:
    """Read a weight file; its content determines the format, because suffixes are unreliable.

    Arrays are read when they are accessed, so damaged values are only detected then. Whatever a library raises,
    here or then, becomes one line.

    Raises:
        UserError: The file does not exist, has an unknown format, or is damaged.
    """
    path = Path(path)
    with limits.border(path, FORMATS):
        return _read(path)


def _read(path: Path) -> Weights:
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        if unreadable.is_tensorflow_prefix(path):
            raise UserError(unreadable.tensorflow_prefix(path))
        raise UserError(f"{path}: no such weight file")
    if path.name.endswith(sharded.SUFFIX):
        return sharded.read(path, _read_file)
    sharded.refuse_alone(path)
    return _read_file(path)


def _read_folder(path: Path) -> Weights:
    if orbax_folder.is_one(path):
        return orbax_folder.read(path)
    if found := sharded.in_folder(path):
        return _read(found)
    if what := unreadable.folder(path):
        raise UserError(f"{path}: {what}")
    return orbax_folder.read(path)


def _read_file(path: Path) -> Weights:
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        raise UserError(f"{path}: an empty file; expected {FORMATS}")
    if head.startswith(keras_hdf5.MAGIC):
        return keras_hdf5.read(path)
    if head.startswith(b"PK"):
        return _read_zip(path)
    if path.suffix == onnx.SUFFIX and head[:1] in b"\x08\x0a\x12\x3a":
        return onnx.read(path)
    unreadable.refuse(path, head)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith(torch_pickle.OLD_HEAD) or path.suffix in _TORCH:
        return torch_pickle.read(path)
    if head.startswith(b"\x80") or path.suffix == ".pkl":
        return pickled_arrays.read(path)
    raise UserError(f"{path}: not a weight file that is known here; expected {FORMATS}")


def _read_zip(path: Path) -> Weights:
    archive = Archive(path)
    if keras_hdf5.is_keras(archive):
        return keras_hdf5.read_zip(archive)
    pickles = [name for name in archive.names if name.split("/")[-1] == "data.pkl"]
    if any(name.split("/")[-1] == "constants.pkl" for name in archive.names):
        raise UserError(
            f"{path}: a TorchScript program; expected a state_dict (torch.save of "
            "torch.jit.load(...).state_dict())"
        )
    if not pickles and not any(name.endswith(".npy") for name in archive.names):
        inside = [
            name
            for name in archive.names
            if Path(name).suffix in (*_TORCH, ".h5", ".safetensors", ".npz", ".pkl")
        ]
        if inside:
            raise UserError(f"{path}: a zip archive that holds {inside[0][:80]!r}: unpack it first")
    if pickles or path.suffix in _TORCH:
        return torch_pickle.read(path)
    return npz.read(path)


def _read_safetensors(path: Path) -> Weights:
    """Read a safetensors file.

    The library checks the header; the arrays are views of the mapped file, which the library would copy.
    """
    try:
        header, metadata, start = _header(path)
        with safetensors.safe_open(path, framework="numpy"), path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        arrays = {}
        for name, entry in header.items():
            if entry["dtype"] not in _SAFETENSORS:
                kinds = ", ".join(_SAFETENSORS)
                raise UserError(
                    f"{path}: {name[:80]!r} is of type {str(entry['dtype'])[:40]}; expected one of {kinds}"
                )
            first, last = entry["data_offsets"]
            flat = np.frombuffer(view[start + first : start + last], _SAFETENSORS[entry["dtype"]])
            arrays[name] = flat.reshape(entry["shape"])
    except UserError:
        raise
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: damaged or cut short, or not a safetensors file ({told})") from None
    if not arrays:
        raise UserError(f"{path}: a safetensors file without arrays")
    return Weights(arrays, str(path), path=path, metadata=metadata)


def _header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Return a safetensors header, and its end in the file.

    Each name must occur once (the library would use the last of two).
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _HEADER:
            raise UserError(f"{path}: a safetensors header of {length:,} bytes; expected at most {_HEADER:,}")
        text = file.read(length)
    # Each array has an object, two lists and its numbers; other JSON contents cost as much.
    if sum(text.count(sign) for sign in (b"{", b"[", b",")) > MEMBERS * _SIGNS:
        raise UserError(f"{path}: a safetensors header of more than {MEMBERS:,} arrays; expected weights")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            twice = next(key for key in found if sum(key == other for other, _ in items) > 1)
            raise UserError(f"{path}: {twice[:80]!r} is there twice")
        return found

    header = json.loads(text, object_pairs_hook=pairs)
    metadata = header.pop("__metadata__", None)
    return header, metadata if isinstance(metadata, dict) else {}, 8 + length
