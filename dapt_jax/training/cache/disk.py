"""Activations on disk, beyond the memory budget and across starts of a study.

An entry is a folder named by its key: zarr arrays [views, n, ...], sharded, one chunk with a CRC-32C per view
and image, which allows random reads and detects damage; and `entry.json`, written last, which marks
the entry as complete. A fill that was killed resumes after the last complete shard.
"""

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jaxtyping import PyTree

from dapt_jax.cost.memory import tree_bytes
from dapt_jax.runtime import atomic_files, safe_paths

FORMAT = 1
SHARD_BYTES = 64 << 20
DONE = "entry.json"
_PROGRESS = "progress.json"
_ATTEMPTS = 5
"""Times that an entry is filled, or read, before the failure is raised: another study may evict it at any moment."""
_READ_AT_ONCE = 3
"""Entries that a phase reads: its views, a teacher's targets, and the plain images that it is evaluated on."""

Fill = Callable[[int], Iterator[Any]]
"""From the first missing image to pytrees of arrays [views, k, ...], in order, up to the last."""


class DiskCache:
    """The entries below a folder."""

    def __init__(self, folder: Path, budget: int, say: Callable[[str], None], shard_bytes: int = SHARD_BYTES):
        """Create the folder.

        Args:
            folder: Folder of the entries; may be shared by studies and processes.
            budget: Bytes of all entries together; the least recently used are evicted first.
            say: Function that receives a line about lost data.
            shard_bytes: Bytes of a shard, the largest amount lost by a kill.

        Raises:
            OSError: The folder cannot be created or written to.
        """
        self._folder, self._budget, self._say, self._shard_bytes = folder, budget, say, shard_bytes
        self._in_use: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)  # another thread of this process may have probed as well

    def find(self, key: str) -> "CacheEntry | None":
        """Return the entry of a key if it is complete; a damaged one is removed and reported."""
        path = self._folder / key
        if not path.exists():
            return None
        try:
            entry = CacheEntry(path)
            os.utime(path / DONE)
        except (ValueError, OSError, KeyError, TypeError) as error:
            self._say(
                f"cached activations {path.name[:12]} are damaged ({_first_line(error)}); computed again"
            )
            shutil.rmtree(path, ignore_errors=True)
            return None
        self._use(key)
        return entry

    def fill(
        self,
        key: str,
        shapes: PyTree[jax.ShapeDtypeStruct],
        views: int,
        images: int,
        fill: Fill,
        about: Mapping[str, Any],
    ) -> "CacheEntry":
        """Complete an entry and return it; wait if another process is filling it.

        Args:
            key: Key of the entry.
            shapes: Shapes of one image's activations, a pytree of `jax.ShapeDtypeStruct`.
            views: Views per image.
            images: Number of images.
            fill: Function that computes activations.
            about: JSON values to store with the entry.

        Raises:
            OSError: The disk is full, or the folder is no longer writable; partial data are removed.
        """
        for attempt in range(_ATTEMPTS):
            self._use(key)
            with _lock(self._folder / f"{key}.lock"):
                found = self.find(key)
                if found is not None:
                    return found
                self._fill(key, shapes, views, images, fill, about)
            try:
                return CacheEntry(self._folder / key)
            except (OSError, ValueError) as error:  # another study with less room has evicted it already
                if attempt == _ATTEMPTS - 1:
                    raise OSError(_first_line(error)) from error
        raise AssertionError

    def _fill(
        self,
        key: str,
        shapes: PyTree[jax.ShapeDtypeStruct],
        views: int,
        images: int,
        fill: Fill,
        about: Mapping[str, Any],
    ) -> None:
        partial = self._folder / f"{key}.partial"
        try:
            self._make_room(views * images * tree_bytes(shapes))
            per_shard = max(1, min(images, self._shard_bytes // (views * tree_bytes(shapes))))
            seconds = _write(partial, shapes, views, images, fill, per_shard)
            whole = {**about, "seconds": seconds, **_describe(partial, shapes, views, images)}
            atomic_files.write_text(partial / DONE, json.dumps(whole))
            (partial / _PROGRESS).unlink(missing_ok=True)
            partial.rename(self._folder / key)
        except (OSError, ValueError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise
            raise OSError(_first_line(error)) from error  # tensorstore raises ValueError for a full disk

    def drop(self, key: str) -> None:
        """Remove an entry."""
        shutil.rmtree(self._folder / key, ignore_errors=True)

    def _use(self, key: str) -> None:
        """Mark an entry as in use; the most recently marked ones are never evicted."""
        self._in_use = [*(other for other in self._in_use if other != key), key][-_READ_AT_ONCE:]

    def _make_room(self, size: int) -> None:
        """Evict entries until `size` more bytes fit the budget."""
        entries = (path / DONE for path in self._folder.iterdir() if not path.name.endswith(".partial"))
        found = sorted(_used(path) for path in entries if path.is_file())
        sizes = {path: size for _, path, size in found if size}
        for path in [each for each in sizes if each.name not in self._in_use]:
            if sum(sizes.values()) + size <= self._budget:
                break
            shutil.rmtree(path, ignore_errors=True)
            del sizes[path]
        used = sum(sizes.values())
        if used + size > self._budget:
            raise OSError(f"{(used + size) >> 20} MiB exceed the budget of {self._budget >> 20} MiB")
        free = shutil.disk_usage(self._folder).free
        if size > free:
            raise OSError(f"{size >> 20} MiB are needed and {free >> 20} MiB are free")


class CacheEntry:
    """A complete entry, open for reading."""

    def __init__(self, path: Path):
        """Open the entry and check the size of every shard; chunks are checked when they are read.

        Raises:
            ValueError, OSError, KeyError, TypeError: The entry is damaged.
        """
        self.path = path
        self.about: dict[str, Any] = json.loads((path / DONE).read_text(encoding="utf-8"))
        if self.about["format"] != FORMAT:
            raise ValueError(f"format {self.about['format']}")
        for name, size in self.about["files"].items():
            if safe_paths.below(path, name, path).stat().st_size != size:
                raise ValueError(f"{name} is cut short")
        self._arrays = [_open(path / str(number)) for number in range(self.about["leaves"])]

    def read(self, view: int, rows: np.ndarray) -> list[np.ndarray]:
        """Return the leaves of the activations of some rows in one view, each [k, ...]; thread-safe.

        Raises:
            ValueError: A chunk does not match its checksum.
            OSError: A file cannot be read.
        """
        futures = [array[view][np.asarray(rows, np.int64)].read() for array in self._arrays]
        return [np.asarray(future.result()) for future in futures]


def _write(
    path: Path, shapes: PyTree[jax.ShapeDtypeStruct], views: int, images: int, fill: Fill, per_shard: int
) -> float:
    """Write complete shards, resuming an earlier attempt; return the seconds of all attempts."""
    begun = time.monotonic()
    leaves = jax.tree.leaves(shapes)
    plan = {"per_shard": per_shard, "views": views, "images": images}
    done, spent = 0, 0.0
    with contextlib.suppress(OSError, ValueError, KeyError):
        before = json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
        if {name: before[name] for name in plan} == plan:
            done, spent = before["done"], before["seconds"]
    if not done:
        shutil.rmtree(path, ignore_errors=True)
    arrays = [
        _open(path / str(number)) if done else _create(path / str(number), leaf, views, images, per_shard)
        for number, leaf in enumerate(leaves)
    ]
    waiting: list[list[np.ndarray]] = [[] for _ in leaves]
    held, start = 0, done
    for part in fill(done) if done < images else ():
        for parts, leaf in zip(waiting, jax.tree.leaves(part), strict=True):
            parts.append(np.asarray(leaf))
        held += waiting[0][-1].shape[1]
        while held >= per_shard or (held and start + held == images):
            count = min(per_shard, held)
            for array, parts in zip(arrays, waiting, strict=True):
                whole = np.concatenate(parts, 1)
                array[:, start : start + count].write(
                    whole[:, :count].astype(array.dtype.numpy_dtype)
                ).result()
                parts[:] = [whole[:, count:]]
            start, held = start + count, held - count
            progress = {**plan, "done": start, "seconds": spent + time.monotonic() - begun}
            atomic_files.write_text(path / _PROGRESS, json.dumps(progress))
    return spent + time.monotonic() - begun


def _describe(path: Path, shapes: PyTree[jax.ShapeDtypeStruct], views: int, images: int) -> dict[str, Any]:
    files = [file for file in path.rglob("*") if file.is_file() and file.name != _PROGRESS]
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in files}
    leaves = len(jax.tree.leaves(shapes))
    return {"format": FORMAT, "leaves": leaves, "views": views, "images": images, "files": sizes}


def _create(
    path: Path, leaf: jax.ShapeDtypeStruct, views: int, images: int, per_shard: int
) -> ts.TensorStore:
    tail = list(leaf.shape)
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    checked = [little, {"name": "crc32c"}]
    shard = {"chunk_shape": [1, 1, *tail], "codecs": checked, "index_codecs": checked}
    metadata = {
        "shape": [views, images, *tail],
        "data_type": np.dtype(leaf.dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, per_shard, *tail]}},
        "codecs": [{"name": "sharding_indexed", "configuration": shard}],
    }
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}, "metadata": metadata}
    # All-zero chunks (a ReLU of a black image) are written too: a missing chunk must mean damage.
    return ts.open(
        {**spec, "store_data_equal_to_fill_value": True}, create=True, delete_existing=True
    ).result()


