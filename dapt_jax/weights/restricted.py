"""An unpickler that builds arrays and plain containers, with inert placeholders for all other objects.

A pickle is a program that may import and call anything. This unpickler resolves names through a fixed table
of inert entries (`records`), supports only the instructions that protocols 2 to 5 use for data, and stops
after a fixed number of them; so a malicious file can only be refused. Other objects beside the arrays
(hyper-parameters of any class) are neither imported nor built, and do not prevent the arrays from being read.
The class is based on Python's own unpickler in Python, because the one in C allocates any length that a file
declares.
"""

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from dapt_jax.weights import records
from dapt_jax.weights.records import (
    ALLOWED,
    DTYPES,
    DtypeRecord,
    Foreign,
    ForeignClass,
    Ignored,
    Module,
    Record,
    Refused,
    StorageRecord,
    is_key,
    resolve,
    set_item,
)

INSTRUCTIONS = 1_000_000
"""A state dict needs about 30 for each tensor; each may cost about 100 bytes."""
_DATA = (
    "PROTO STOP MARK POP POP_MARK FRAME MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE "
    "NEWFALSE INT LONG BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_LIST APPEND APPENDS "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD "
    "NEWOBJ NEWOBJ_EX BINPERSID"
)
_LONG_TEXT = 1 << 16
_NOTED = 20


class File(Protocol):
    """Input of an unpickler."""

    def read(self, size: int, /) -> bytes: ...  # noqa: D102

    def readline(self) -> bytes: ...  # noqa: D102


class _Instructions(dict[int, Any]):
    """The supported instructions, counted as they are executed."""

    left = INSTRUCTIONS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Refused(f"more than {INSTRUCTIONS:,} steps")
        if code not in self:
            raise Refused(f"the instruction {code:#04x}, which no data needs")
        return super().__getitem__(code)


