"""Inert records of the contents of pickled weights, and the table of names that a pickle may use.

Names and argument orders are those of PyTorch's `torch/_utils.py` and `torch/serialization.py`
(BSD-3-Clause), of NumPy's `_core/multiarray` (BSD-3-Clause), of dm-haiku's `data_structures` and BYOL's
`byol_experiment` (both Apache-2.0).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

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
_SIDES = 32
"""More dimensions than arrays of NumPy or PyTorch models have."""


class Refused(Exception):
    """The pickle contains something that is not an array or a plain container."""


class Record(dict[Any, Any]):
    """Placeholder for `OrderedDict` and similar classes; attributes in a file (`_metadata`) are dropped."""

    def __setstate__(self, state: object) -> None: ...


class Module(Record):
    """Placeholder for a pickled network or module: only its parameters, buffers and submodules by name."""

    def __setstate__(self, state: object) -> None:
        for kept in ("_parameters", "_buffers", "_modules"):
            if isinstance(state, dict) and isinstance(state.get(kept), dict):
                self.update({key: each for key, each in state[kept].items() if isinstance(key, str)})


@dataclasses.dataclass(frozen=True)
class NamedTuple:
    """Placeholder for a class of named tuples, which makes records with its fields."""

    fields: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.fields, tuple) or not all(isinstance(field, str) for field in self.fields):
            raise Refused("a named tuple whose fields are not names")

    def make(self, *values: object) -> Record:
        """Return one named tuple.

        Raises:
            Refused: The number of values differs from the number of fields.
        """
        if len(values) != len(self.fields):
            raise Refused(f"a named tuple of {len(self.fields)} fields with {len(values)} values")
        return Record(zip(self.fields, values, strict=True))


class Ignored(Record):
    """Placeholder for named tuples without weights (an optimiser's state)."""

    def __init__(self, *_: object):
        super().__init__()


class Foreign(Record):
    """Placeholder for an object that is never built: a hyper-parameter, a callback, a path.

    For a kind of dict (`AttributeDict`, `defaultdict`) it holds the items, so that a state dict in it is
    found.
    """


@dataclasses.dataclass(frozen=True)
class ForeignClass:
    """Placeholder for an unknown class or function, whose results are `Foreign`.

    Attributes:
        name: `module.name` in the pickle.
    """

    name: str

    def make(self, *arguments: object) -> Foreign:
        """Return a placeholder with the items of its dict argument, if it has one."""
        made = Foreign()
        if arguments and isinstance(arguments[0], dict):
            made.update(arguments[0])
        return made


@dataclasses.dataclass(frozen=True)
class DtypeRecord:
    """Placeholder for a torch dtype or a typed storage class."""

    name: str


@dataclasses.dataclass(frozen=True)
class StorageRecord:
    """A sequence of elements elsewhere in the file.

    Attributes:
        key: Name of the sequence in the file.
        dtype: Type of its elements.
        count: Number of elements.
        start: Index of its first element in the named sequence; not 0 for views in the older format.
    """

    key: str
    dtype: np.dtype[Any]
    count: int
    start: int = 0


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """A tensor whose values are not read yet; `offset` and `strides` count elements."""

    storage: StorageRecord
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.storage, StorageRecord) or not is_shape(
            (self.offset, *self.shape, *self.strides)
        ):
            raise Refused("a tensor that is not described by a storage and non-negative integers")
        if len(self.shape) != len(self.strides):
            raise Refused(f"a tensor with {len(self.shape)} sides and {len(self.strides)} strides")
        size = int(np.prod(self.shape, dtype=object))
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if size and (last >= self.storage.count or size > self.storage.count):
            raise Refused(f"a tensor of shape {self.shape} out of {self.storage.count} stored elements")

    def build(self, run: np.ndarray) -> np.ndarray:
        """Return the array as a read-only view of the elements of its named sequence.

        Raises:
            Refused: Shape, strides and offset exceed the stored elements.
        """
        stored = run[self.storage.start : self.storage.start + self.storage.count]
        if stored.size < self.storage.count:
            raise Refused(f"a tensor of shape {self.shape} out of {stored.size} stored elements")
        if 0 in self.shape:
            return np.zeros(self.shape, stored.dtype)
        steps = [step * stored.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(stored[self.offset :], self.shape, steps, writeable=False)


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """Bytes that a pickle of protocol 2 stores as text, with one character each."""

    text: str

    def __bytes__(self) -> bytes:
        return self.text.encode("latin1")


class NumpyDtype:
    """Placeholder for a NumPy dtype: `f4` and the byte order that is set after it."""

    def __init__(self, code: object, *_: object):
        self.code, self.order = code, "="

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    def resolve(self) -> np.dtype[Any] | None:
        """Return the dtype, or None if it is not numeric."""
        if not isinstance(self.code, str) or self.code[:1] not in "fiubc" or not self.code[1:].isdigit():
            return None
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class NumpyArray:
    """Placeholder for a NumPy array: shape, dtype and bytes from its state; empty before that.

    Attributes:
        shape: Shape of the array.
        dtype: Type of its elements; None for text and objects, which are not read.
    """

    shape: tuple[int, ...] = (0,)
    dtype: np.dtype[Any] | None = np.dtype("u1")

    def __init__(self, *_: object):
        self._data: bytes | EncodedText = b""
        self._is_fortran = False

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple(), NumpyDtype() as dtype, bool(), _) if dtype.resolve() is None:
                self.dtype = None
                return
            case (
                int(),
                tuple() as shape,
                NumpyDtype() as dtype,
                bool() as is_fortran,
                (bytes() | EncodedText()) as data,
            ):
                known = dtype.resolve()
            case _:
                raise Refused("a NumPy array that is not described by a shape, a dtype and bytes")
        assert known is not None
        self.shape, self.dtype, self._is_fortran, self._data = shape, known, is_fortran, data
        length = len(data.text) if isinstance(data, EncodedText) else len(data)
        if not is_shape(shape) or int(np.prod(shape, dtype=object)) * known.itemsize != length:
            raise Refused(f"a NumPy array of shape {shape} and type {known} out of {length} bytes")

    def build(self) -> np.ndarray:
        """Return the array."""
        flat = np.frombuffer(bytes(self._data), self.dtype)
        return flat.reshape(self.shape, order="F" if self._is_fortran else "C")


