"""Safe reading of untrusted HDF5 files: no external links or storage, no oversized chunks.

This module serves images and weights. Everything that the file's metadata reveal is refused here, before
anything is allocated; the HDF5 library itself may still hang or crash on a damaged file, so readers first
open such files in a process with limits (`limit_process`).
"""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dapt_jax.errors import UserError

_FILTERS = {
    h5py.h5z.FILTER_DEFLATE: "deflate",
    h5py.h5z.FILTER_SHUFFLE: "shuffle",
    h5py.h5z.FILTER_FLETCHER32: "fletcher32",
    h5py.h5z.FILTER_LZF: "lzf",
    h5py.h5z.FILTER_SCALEOFFSET: "scaleoffset",
}
"""Other filters are code that the library would load from a folder of plug-ins."""
_CHUNK_BYTES = 4096
"""Measured with HDF5 1.14 and 2.0: 2.4 to 4.0 kB for a chunk of a selection."""


def follow(group: h5py.Group | h5py.Dataset, path: str) -> Any:
    """Return the object at a path inside the file; soft and external links are not followed.

    Args:
        group: Group or dataset where the path starts.
        path: Names separated by slashes.

    Raises:
        KeyError: The object does not exist, or the path contains a link.
    """
    for part in filter(None, path.split("/")):
        if not isinstance(group, h5py.Group) or not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise KeyError(f"no {path!r} in it")
        group = group[part]
    return group


def check(dataset: h5py.Dataset, path: Path) -> int:
    """Refuse a dataset with external storage or unknown filters, and return the cost of reading it.

    Args:
        dataset: An `h5py.Dataset`.
        path: The file, for the error line.

    Returns:
        Bytes needed to read it: those of the array and, for chunked storage, those of one chunk, which the
        library decompresses completely whatever the array's size, and of the list of chunks.

    Raises:
        UserError: The dataset is stored in another file, or compressed with an unknown filter.
    """
    name = dataset.name[:80]
    if dataset.external or dataset.is_virtual:
        raise UserError(
            f"{path}: {name!r} is kept in another file; expected a file that holds its own numbers"
        )
    plan = dataset.id.get_create_plist()
    for number in range(plan.get_nfilters()):
        code = plan.get_filter(number)[0]
        if code not in _FILTERS:
            raise UserError(
                f"{path}: {name!r} is packed by filter {code}; expected one of {', '.join(_FILTERS.values())}"
            )
    chunk = int(np.prod(dataset.chunks, dtype=object)) if dataset.chunks else 0
    size = int(np.prod(dataset.shape, dtype=object))
    listed = chunk_list_bytes(dataset.shape, dataset.chunks)
    return (size + (chunk if size else 0)) * dataset.dtype.itemsize + listed


def chunk_list_bytes(shape: Sequence[int], chunks: Sequence[int] | None) -> int:
    """Return the bytes that the library takes to list the chunks of what it reads at once, whatever they hold.

    A file of a few kilobytes may declare millions of chunks without content.

    Args:
        shape: Sides of the array, or of the part that is read.
        chunks: Sides of a chunk; None for an array without chunks.
    """
    if not chunks:
        return 0
    return _CHUNK_BYTES * math.prod(-(-side // chunk) for side, chunk in zip(shape, chunks, strict=True))


def limit_process(seconds: int, spare: int) -> None:
    """Limit the computation and memory of this process, which only tests a file.

    A chunk may decompress to more than it declares, and an attribute may declare any size: the limit turns
    this into an error.

    Args:
        seconds: Limit of CPU time.
        spare: Bytes that the process may allocate in addition to those it has now.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):  # missing on Windows and without /proc
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        limit = pages * resource.getpagesize() + spare
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
