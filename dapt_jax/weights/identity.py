"""Fingerprints that show whether two starts of a study have loaded the same weights."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the sha256 of arrays by name: of names, shapes and float32 values, in the order of the names.

    Args:
        arrays: Arrays by path, of any floating dtype; they are hashed as little-endian float32 in C order.

    Returns:
        64 hexadecimal digits, which do not depend on the order of the mapping, the file's format or the width
        of its dtype.
    """
    found = hashlib.sha256()
    for path in sorted(arrays):
        array = np.ascontiguousarray(arrays[path], "<f4")
        found.update(f"{path}\0{arrays[path].shape}\0".encode())
        found.update(array.data)
    return found.hexdigest()


def digest_all(path: Path, others: Sequence[Path]) -> str:
    """Return the sha256 of a file, or of an index and the files that it names."""
    if not others:
        return digest(path)
    return hashlib.sha256("\0".join(map(digest, (path, *others))).encode()).hexdigest()


def digest(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, or of the names and contents of a folder's files.

    A file that has not changed (size, change time, inode) since the last call is not read again.
    """
    if path.is_dir():
        found = hashlib.sha256()
        for child in sorted(each for each in path.rglob("*") if each.is_file()):
            found.update(f"{child.relative_to(path).as_posix()}\0{digest(child)}\0".encode())
        return found.hexdigest()
    about = path.stat()
    return _of_file(path, (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino))


@functools.lru_cache(maxsize=256)
def _of_file(path: Path, about: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
