"""ONNX files of initialisers and nodes, written without the library."""

import numpy as np

CODES = {"float32": 1, "float16": 10, "float64": 11, "int64": 7}


def varint(value):
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def field(number, value):
    """A field: an integer, or bytes or text with its length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(name, array, *, external=None, listed=False):
    """An initialiser; `external`: pairs that say where its bytes lie; `listed`: floats one by one."""
    dims = b"".join(field(1, side) for side in array.shape)
    made = dims + field(2, CODES[array.dtype.name]) + field(8, name)
    if external is not None:
        pairs = b"".join(field(13, field(1, key) + field(2, value)) for key, value in external.items())
        return made + pairs + field(14, 1)
    return made + field(4 if listed else 9, np.ascontiguousarray(array).tobytes())


def node(operation, name, *inputs):
    return b"".join(field(1, each) for each in inputs) + field(3, name) + field(4, operation)


def model(arrays, nodes=(), **more):
    """A whole file; `more` are initialisers that are written already."""
    graph = b"".join(field(1, each) for each in nodes)
    graph += b"".join(field(5, tensor(name, array)) for name, array in arrays.items())
    graph += b"".join(field(5, each) for each in more.values())
    return field(1, 8) + field(2, "tests") + field(7, graph)
