"""Reads PyTorch's `.pth`, `.pt` and `.tar` checkpoints without PyTorch.

Two formats, as in `torch/serialization.py` (BSD-3-Clause):

- zip (PyTorch 1.6 and later): `<name>/data.pkl`, the pickle, and `<name>/data/<key>`, the numbers, uncompressed;
- older: five pickles in a row (magic number, protocol, machine, content, storage keys), then for each key an int64 count
  and the numbers, little-endian.
"""

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dapt_jax.errors import UserError
from dapt_jax.weights import restricted
from dapt_jax.weights.source import Weights

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "teacher",
    "student",
    "encoder",
)
"""Keys under which training scripts put the state dict, in the order in which they are tried."""


def read(path: str | Path) -> Weights:
    """Reads the tensors of a checkpoint: those at its top level, else those under one of `CONTAINERS`.

    Args:
        path: a file that `torch.save` wrote, in either format.

    Returns:
        Arrays by name; bfloat16 comes as float32, every other dtype as it is. `origin` says which container they were in.

    Raises:
        UserError: the file is cut short or damaged, asks for code, or holds no named tensors.
    """
    path = Path(path)
    try:
        content = _read_zip(path) if zipfile.is_zipfile(path) else _read_old(path)
    except restricted.Refused as refused:
        raise UserError(
            f"{path}: the file asks for {refused}; only arrays, OrderedDict and plain containers are read "
            "(save the model's state_dict() instead)"
        ) from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:
        # A damaged pickle raises nearly anything, from EOFError to UnicodeDecodeError.
        raise UserError(
            f"{path}: damaged or cut short, or not a PyTorch checkpoint ({type(error).__name__}: {error})"
        ) from None
    return _tensors(content, path)


def is_torch(path: Path) -> bool:
    """Whether the content of a file is one of the two formats."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.split("/")[-1] == "data.pkl" for name in archive.namelist())
    with path.open("rb") as file:
        head = file.read(64)
    # The magic number, pickled: protocol 2 (0x80 0x02), then LONG1 of ten bytes.
    return head.startswith(b"\x80\x02\x8a\x0a" + MAGIC.to_bytes(10, "little"))


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.split("/")[-1] == "data.pkl"]
        if not pickles:
            raise UserError(f"{path}: a zip file without data.pkl; expected a file that torch.save wrote")
        root = pickles[0].removesuffix("data.pkl")
        order = "<"
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") == b"big":
            order = ">"
        runs: dict[str, bytes] = {}

        def run(key: str, dtype: np.dtype[Any]) -> np.ndarray:
            if key not in runs:
                info = archive.getinfo(f"{root}data/{key}")
                if info.compress_type != zipfile.ZIP_STORED:
                    raise UserError(f"{path}: {info.filename} is compressed; torch.save stores numbers as they are")
                runs[key] = archive.read(info)
            return _elements(runs[key], dtype, order)

        return restricted.resolve(restricted.load(io.BytesIO(archive.read(pickles[0])))[0], run)


def _read_old(path: Path) -> Any:
    with path.open("rb") as file:
        try:
            is_old = restricted.load(file)[0] == MAGIC and restricted.load(file)[0] == PROTOCOL
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError):
            is_old = False
        if not is_old:
            raise UserError(f"{path}: not a PyTorch checkpoint (neither a zip file nor the format before PyTorch 1.6)")
        restricted.load(file)  # sizes and byte order of the machine that wrote it; the numbers are little-endian always
        content, dtypes = restricted.load(file)
        keys, _ = restricted.load(file)
        runs = {str(key): _old_run(file, path, dtypes[str(key)]) for key in keys}
    # A tensor may read its storage as another dtype than the one it was declared, and counted, with.
    return restricted.resolve(content, lambda key, dtype: runs[key].view(dtype))


def _old_run(file: BinaryIO, path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    (count,) = struct.unpack("<q", file.read(8))
    data = file.read(count * dtype.itemsize) if 0 <= count <= path.stat().st_size else b""
    if len(data) != count * dtype.itemsize:
        raise UserError(f"{path}: cut short: {len(data)} bytes where {count} elements of {dtype.name} were expected")
    return _elements(data, dtype, "<")


def _elements(data: bytes, dtype: np.dtype[Any], order: str) -> np.ndarray:
    """Bytes as elements; ml_dtypes' bfloat16 has no byte order of its own, so big-endian bytes are swapped first."""
    if order == ">" and dtype.itemsize > 1:
        parts = 2 if dtype.kind == "c" else 1
        unit = dtype.itemsize // parts
        data = np.frombuffer(data, np.uint8).reshape(-1, unit)[:, ::-1].tobytes()
    return np.frombuffer(data, dtype)


def _tensors(content: Any, path: Path) -> Weights:
    """The named tensors of a checkpoint, and which container they were in."""
    inside: list[str] = []
    node = content
    while isinstance(node, dict):
        tensors = {key: value for key, value in node.items() if isinstance(key, str) and isinstance(value, np.ndarray)}
        if tensors:
            return Weights(tensors, " ".join([str(path), *(f"[{key!r}]" for key in inside)]))
        container = next((key for key in CONTAINERS if isinstance(node.get(key), dict)), None)
        if container is None:
            break
        inside.append(container)
        node = node[container]
    found = ", ".join(repr(key) for key in list(content)[:6]) if isinstance(content, dict) else type(content).__name__
    raise UserError(f"{path}: no named tensors at the top level or under {', '.join(CONTAINERS)}; it holds {found}")
