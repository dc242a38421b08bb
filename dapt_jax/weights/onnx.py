"""Reading of the weights in an ONNX file: its initialisers by name; nothing is executed.

The file is a protobuf message whose wire format is walked in place: bounds are checked at every field, arrays
are views of the mapped file, and of the graph's nodes only the names of those are noted that read an array
without a name of its own. PyTorch's exporter renames the kernel of a dense layer to `onnx::MatMul_123` and
transposes it; its node still bears the layer's path, from which the name and the axes are restored. So are
learnt positions that it splits into those of the class token and of the patches.

Field numbers are those of `onnx/onnx.proto` (Apache-2.0).
"""

import dataclasses
import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from dapt_jax.errors import UserError
from dapt_jax.runtime import safe_paths
from dapt_jax.weights.archive import MEMBERS
from dapt_jax.weights.source import Stored, Weights

SUFFIX = ".onnx"
NODES = 100_000
"""Maximum number of nodes of a graph; those of large transformers have some thousands."""
_SIDES = 32
_LONGEST = 4096
"""Maximum number of bytes of a name."""
_DTYPES = {
    1: np.dtype("<f4"),
    2: np.dtype("u1"),
    3: np.dtype("i1"),
    4: np.dtype("<u2"),
    5: np.dtype("<i2"),
    6: np.dtype("<i4"),
    7: np.dtype("<i8"),
    9: np.dtype("?"),
    10: np.dtype("<f2"),
    11: np.dtype("<f8"),
    12: np.dtype("<u4"),
    13: np.dtype("<u8"),
    16: np.dtype(ml_dtypes.bfloat16),
}
_GRAPH = 7
_NODE, _INITIALIZER = 1, 5
_INPUT, _NODE_NAME, _OPERATION = 1, 3, 4
_DIMS, _TYPE, _SEGMENT, _FLOATS, _NAME, _RAW, _DOUBLES, _EXTERNAL, _LOCATION = 1, 2, 3, 4, 8, 9, 10, 13, 14
_ANONYMOUS = "onnx::"

Field = tuple[int, int, memoryview | int]
"""Number and wire type of a field, and its value: an integer or its bytes."""


class _DamagedError(Exception):
    """The bytes are not the message that they should be."""


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A node that reads an array without a name of its own."""

    operation: str
    node: str
    place: int


def read(path: Path) -> Weights:
    """Read the initialisers of an ONNX file.

    Args:
        path: The file; arrays that it keeps in other files have to lie in its folder.

    Raises:
        UserError: The file is damaged, holds no weights, or refers to a file elsewhere.
    """
    try:
        return _read(path)
    except _DamagedError as error:
        raise UserError(f"{path}: damaged or cut short, or not an ONNX file ({error})") from None


def _read(path: Path) -> Weights:
    view = _mapped(path)
    graphs = [_bytes(value) for number, _, value in _fields(view) if number == _GRAPH]
    if len(graphs) != 1:
        raise _DamagedError(f"{len(graphs)} graphs; expected 1")
    arrays: dict[str, Stored] = {}
    readers: dict[str, list[_Reader]] = {}
    files: dict[Path, memoryview] = {}
    nodes = 0
    for number, _, value in _fields(graphs[0]):
        if number == _NODE:
            nodes += 1
            if nodes > NODES:
                raise UserError(f"{path}: a graph of more than {NODES:,} nodes; expected weights")
            _note_readers(_bytes(value), readers)
        elif number == _INITIALIZER:
            if len(arrays) >= MEMBERS:
                raise UserError(f"{path}: more than {MEMBERS:,} arrays; expected weights")
            name, stored = _tensor(_bytes(value), path, files)
            if name in arrays:
                raise UserError(f"{path}: {name[:80]!r} is there twice")
            if stored is not None:
                arrays[name] = stored
    if not arrays:
        raise UserError(f"{path}: an ONNX file without arrays (initialisers)")
    return Weights(_renamed(arrays, readers), str(path), path=path, files=tuple(files))


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


# ---- the wire format
# ------------------------------------------------------------------------------------------------


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """Return an integer, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise _DamagedError("it ends inside a number")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _DamagedError("a number of more than 10 bytes")


