"""Reading of damaged or hostile HDF5 files: each is tested first in another process.

The HDF5 library hangs or crashes on some damaged files. One helper process per reading process opens every
file before it is read here; a file on which the helper hangs or crashes is refused, and a new helper is
started. Links out of the file are not followed, and the size of chunks is bounded.
"""

import atexit
import contextlib
import functools
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from dapt_jax.data import hdf5, limits
from dapt_jax.errors import UserError

MAGIC = b"\x89HDF\r\n\x1a\n"
_SECONDS, _START_SECONDS = 5, 20
_BYTES_PER_SECOND = 20 << 20
_DEPTH = 16
_WHOLE_BYTES = 64 << 20
_OBJECTS = 100_000
_CODE = (
    "import sys; sys.path.insert(0, sys.argv[1]); from dapt_jax.data import hdf5_trial; hdf5_trial.serve()"
)
_lock = threading.Lock()
_helper: subprocess.Popen[bytes] | None = None
_owner = 0


def check(path: Path) -> None:
    """Test a file in another process, once as long as it is unchanged.

    Raises:
        UserError: The HDF5 library crashes or does not finish.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: no such file") from error
    if why := _tried(path, (stat.st_size, stat.st_mtime_ns), limits.decoded_bytes()):
        raise UserError(f"{path}: damaged: {why}; expected a whole HDF5 file")


@functools.lru_cache(maxsize=1 << 16)
def _tried(path: Path, stamp: tuple[int, int], limit: int) -> str:
    """Return why a file cannot be read under a limit of decoded bytes; "" if the helper read it."""
    global _helper, _owner
    seconds = _SECONDS + stamp[0] // _BYTES_PER_SECOND
    with _lock:
        if _helper is None or _owner != os.getpid() or _helper.poll() is not None:
            root = str(Path(__file__).parents[2])
            _helper = subprocess.Popen(
                [sys.executable, "-c", _CODE, root],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            _owner = os.getpid()
            seconds += _START_SECONDS
        helper = _helper
        assert helper.stdin
        assert helper.stdout
        ended = threading.Timer(seconds, helper.kill)
        ended.start()
        try:
            name = os.fsencode(os.path.abspath(path)).replace(b"\n", b"\0")
            helper.stdin.write(b"%d %s\n" % (limit, name))
            helper.stdin.flush()
            answer = helper.stdout.readline()
        except OSError:
            answer = b""
        finally:
            late = not ended.is_alive()
            ended.cancel()
        if answer.strip() == b"done":
            return ""
        _close()
        return f"the HDF5 library {'does not come to an end with it' if late else 'fails on it'}"


def _close() -> None:
    global _helper
    helper, _helper = _helper, None
    if helper is not None and _owner == os.getpid():
        helper.kill()
        with helper:
            pass


atexit.register(_close)


def serve() -> None:
    """Open the files named on standard input in the helper process: a limit in bytes and a path per line."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        limit, _, name = line.partition(b" ")
        limits.set_decoded_bytes(int(limit))
        with contextlib.suppress(Exception):
            _walk(Path(os.fsdecode(name.rstrip(b"\n").replace(b"\0", b"\n"))))
        sys.stdout.write("done\n")
        sys.stdout.flush()


def _walk(path: Path) -> None:
    """Access every array that is not refused in the same way as reading does."""
    with h5py.File(path, "r") as file:
        for key, found in datasets(file, _OBJECTS):
            with contextlib.suppress(UserError):
                check_dataset(path, key, found)
                # For large stacks, only the ends are read: reading the whole stack for every picture would
                # take too long.
                listed = hdf5.chunk_list_bytes(found.shape, found.chunks)
                whole = not found.ndim or found.size * found.dtype.itemsize + listed <= _WHOLE_BYTES
                if not whole and found.chunks:
                    listed = hdf5.chunk_list_bytes(found.shape[1:], found.chunks[1:])
                    limits.check(path, listed, f"the list of chunks of {key}")
                for part in [()] if whole else [0, -1]:
                    found[part]


def follow(group: h5py.Group | h5py.Dataset, key: str) -> Any:
    """Return the object at a path inside a file, or None; soft and external links are not followed."""
    for part in filter(None, key.split("/")):
        if not isinstance(group, h5py.Group) or not isinstance(group.get(part, getlink=True), h5py.HardLink):
            return None
        group = group[part]
    return group


def datasets(
    group: h5py.Group,
    most: int,
    prefix: str = "",
    depth: int = _DEPTH,
) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of a file with their paths, through hard links only.

    The number of arrays and the depth are limited.
    """
    left = most
    for name in group:
        found = follow(group, name) if "/" not in name else None
        if isinstance(found, h5py.Dataset):
            yield prefix + name, found
            left -= 1
        elif isinstance(found, h5py.Group) and depth:
            for pair in datasets(found, left, f"{prefix}{name}/", depth - 1):
                yield pair
                left -= 1
        if left <= 0:
            return


def check_dataset(path: Path, key: str, found: h5py.Dataset) -> None:
    """Refuse an array with external storage, or with chunks that decompress to more than the limit.

    Raises:
        UserError: The array is refused, or its filters are not those of HDF5 itself.
    """
    if found.external or found.is_virtual:
        raise UserError(
            f"{path}: {key!r} is kept in another file; expected a file that holds its own numbers"
        )
    if found.chunks is None:
        return
    chunk = int(found.dtype.itemsize)
    for side in found.chunks:
        chunk *= int(side)
    limits.check(path, 2 * chunk, f"a chunk of {key}")
    packed, whole = found.id.get_storage_size(), path.stat().st_size
    if packed > whole:  # the library allocates what a chunk claims before it looks for it
        raise UserError(
            f"{path}: the chunks of {key!r} claim {packed:,} bytes of a file of {whole:,}; it is damaged"
        )
    # Deflate compresses at most 1,032 to 1, whatever size the chunk declares.
    if found.compression == "gzip" and packed * 1032 > limits.decoded_bytes():
        for number in range(found.id.get_num_chunks()):
            _check_chunk(
                path, key, found.id.read_direct_chunk(found.id.get_chunk_info(number).chunk_offset)[1], chunk
            )


def _check_chunk(path: Path, key: str, packed: bytes, size: int) -> None:
    unpacker, found = zlib.decompressobj(), 0
    while packed and not unpacker.eof:
        found += len(unpacker.decompress(packed, 1 << 20))
        packed = unpacker.unconsumed_tail
        if found > size + 64:
            raise UserError(
                f"{path}: a chunk of {key} unpacks to more than its {size:,} bytes; it is damaged"
            )