def _open(path: Path) -> ts.TensorStore:
    # Another study that shares the folder may remove a shard; by default that reads as zeros.
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "fill_missing_data_reads": False,
    }
    return ts.open(spec, read=True, write=True).result()


def _used(done: Path) -> tuple[float, Path, int]:
    """Return when an entry was last used, its folder, and its bytes; 0 for one just removed."""
    try:
        return (
            done.stat().st_mtime,
            done.parent,
            sum(json.loads(done.read_text(encoding="utf-8"))["files"].values()),
        )
    except (OSError, ValueError, KeyError):
        return 0.0, done.parent, 0


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the system releases it when the process dies."""
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


class SelfHealingReader:
    """A reader that recomputes a damaged entry, in one thread."""

    def __init__(self, entry: CacheEntry, again: Callable[[], CacheEntry], say: Callable[[str], None]):
        self._entry, self._again, self._say = entry, again, say
        self._lock = threading.Lock()

    def read(self, view: int, rows: np.ndarray) -> list[np.ndarray]:
        """Return activations: see `CacheEntry.read`; the failure after the last attempt is raised."""
        for _ in range(_ATTEMPTS):
            entry = self._entry
            try:
                return entry.read(view, rows)
            except (ValueError, OSError) as error:
                with self._lock:
                    if self._entry is entry:
                        self._say(f"cached activations are damaged ({_first_line(error)}); computed again")
                        self._entry = self._again()
        return self._entry.read(view, rows)
