"""Reading of PyTorch's `.pth`, `.pt` and `.tar` checkpoints without PyTorch.

Two formats, as in `torch/serialization.py` (BSD-3-Clause):

- zip (PyTorch 1.6 and later): `<name>/data.pkl`, the pickle, and `<name>/data/<key>`, the numbers,
  uncompressed;
- older: five pickles in a row (magic number, protocol, machine, content, storage keys), then for each key an
  int64 count and the numbers, little-endian.

The file is memory-mapped and its tensors are views of it, so tensors that are not accessed use no memory.
"""

import io
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dapt_jax.errors import UserError
from dapt_jax.weights import nested, restricted
from dapt_jax.weights.archive import Archive
from dapt_jax.weights.nested import refusals
from dapt_jax.weights.records import NumpyArray, TensorRecord
from dapt_jax.weights.source import Stored, Weights

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
OLD_HEAD = b"\x80\x02\x8a\x0a" + MAGIC.to_bytes(10, "little")
"""Start of the older format: the magic number, pickled by protocol 2 as LONG1 of ten bytes."""
Run = Callable[[str, np.dtype[Any]], np.ndarray]
"""Function from storage key and dtype to all elements of that sequence."""


def read(path: str | Path) -> Weights:
    """Read the tensors of a checkpoint at any depth of its nested dicts; see `nested.arrays`.

    A completely pickled network is read as its state dict, without its class, if its modules belong to known
    libraries (`records.MODULES`).

    Args:
        path: A file written by `torch.save`, in either format.

    Returns:
        Arrays by name, with the dtypes in the file. `origin` names the container that they were in.

    Raises:
        UserError: The file is truncated or damaged, needs code, or contains no named tensors.
    """
    path = Path(path)
    with refusals(path, "PyTorch checkpoint"):
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        content, run = _open_zip(path) if is_zip else _open_old(path)
        return nested.weights(content, path, lambda record: _stored(record, run, path), "tensors")


def _open_zip(path: Path) -> tuple[restricted.Content, Run]:
    archive = Archive(path)
    pickles = [name for name in archive.names if name.split("/")[-1] == "data.pkl"]
    if not pickles:
        raise UserError(f"{path}: a zip file without data.pkl; expected a file that torch.save wrote")
    root = pickles[0].removesuffix("data.pkl")
    order = "<"
    if f"{root}byteorder" in archive and bytes(archive.read(f"{root}byteorder")) == b"big":
        order = ">"

    def run(key: str, dtype: np.dtype[Any]) -> np.ndarray:
        name = f"{root}data/{key}"
        if name not in archive:
            raise UserError(f"{path}: no {name[:80]!r}, where the numbers of a tensor should be")
        if not archive.is_stored(name):
            raise UserError(f"{path}: {name[:80]!r} is compressed; torch.save stores numbers as they are")
        return _elements(archive.read(name), dtype, order)

    return restricted.load(io.BytesIO(archive.read(pickles[0]))), run


def _open_old(path: Path) -> tuple[restricted.Content, Run]:
    with path.open("rb") as opened:
        if opened.read(len(OLD_HEAD)) != OLD_HEAD:
            raise UserError(
                f"{path}: not a PyTorch checkpoint (neither a zip file nor the format before PyTorch 1.6)"
            )
        file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    restricted.load(file)
    if (protocol := restricted.load(file).value) != PROTOCOL:
        raise UserError(f"{path}: written by protocol {protocol!r} of PyTorch; expected {PROTOCOL}")
    restricted.load(
        file
    )  # sizes and byte order of the machine that wrote it; the numbers are always little-endian
    content = restricted.load(file)
    keys = restricted.load(file).value
    view = memoryview(file)
    runs, at = {}, file.tell()
    for key in keys:
        if len(view) < at + 8:
            raise UserError(f"{path}: cut short: no numbers for storage {str(key)[:40]!r}")
        (count,) = struct.unpack("<q", view[at : at + 8])
        dtype = content.storages[str(key)]
        data = view[at + 8 : at + 8 + max(count, 0) * dtype.itemsize]
        if len(data) != count * dtype.itemsize:
            raise UserError(
                f"{path}: cut short: {len(data)} bytes where {count} elements of {dtype.name} were expected"
            )
        runs[str(key)] = _elements(data, dtype, "<")
        at += 8 + len(data)
    # A tensor may read its storage with another dtype than the one that declares its size.
    return content, lambda key, dtype: runs[key].view(dtype)


def _elements(data: memoryview, dtype: np.dtype[Any], order: str) -> np.ndarray:
    """Return bytes as elements.

    ml_dtypes' bfloat16 has no byte order, so big-endian bytes are swapped first.
    """
    if order == ">" and dtype.itemsize > 1:
        parts = 2 if dtype.kind == "c" else 1
        unit = dtype.itemsize // parts
        return np.frombuffer(np.frombuffer(data, np.uint8).reshape(-1, unit)[:, ::-1].tobytes(), dtype)
    return np.frombuffer(data, dtype)


def _stored(record: TensorRecord | NumpyArray, run: Run, path: Path) -> Stored:
    if isinstance(record, NumpyArray):
        assert record.dtype is not None
        return Stored(record.shape, record.dtype, record.build)

    def build() -> np.ndarray:
        with refusals(path, "PyTorch checkpoint"):
            return record.build(run(record.storage.key, record.storage.dtype))

    return Stored(record.shape, record.storage.dtype, build)