def _fields(view: memoryview) -> Iterator[Field]:
    """Yield the fields of a message."""
    at = 0
    while at < len(view):
        key, at = _varint(view, at)
        number, wire = key >> 3, key & 7
        if not number:
            raise _DamagedError("a field without a number")
        if wire == 0:
            value, at = _varint(view, at)
            yield number, wire, value
            continue
        if wire == 2:
            length, at = _varint(view, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise _DamagedError(f"a field of the wire type {wire}")
        if length > len(view) - at:
            raise _DamagedError(f"a field of {length:,} bytes where {len(view) - at:,} are left")
        yield number, wire, view[at : at + length]
        at += length


def _bytes(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise _DamagedError("a number where a message was expected")
    return value


def _number(value: memoryview | int) -> int:
    if not isinstance(value, int):
        raise _DamagedError("bytes where a number was expected")
    return value


def _text(value: memoryview | int) -> str:
    data = _bytes(value)
    if len(data) > _LONGEST:
        raise _DamagedError(f"a name of {len(data):,} bytes")
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise _DamagedError("a name that is not UTF-8") from None


# ---- nodes and tensors
# ----------------------------------------------------------------------------------------------


def _note_readers(node: memoryview, readers: dict[str, list[_Reader]]) -> None:
    """Note a node under each array without a name of its own that it reads."""
    inputs: list[tuple[int, str]] = []
    name = operation = ""
    place = 0
    for number, _, value in _fields(node):
        if number == _INPUT:
            if bytes(_bytes(value)[: len(_ANONYMOUS)]) == _ANONYMOUS.encode():
                inputs.append((place, _text(value)))
            place += 1
        elif number == _NODE_NAME:
            name = _text(value)
        elif number == _OPERATION:
            operation = _text(value)
        if len(inputs) > _SIDES:
            raise _DamagedError("a node with very many inputs")
    for place, key in inputs:
        readers.setdefault(key, []).append(_Reader(operation, name, place))


def _tensor(tensor: memoryview, path: Path, files: dict[Path, memoryview]) -> tuple[str, Stored | None]:
    """Return an initialiser's name and array; no array for text, complex and other unusual types."""
    dims: list[int] = []
    external: dict[str, str] = {}
    data: memoryview | None = None
    code, name, is_external, listed = 0, "", False, None
    for number, wire, value in _fields(tensor):
        if number == _DIMS and wire == 2:
            packed, at = _bytes(value), 0
            while at < len(packed) and len(dims) <= _SIDES:
                side, at = _varint(packed, at)
                dims.append(side)
        elif number == _DIMS:
            dims.append(_number(value))
        elif number == _TYPE:
            code = _number(value)
        elif number == _SEGMENT:
            raise _DamagedError("a tensor in segments")
        elif number == _NAME:
            name = _text(value)
        elif number == _RAW or (number in (_FLOATS, _DOUBLES) and wire == 2):
            if data is not None:
                raise _DamagedError("a tensor with its values twice")
            data, listed = _bytes(value), {_FLOATS: 1, _DOUBLES: 11}.get(number)
        elif number == _EXTERNAL:
            pair = {key: _text(text) for key, _, text in _fields(_bytes(value)) if key in (1, 2)}
            external[pair.get(1, "")] = pair.get(2, "")
        elif number == _LOCATION:
            is_external = _number(value) == 1
        if len(dims) > _SIDES or len(external) > _SIDES:
            raise _DamagedError("a tensor of very many sides")
    if not name:
        raise _DamagedError("an initialiser without a name")
    if code not in _DTYPES or (data is None and not is_external and 0 not in dims):
        return name, None  # text, or integers listed one by one: no weights
    dtype, shape = _DTYPES[code], tuple(dims)
    if listed is not None and listed != code:
        raise _DamagedError(f"{name[:80]!r} is of type {dtype}, its values are of another")
    if is_external:
        data = _outside(external, path, name, files)
    size = math.prod(shape) * dtype.itemsize
    found = b"" if data is None else data
    if len(found) != size:
        raise _DamagedError(
            f"{name[:80]!r} of shape {shape} and type {dtype} has {len(found):,} bytes; expected {size:,}"
        )
    return name, Stored(shape, dtype, lambda: np.frombuffer(found, dtype).reshape(shape))


def _outside(external: dict[str, str], path: Path, name: str, files: dict[Path, memoryview]) -> memoryview:
    """Return the bytes of an array in another file, which has to lie in the folder of the ONNX file."""
    location = external.get("location", "")
    safe_paths.check(location, path)
    file = (path.parent / location).resolve()
    if not file.is_relative_to(path.parent.resolve()):
        raise UserError(f"{path}: {name[:80]!r} lies in {location!r}; expected a file below its own folder")
    if not file.is_file() or not file.stat().st_size:
        raise UserError(f"{path}: {name[:80]!r} lies in {location!r}, which is missing or empty beside it")
    if file not in files:
        if len(files) >= _SIDES:
            raise UserError(f"{path}: its arrays lie in more than {_SIDES} files; expected fewer")
        files[file] = _mapped(file)
    view = files[file]
    try:
        start = int(external.get("offset", "0"))
        length = int(external.get("length", str(len(view) - start)))
    except ValueError:
        raise _DamagedError(f"{name[:80]!r} lies at {external.get('offset', '')[:20]!r}") from None
    if not 0 <= start <= start + length <= len(view):
        raise _DamagedError(f"{name[:80]!r} lies outside of the {len(view):,} bytes of {location!r}")
    return view[start : start + length]


# ---- names
# ----------------------------------------------------------------------------------------------------------


def _renamed(arrays: dict[str, Stored], readers: dict[str, list[_Reader]]) -> dict[str, Stored]:
    """Return the arrays with the names that kernels and positions had before the export."""
    named: dict[str, Stored] = {}
    positions: dict[str, dict[str, Stored]] = {}
    for key, stored in arrays.items():
        only = readers.get(key, []) if key.startswith(_ANONYMOUS) else []
        if len(only) == 1 and (module := _module(only[0])):
            name = f"{module}.weight"
            if only[0].operation == "MatMul" and only[0].place == 1 and len(stored.shape) == 2:
                if name not in arrays and name not in named:
                    named[name] = _transposed(stored)
                    continue
            elif only[0].operation in ("Concat", "Reshape") and len(stored.shape) == 3:
                positions.setdefault(module, {})[only[0].operation] = stored
        named[key] = stored
    for module, parts in positions.items():
        joined = f"{module}.position_embeddings"
        if joined in named or set(parts) != {"Concat", "Reshape"}:
            continue
        first, grid = parts["Concat"], parts["Reshape"]
        is_pair = first.shape == (1, 1, grid.shape[2]) and math.isqrt(grid.shape[1]) ** 2 == grid.shape[1]
        if is_pair and first.dtype == grid.dtype:
            named = {key: stored for key, stored in named.items() if stored not in (first, grid)}
            named[joined] = _one_after_other([first, grid], axis=1)
    return named


def _module(reader: _Reader) -> str:
    """Return the path of the module of a node: `a.b` of `/a/b/MatMul_1`; empty where its name has none."""
    found = re.fullmatch(rf"/(.+)/{re.escape(reader.operation)}(_\d+)?", reader.node)
    return found[1].replace("/", ".") if found else ""


def _transposed(stored: Stored) -> Stored:
    return Stored(stored.shape[::-1], stored.dtype, lambda: stored.read().T)


def _one_after_other(parts: list[Stored], axis: int) -> Stored:
    """Return arrays joined along an axis, read when they are accessed."""
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return Stored(tuple(shape), parts[0].dtype, lambda: np.concatenate([part.read() for part in parts], axis))


_QKV = ("query", "key", "value")


def with_joined_attention(weights: Weights) -> Weights:
    """Return weights in which `query`, `key` and `value` of one attention are one array `qkv`.

    Files with the names of Hugging Face's transformers keep the three apart; the models here have one layer.

    Args:
        weights: Arrays of any file; those without such triples are returned as they are.
    """
    arrays = {key: weights.stored(key) for key in weights}
    joined: dict[str, Stored] = {}
    for key, stored in arrays.items():
        found = re.fullmatch(r"(.*\.)(query|key|value)(\.(?:weight|bias))", key)
        triple = [f"{found[1]}{name}{found[3]}" for name in _QKV] if found else []
        parts = [arrays[name] for name in triple if name in arrays]
        if not found or len(parts) < 3 or len({(part.shape, part.dtype) for part in parts}) > 1:
            joined[key] = stored
        elif found[2] == "query" and stored.shape:
            joined[f"{found[1]}qkv{found[3]}"] = _one_after_other(parts, axis=0)
        elif not stored.shape:
            joined[key] = stored
    return weights if len(joined) == len(arrays) else weights.replaced(joined)