def is_shape(sides: object) -> bool:
    """Return whether an object is a short tuple of non-negative integers, like shapes and strides."""
    return (
        isinstance(sides, tuple)
        and len(sides) <= 2 * _SIDES + 1
        and all(type(n) is int and n >= 0 for n in sides)
    )


def _sides(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or not is_shape(sides := tuple(values[: 2 * _SIDES + 2])):
        raise Refused("a tensor that is not described by a storage and non-negative integers")
    return sides


def _tensor(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    *_: object,
) -> TensorRecord | Foreign:
    if isinstance(storage, Foreign):  # its dtype is not supported
        return Foreign()
    if not isinstance(storage, StorageRecord) or not isinstance(offset, int):
        raise Refused("a tensor that is not described by a storage and non-negative integers")
    return TensorRecord(storage, offset, _sides(size), _sides(stride))


def _tensor_of_dtype(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    grad: object,
    hooks: object,
    dtype: object,
    *_: object,
) -> TensorRecord | Foreign:
    """Return a tensor over raw bytes: its storage is reinterpreted as elements of the named dtype."""
    if not isinstance(storage, StorageRecord) or not isinstance(dtype, DtypeRecord):
        raise Refused("a tensor that is not described by a storage and a dtype")
    elements = DTYPES[dtype.name]
    count = storage.count * storage.dtype.itemsize // elements.itemsize
    return _tensor(dataclasses.replace(storage, dtype=elements, count=count), offset, size, stride)


def _tensor_of_kind(function: object, kind: object, arguments: object, *_: object) -> object:
    """Return the tensor in a tensor subclass (such as MONAI's `MetaTensor`)."""
    known = (_tensor, _tensor_of_dtype, _first)
    if callable(function) and function in known and isinstance(arguments, tuple):
        return function(*arguments)
    return Foreign()


def _first(value: object, *_: object) -> object:
    return value


def _nothing(*_: object) -> Foreign:
    """Return a placeholder for other contents of a checkpoint: devices, NumPy scalars."""
    return Foreign()


def _ordered(pairs: object = (), *_: object) -> Record:
    """Return an `OrderedDict`; Python 2 wrote its pairs as an argument."""
    if not isinstance(pairs, tuple | list) or any(
        not isinstance(p, tuple | list) or len(p) != 2 for p in pairs
    ):
        raise Refused("an OrderedDict that is not made of pairs")
    made = Record()
    for key, value in pairs:
        set_item(made, key, value)
    return made


def _encode(text: object, encoding: object = "", *_: object) -> EncodedText | None:
    return EncodedText(text) if isinstance(text, str) and encoding == "latin1" else None


def _dill_array(function: object, arguments: object, state: object, *_: object) -> NumpyArray:
    made = NumpyArray()
    made.__setstate__(state)
    return made


def _numpy_buffer(data: object, dtype: object, shape: object, order: object, *_: object) -> NumpyArray:
    """Return an array in the format of protocol 5."""
    made = NumpyArray()
    made.__setstate__((1, shape, dtype, order == "F", data))
    return made


def _dill_named_tuple(name: object, fields: object, *_: object) -> NamedTuple:
    if not isinstance(fields, tuple | list):
        raise Refused("a named tuple whose fields are not names")
    return NamedTuple(tuple(fields))


def _mapping(mapping: object = None, *_: object) -> dict[Any, Any]:
    """Return the dict inside a haiku mapping."""
    return mapping if isinstance(mapping, dict) else Record()


def set_item(target: object, key: object, value: object) -> None:
    """Set an item of a dict, as a pickle requests.

    Raises:
        Refused: The target is not a dict, or the key is not a plain one or exists already.
    """
    if not isinstance(target, dict):
        raise Refused(f"an item of a {type(target).__name__}")
    if not is_key(key):
        raise Refused(f"a dict whose key is a {type(key).__name__}")
    if key in target:
        raise Refused(f"the key {key!r} twice in one dict")
    target[key] = value


def is_key(key: object) -> bool:
    """Return whether an object may be the key of a dict here.

    Hashing nested tuples may never finish: 30 of them, each with the previous one twice, have 2^30 parts.
    """
    return isinstance(key, str | int | float | bytes | None | DtypeRecord)


ALLOWED: dict[tuple[str, str], Callable[..., Any] | DtypeRecord | NamedTuple | type] = {
    ("collections", "OrderedDict"): _ordered,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_of_kind,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch", "Size"): _sides,
    ("torch", "device"): _nothing,
    ("argparse", "Namespace"): Ignored,
    **{(builtins, "set"): _nothing for builtins in ("builtins", "__builtin__")},
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): NumpyDtype,
    ("numpy", "ndarray"): DtypeRecord("ndarray"),
    **{(f"numpy.{core}.multiarray", "scalar"): _nothing for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): NumpyArray for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _numpy_buffer for core in ("core", "_core")},
    **{("torch", f"{name}Storage"): DtypeRecord(dtype) for name, dtype in _STORAGES.items()},
    **{("torch.storage", f"{name}Storage"): DtypeRecord(dtype) for name, dtype in _STORAGES.items()},
    **{("torch", dtype): DtypeRecord(dtype) for dtype in DTYPES},
    **{("haiku._src.data_structures", name): _mapping for name in ("FlatMapping", "FlatMap", "frozendict")},
    ("byol.byol_experiment", "_ByolExperimentState"): NamedTuple(
        ("online_params", "target_params", "online_state", "target_state", "opt_state")
    ),
    ("dill._dill", "_create_array"): _dill_array,
    ("dill._dill", "_create_namedtuple"): _dill_named_tuple,
    ("byol.utils.optimizers", "ScaleByLarsState"): Ignored,
    ("byol.utils.optimizers", "AddWeightDecayState"): Ignored,
    **{
        (f"optax._src.{room}", name): Ignored
        for room in ("transform", "base", "alias")
        for name in ("ScaleState", "EmptyState", "IdentityState", "ScaleByAdamState", "TraceState")
    },
}
MODULES = (
    "torch.nn.modules.",
    "torchvision.models.",
    "torchvision.ops.",
    "torchxrayvision.models",
    "timm.",
    "monai.networks.",
)
"""Libraries whose pickled networks are read; their classes are not loaded."""


_PROGRAMS = (
    "os",
    "posix",
    "nt",
    "subprocess",
    "shutil",
    "socket",
    "ctypes",
    "importlib",
    "runpy",
    "pty",
    "commands",
    "code",
)
_CODE = ("eval", "exec", "compile", "open", "__import__", "input", "breakpoint")


def resolve(module: str, name: str) -> Any:
    """Return the object for a name in a pickle; `ForeignClass` if the table does not contain it.

    Raises:
        Refused: Only a malicious file uses the name. It would not be called either, but the user should know.
    """
    if (module, name) in ALLOWED:
        return ALLOWED[module, name]
    if module.startswith(MODULES) and name.isidentifier():
        return Module
    if module.partition(".")[0] in _PROGRAMS or (module in ("builtins", "__builtin__") and name in _CODE):
        raise Refused(f"{module}.{name}")
    return ForeignClass(f"{module}.{name}")