class _Unpickler(pickle._Unpickler):
    """Unpickler that resolves names only through `records.resolve`."""

    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: File):
        super().__init__(file, encoding="latin1")
        codes = {getattr(pickle, name)[0]: name for name in _DATA.split()}
        own = {
            "SETITEM": _Unpickler.set_one,
            "SETITEMS": _Unpickler.set_several,
            "BUILD": _Unpickler.set_state,
            "NEWOBJ": _Unpickler.make,
            "NEWOBJ_EX": _Unpickler.make_with_names,
            "REDUCE": _Unpickler.call,
            "APPEND": _Unpickler.append_one,
            "APPENDS": _Unpickler.append_several,
            "BINUNICODE": _Unpickler.long_text,
            "BINUNICODE8": _Unpickler.longer_text,
            "BYTEARRAY8": _Unpickler.bytes_as_they_are,
        }
        known = {code: own.get(name, pickle._Unpickler.dispatch[code]) for code, name in codes.items()}
        self.dispatch = _Instructions(known)  # type: ignore[misc]
        self.storages: dict[str, np.dtype[Any]] = {}
        self.unread: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Any:
        found = resolve(module, name)
        if isinstance(found, ForeignClass):
            self._leave(found.name)
        return found

    def _leave(self, what: str) -> None:
        """Record the name of an object that is not read, for errors."""
        if len(self.unread) < _NOTED:
            self.unread[what] = None

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", DtypeRecord(name), str() | int() as key, _, int() as count, *view) if (
                name in DTYPES
            ):
                start = 0
                if view and view[0] is not None:
                    # (key, first element, number of elements) of a view into a longer run; older format only.
                    _, start, count = view[0]
                if type(count) is not int or type(start) is not int or count < 0 or start < 0:
                    raise Refused("a storage of negative size")
                self.storages[str(key)] = DTYPES[name]
                return StorageRecord(str(key), DTYPES[name], count, start)
            case ("module", kind, *_) if kind is Module or isinstance(kind, ForeignClass):
                return kind  # the older format stores the source of a class beside it
            case ("storage", ForeignClass(), *_):
                return Foreign()
            case (str() as kind, *_):
                raise Refused(f"a persistent {kind[:40]!r}")
        raise Refused("a persistent object that is not a storage")

    def set_one(self) -> None:
        """SETITEM."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def set_several(self) -> None:
        """SETITEMS."""
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: object, value: object) -> None:
        """Set an item; an item whose key is not the name of an array is left out without hashing the key."""
        if isinstance(self.stack[-1], dict) and not is_key(key):
            self._leave(f"a dict whose key is a {type(key).__name__}")
        else:
            set_item(self.stack[-1], key, value)

    def append_one(self) -> None:
        """APPEND."""
        value = self.stack.pop()
        self._list().append(value)

    def append_several(self) -> None:
        """APPENDS."""
        values = self.pop_mark()
        self._list().extend(values)

    def _list(self) -> list[Any]:
        if isinstance(self.stack[-1], Foreign):
            return []
        if not isinstance(self.stack[-1], list):
            raise Refused(f"an element of a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def set_state(self) -> None:
        """BUILD: only for placeholders, which interpret a state themselves."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], ForeignClass):
            return
        if not hasattr(type(self.stack[-1]), "__setstate__"):
            raise Refused(f"the state of a {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)

    def make(self) -> None:
        """NEWOBJ."""
        arguments, made = self.stack.pop(), self.stack.pop()
        if made is ALLOWED["collections", "OrderedDict"]:
            made = Record()
        elif isinstance(made, records.NamedTuple) and isinstance(arguments, tuple):
            made = made.make(*arguments)
        elif isinstance(made, ForeignClass):
            made = made.make()
        elif made is Ignored or made is Module:
            made = made()
        else:
            raise Refused("a new object of something that is not a container")
        self.stack.append(made)

    def make_with_names(self) -> None:
        """NEWOBJ_EX: a new object with keyword arguments, which is never an array."""
        del self.stack[-2:]
        if not isinstance(self.stack.pop(), ForeignClass):
            raise Refused("a new object of something that is not a container")
        self.stack.append(Foreign())

    def call(self) -> None:
        """REDUCE: arguments are counted too, because a function of the table may copy them."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if isinstance(function, ForeignClass):
            function = function.make
        elif isinstance(function, Foreign):  # the result of a method of an object that is not built
            function = ForeignClass("").make
        elif not any(function is each for each in ALLOWED.values()):
            raise Refused("a call of something that is not a function")
        if not isinstance(arguments, tuple):
            raise Refused("a call without arguments")
        self.dispatch.left -= sum(len(each) for each in arguments if isinstance(each, list | tuple | dict))  # type: ignore[attr-defined]
        self.stack.append(function(*arguments))

    def long_text(self) -> None:
        """BINUNICODE."""
        self._text(int.from_bytes(self.read(4), "little"))

    def longer_text(self) -> None:
        """BINUNICODE8."""
        self._text(int.from_bytes(self.read(8), "little"))

    def bytes_as_they_are(self) -> None:
        """BYTEARRAY8; Python's own method would allocate the length that the file declares."""
        self.stack.append(self.read(int.from_bytes(self.read(8), "little")))

    def _text(self, length: int) -> None:
        """Read text; long text must be bytes, because one wide character makes every character 4 bytes."""
        data = self.read(length)
        if len(data) > _LONG_TEXT and max(data) > 0xC3:
            raise Refused(f"a text of {len(data):,} bytes")
        self.stack.append(str(data, "utf-8", "surrogatepass"))


class Content(NamedTuple):
    """Contents of a pickle.

    Attributes:
        value: Plain containers, with a `TensorRecord` or `NumpyArray` for every array and a `Foreign` for all
            other objects.
        storages: The declared dtype of every storage.
        unread: Names of the first 20 classes and functions with placeholders.
    """

    value: Any
    storages: dict[str, np.dtype[Any]]
    unread: tuple[str, ...]


def load(file: File) -> Content:
    """Read one pickle from a file.

    Args:
        file: File whose `read` never returns more bytes than exist (a mapped file, or `BytesIO`).

    Raises:
        Refused: The pickle uses a name that no weights need; the message is this name.
        Exception: The bytes are not a pickle (an unpickler raises many types).
    """
    unpickler = _Unpickler(file)
    return Content(unpickler.load(), unpickler.storages, tuple(unpickler.unread))
