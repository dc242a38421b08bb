"""Writes PyTorch's checkpoint formats without PyTorch: well-formed ones, and ones that it never would."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "float32": "Float",
    "float16": "Half",
    "float64": "Double",
    "int64": "Long",
    "uint8": "Byte",
    "bool": "Bool",
}


class Named:
    """Pickled as the global `module.name`, which need not exist."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    """Pickled as a call of `function` (a Named) with `args`, with a state to set if one is given."""

    def __init__(self, function: Named, *args, state=None):
        self.function, self.args, self.state = function, args, state


class New:
    """Pickled as a new object of `kind` (a Named), made of `args` without its constructor, with a state to set if any."""

    def __init__(self, kind: Named, state=None, args=()):
        self.kind, self.state, self.args = kind, state, args


class Storage:
    """Pickled as a persistent id."""

    def __init__(self, *pid):
        self.pid = pid


class Writer(pickle._Pickler):  # the Python one: its save methods can be extended
    """Writes pickles that name classes of packages that are not installed."""

    def persistent_id(self, value):
        return value.pid if isinstance(value, Storage) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Named):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.args)
            self.write(pickle.REDUCE)
            if value.state is not None:
                self.save(value.state)
                self.write(pickle.BUILD)
        elif isinstance(value, New):
            self.save(value.kind)
            self.save(value.args)
            self.write(pickle.NEWOBJ)
            if value.state is not None:
                self.save(value.state)
                self.write(pickle.BUILD)
        else:
            super().save(value, save_persistent_id)


def pickled(value) -> bytes:
    file = io.BytesIO()
    Writer(file, 2).dump(value)
    return file.getvalue()


def tensor(array: np.ndarray, key: str, *, strides=None, offset=0, shape=None, kind=None, view=()) -> Call:
    """What torch pickles for a tensor whose storage holds `array`, flat."""
    kind = Named("torch", f"{kind or STORAGES[array.dtype.name]}Storage")
    storage = Storage("storage", kind, key, "cpu", array.size, *view)
    shape = array.shape if shape is None else shape
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    ordered = Call(Named("collections", "OrderedDict"))
    return Call(Named("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, strides, False, ordered)


def write_zip(path: Path, content, runs: dict[str, bytes], order: bytes = b"little") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(content))
        archive.writestr("archive/byteorder", order)
        for key, data in runs.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
    return path


def write_old(path: Path, content, runs: dict[str, np.ndarray]) -> Path:
    machine = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    parts = [pickled(MAGIC), pickled(1001), pickled(machine), pickled(content), pickled(list(runs))]
    parts += [struct.pack("<q", array.size) + array.tobytes() for array in runs.values()]
    path.write_bytes(b"".join(parts))
    return path
