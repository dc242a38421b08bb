"""Reads from HDF5 files that are not trusted: no link out of the file, no other file's numbers, no chunk that is a bomb.

For images and for weights. What can be told from the file's description is refused here, before anything is
allocated; the HDF5 library itself may still hang or crash on a damaged file, so readers try such files out in
a process with limits (`limit_process`).
"""

import contextlib
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
"""Others are code that the library would load from a folder of plug-ins."""


def follow(group: h5py.Group | h5py.Dataset, path: str) -> Any:
    """Return what a path inside the file leads to; soft and external links are not followed.

    Args:
        group: Where the path starts.
        path: Names with slashes between them.

    Raises:
        KeyError: There is no such object, or a link is in the way.
    """
    for part in filter(None, path.split("/")):
        if not isinstance(group, h5py.Group) or not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise KeyError(f"no {path!r} in it")
        group = group[part]
    return group


def check(dataset: h5py.Dataset, path: Path) -> int:
    """Refuse a dataset that reaches out of its file or needs foreign code, and say what reading it takes.

    Args:
        dataset: An `h5py.Dataset`.
        path: The file, for the error line.

    Returns:
        Bytes that reading it takes: those of the array and, where it is kept in chunks, those of one chunk,
        which the library unpacks whole whatever the array's size.

    Raises:
        UserError: It is kept in another file, or packed in a way that is not known.
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
    return (size + (chunk if size else 0)) * dataset.dtype.itemsize


def limit_process(seconds: int, spare: int) -> None:
    """Limit what this process may compute and allocate from here on; for one that only tries a file out.

    A chunk may unpack to more than it declares, and an attribute may declare any size: the limit makes an
    error of it.

    Args:
        seconds: CPU time.
        spare: Bytes beyond those that it has now.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows, nor without /proc
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + spare
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
