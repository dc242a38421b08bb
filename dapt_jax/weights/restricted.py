"""An unpickler that builds arrays and plain containers and refuses all else by name.

A pickle is a program: it may import and call anything. This one resolves names through a fixed table whose entries are
inert (`records`), knows only the instructions that writers of protocols 2 to 5 use for data, and stops after a fixed number
of them; so the worst a hostile file can do is to be refused. It is Python's own unpickler in Python, not the one in C,
because that one reserves whatever a length in the file claims.
"""

import pickle
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from dapt_jax.weights.records import (
    ALLOWED,
    DTYPES,
    DtypeRecord,
    Ignored,
    Module,
    NamedTuple,
    Record,
    Refused,
    StorageRecord,
    resolve,
    set_item,
)

INSTRUCTIONS = 1_000_000
"""A state dict takes some 30 for each of its tensors; each may cost some 100 bytes."""
_DATA = (
    "PROTO STOP MARK POP POP_MARK FRAME MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE INT LONG BININT "
    "BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM "
    "SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ BINPERSID"
)
_LONG_TEXT = 1 << 16


class File(Protocol):
    """What an unpickler reads from."""

    def read(self, size: int, /) -> bytes: ...  # noqa: D102

    def readline(self) -> bytes: ...  # noqa: D102


class _Instructions(dict[int, Any]):
    """The instructions that are known, counted as they are carried out."""

    left = INSTRUCTIONS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Refused(f"more than {INSTRUCTIONS:,} steps")
        if code not in self:
            raise Refused(f"the instruction {code:#04x}, which no data needs")
        return super().__getitem__(code)


class _Unpickler(pickle._Unpickler):
    """Resolves names through `records.resolve` alone."""

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

    def find_class(self, module: str, name: str) -> Any:
        return resolve(module, name)

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", DtypeRecord(name), str() | int() as key, _, int() as count, *view) if name in DTYPES:
                start = 0
                if view and view[0] is not None:
                    # (key, first element, number of elements) of a view into a longer run; older format only.
                    _, start, count = view[0]
                if type(count) is not int or type(start) is not int or count < 0 or start < 0:
                    raise Refused("a storage of negative size")
                self.storages[str(key)] = DTYPES[name]
                return StorageRecord(str(key), DTYPES[name], count, start)
            case ("module", kind, *_) if kind is Module:  # the older format keeps the source of a class beside it
                return kind
            case (str() as kind, *_):
                raise Refused(f"a persistent {kind[:40]!r}")
        raise Refused("a persistent object that is not a storage")

    def set_one(self) -> None:
        """SETITEM."""
        value, key = self.stack.pop(), self.stack.pop()
        set_item(self.stack[-1], key, value)

    def set_several(self) -> None:
        """SETITEMS."""
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
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
        if not isinstance(self.stack[-1], list):
            raise Refused(f"an element of a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def set_state(self) -> None:
        """BUILD: only for stand-ins, which know what to do with a state."""
        state = self.stack.pop()
        if not hasattr(type(self.stack[-1]), "__setstate__"):
            raise Refused(f"the state of a {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)

    def make(self) -> None:
        """NEWOBJ."""
        arguments, made = self.stack.pop(), self.stack.pop()
        if made is ALLOWED["collections", "OrderedDict"]:
            made = Record()
        elif isinstance(made, NamedTuple) and isinstance(arguments, tuple):
            made = made.make(*arguments)
        elif made is Ignored or made is Module:
            made = made()
        else:
            raise Refused("a new object of something that is not a container")
        self.stack.append(made)

    def call(self) -> None:
        """REDUCE: what it is given is counted too, since a function of the table may copy it."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple) or not any(function is each for each in ALLOWED.values()):
            raise Refused("a call of something that is not a function")
        self.dispatch.left -= sum(len(each) for each in arguments if isinstance(each, list | tuple | dict))  # type: ignore[attr-defined]
        self.stack.append(function(*arguments))

    def long_text(self) -> None:
        """BINUNICODE."""
        self._text(int.from_bytes(self.read(4), "little"))

    def longer_text(self) -> None:
        """BINUNICODE8."""
        self._text(int.from_bytes(self.read(8), "little"))

    def bytes_as_they_are(self) -> None:
        """BYTEARRAY8; Python's own would reserve the length that the file claims."""
        self.stack.append(self.read(int.from_bytes(self.read(8), "little")))

    def _text(self, length: int) -> None:
        """Text; where it is long, of bytes only: one wide character would make four bytes of every one."""
        data = self.read(length)
        if len(data) > _LONG_TEXT and max(data) > 0xC3:
            raise Refused(f"a text of {len(data):,} bytes")
        self.stack.append(str(data, "utf-8", "surrogatepass"))


def load(file: File) -> tuple[Any, dict[str, np.dtype[Any]]]:
    """Reads one pickle off a file.

    Args:
        file: one whose `read` gives no more than there is (a map of a file, or `BytesIO`).

    Returns:
        Plain containers, with a `TensorRecord` or `NumpyArray` for every array; and the dtype that every storage was
        declared with.

    Raises:
        Refused: the pickle asks for anything else; the message is its name.
        Exception: the bytes are not a pickle (an unpickler raises many kinds).
    """
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.storages
