"""An unpickler that builds arrays and plain containers and refuses all else by name.

A pickle is a program: it may import and call anything. This one resolves names through a fixed table whose entries are
inert (records, or functions that return records), so the worst a hostile file can do is to be refused. Tensors come out
as `TensorRecord`: in the older file format the numbers follow behind the pickle.

Names and argument orders are those of PyTorch's `torch/_utils.py` and `torch/serialization.py` (BSD-3-Clause).
"""

import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}

_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "Untyped": "uint8",
}


class Refused(Exception):
    """The pickle asks for something that is not an array or a plain container."""


class Record(dict[Any, Any]):
    """Stands in for `OrderedDict`; what a file would set as attributes (`_metadata`) is dropped."""

    def __setstate__(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class DtypeRecord:
    """Stands in for a torch dtype or a typed storage class."""

    name: str


@dataclasses.dataclass(frozen=True)
class StorageRecord:
    """A run of numbers elsewhere in the file.

    Attributes:
        key: its name there.
        dtype: of its elements.
        count: number of elements.
        start: element of the named run that it starts at; not 0 for the views of the older format.
    """

    key: str
    dtype: np.dtype[Any]
    count: int
    start: int = 0


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """A tensor whose numbers are still to be read; `offset` and `strides` count elements."""

    storage: StorageRecord
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        counts = (self.offset, *self.shape, *self.strides)
        if not isinstance(self.storage, StorageRecord) or not all(type(n) is int and n >= 0 for n in counts):
            raise Refused("a tensor that is not described by a storage and non-negative integers")
        if len(self.shape) != len(self.strides):
            raise Refused(f"a tensor with {len(self.shape)} sides and {len(self.strides)} strides")

    def build(self, run: np.ndarray) -> np.ndarray:
        """The array, given the elements of its named run; bfloat16 widens to float32, which NumPy knows.

        Raises:
            Refused: shape, strides and offset reach beyond the elements that are stored.
        """
        stored = run[self.storage.start : self.storage.start + self.storage.count]
        size = int(np.prod(self.shape, dtype=object))
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if size and (last >= stored.size or size > stored.size):
            raise Refused(f"a tensor of shape {self.shape} out of {stored.size} stored elements")
        if not size:
            return np.zeros(self.shape, stored.dtype)
        steps = [step * stored.itemsize for step in self.strides]
        view = np.lib.stride_tricks.as_strided(stored[self.offset :], self.shape, steps, writeable=False)
        wide = np.float32 if stored.dtype == DTYPES["bfloat16"] else stored.dtype.newbyteorder("=")
        return np.array(view, dtype=wide, order="C")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRecord:
    return TensorRecord(storage, offset, tuple(size), tuple(stride))


def _tensor_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Any:
    """A tensor over raw bytes: the record's storage is read anew as elements of the dtype named."""
    if not isinstance(storage, StorageRecord) or not isinstance(dtype, DtypeRecord):
        raise Refused("a tensor that is not described by a storage and a dtype")
    elements = DTYPES[dtype.name]
    count = storage.count * storage.dtype.itemsize // elements.itemsize
    return _tensor(dataclasses.replace(storage, dtype=elements, count=count), offset, size, stride)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _nothing(*_: Any) -> None:
    """For what a checkpoint carries beside its arrays and nobody here reads: devices, NumPy scalars."""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Record,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): _nothing,
    ("_codecs", "encode"): _nothing,
    ("numpy", "dtype"): lambda *_: Record(),
    ("numpy.core.multiarray", "scalar"): _nothing,
    ("numpy._core.multiarray", "scalar"): _nothing,
    **{("torch", f"{name}Storage"): DtypeRecord(dtype) for name, dtype in _STORAGES.items()},
    **{("torch.storage", f"{name}Storage"): DtypeRecord(dtype) for name, dtype in _STORAGES.items()},
    **{("torch", dtype): DtypeRecord(dtype) for dtype in DTYPES},
}


class _Unpickler(pickle.Unpickler):
    """Resolves names through `_ALLOWED` alone."""

    def __init__(self, file: BinaryIO | io.BytesIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, np.dtype[Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise Refused(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> StorageRecord:
        match pid:
            case ("storage", DtypeRecord(name), str() | int() as key, _, int() as count, *view):
                start = 0
                if view and view[0] is not None:
                    # (key, first element, number of elements) of a view into a longer run; older format only.
                    _, start, count = view[0]
                if count < 0 or start < 0:
                    raise Refused("a storage of negative size")
                self.storages[str(key)] = DTYPES[name]
                return StorageRecord(str(key), DTYPES[name], count, start)
            case (str() as kind, *_):
                raise Refused(f"a persistent {kind!r}")
        raise Refused("a persistent object that is not a storage")


def load(file: BinaryIO | io.BytesIO) -> tuple[Any, dict[str, np.dtype[Any]]]:
    """Reads one pickle off a file.

    Returns:
        Plain containers, with a `TensorRecord` for every tensor; and the dtype that every storage was declared with.

    Raises:
        Refused: the pickle asks for anything else; the message is its name.
        Exception: the bytes are not a pickle (`pickle.Unpickler` raises many kinds).
    """
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.storages


Reader = Callable[[str, np.dtype[Any]], np.ndarray]
"""Storage key and dtype to all elements of that run."""


def resolve(value: Any, read: Reader) -> Any:
    """The same containers with every `TensorRecord` replaced by its array; tuples and lists are left as they are."""
    if isinstance(value, TensorRecord):
        return value.build(read(value.storage.key, value.storage.dtype))
    if isinstance(value, dict):
        return {key: resolve(item, read) for key, item in value.items()}
    return value
