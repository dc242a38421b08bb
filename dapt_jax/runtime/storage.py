"""Remote workdirs and data (`gs://`, `s3://`, anything that fsspec opens), accessed through a local copy.

A study writes its files atomically, and resumes from whatever a kill leaves. A copy that is a few seconds
old, or incomplete, is therefore one more state to resume from; the newer checkpoint is uploaded before the
older one is deleted.
"""

import contextlib
import functools
import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dapt_jax.errors import UserError, one_line, redact
from dapt_jax.runtime import atomic_files, home, lock, safe_paths, streams, user_cache

PUSH_S = 10.0
"""Seconds between two checks for changes."""

_STAYS = ("cache/", lock.LOCK)
"""What is not copied of a workdir: activations are recomputed elsewhere, and each place has its own lock."""

_READS = ("status", "plan", "data")
"""Modes for which only records are downloaded."""

_RECORDS = ("status.json", "config.json", "results.jsonl", "ledger.jsonl", "weights.txt")

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}


def is_url(place: str) -> bool:
    """Return whether a place is a URL instead of a path."""
    return "://" in place


class Mirror:
    """A local folder and its remote copy."""

    def __init__(self, url: str, folder: Path):
        """Open the file system; copy nothing yet.

        Args:
            url: URL of the remote folder.
            folder: The local folder.

        Raises:
            UserError: The kind of storage is unknown, or its package is missing.
        """
        scheme, self._shown = url.partition("://")[0], redact(url)
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            hint = f"expected pip install 'dapt_jax[{extra}]'" if extra else f"expected its package ({error})"
            raise UserError(f"{url} needs a package for {scheme}:// that is not installed; {hint}") from error
        except ValueError as error:
            raise UserError(
                f"{url}: {error}; expected a path, gs://, s3:// or another that fsspec knows"
            ) from error
        except Exception as error:  # a missing or damaged archive: each file system has its own errors
            raise UserError(f"{url}: cannot be opened ({_told(error)})") from error
        self.url, self.folder = url, folder
        self._root = self._root.rstrip("/")
        self._pushed: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def pull(self, *names: str) -> None:
        """Make the local folder equal to the remote one; leave it unchanged if the remote one is empty.

        Args:
            names: Names of the files to copy; all if none is given, and other local files are then removed.

        Raises:
            UserError: The remote folder cannot be read, or holds a file that cannot be one of the local
                folder.
        """
        there = {name: size for name, size in self.there().items() if not _stays(name)}
        wanted = {name: there[name] for name in names or there if name in there}
        targets = {name: safe_paths.below(self.folder, name, self._shown) for name in wanted}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            safe_paths.check_together(wanted, self.folder, self._shown)
            room = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror})") from error
        if (size := sum(wanted.values())) > room:
            raise UserError(f"{self.url}: {size:,} bytes, and {room:,} are free in {self.folder}; make room")
        for name, here in targets.items():
            digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
            partial = here.with_name(f".{digest}.partial")  # the name's own length may be the limit
            try:
                here.parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(f"{self._root}/{name}" if self._root else name, str(partial))
                partial.replace(here)
                self._pushed[name] = _mark(here)
            except Exception as error:  # each file system has its own errors
                partial.unlink(missing_ok=True)
                raise UserError(f"{self.url}: {name} cannot be read ({_told(error)})") from error
        if there and not names:
            for path in _files_of(self.folder):
                if (name := path.relative_to(self.folder).as_posix()) not in there and not _stays(name):
                    path.unlink()

    def there(self) -> dict[str, int]:
        """Return the sizes in bytes of the remote files, by their path relative to the folder; see `listed`."""
        return {name: int(about.get("size") or 0) for name, about in self.listed().items()}

    def listed(self) -> dict[str, dict[str, Any]]:
        """Return what the file system tells of the remote files, by their path relative to the folder.

        Raises:
            UserError: The remote folder cannot be read, or lists a name that leads out of it.
        """
        try:
            found = self._files.find(self._root, detail=True) if self._files.exists(self._root) else {}
        except Exception as error:  # each file system has its own errors
            raise UserError(
                f"{self.url}: cannot be read ({_told(error)}); do the credentials reach that far?"
            ) from error
        listed = {}
        # The root of a file system is "", below which some list "/a" and some "a".
        slash = "/" if self._root or all(path.startswith("/") for path in found) else ""
        for path, about in found.items():
            if not path.startswith(self._root):
                raise UserError(f"{self.url}: lists {path[:80]!r}, which is not below it")
            name = path[len(self._root) :].removeprefix(slash)
            if not name or (name.endswith("/") and not about.get("size")):  # a mark of a folder
                continue
            safe_paths.check(name, self._shown)
            listed[name] = about
        return listed

    @property
    def lock_file(self) -> lock.RemoteLockFile:
        """The lock of the remote folder."""
        return lock.RemoteLockFile(self._files, self._root)

    def push(self) -> None:
        """Upload local changes, then delete remotely what was deleted locally, in this order.

        A kill between any two files leaves a remote folder to resume from: `_rank` gives the order, files of
        one rank go in the order in which they were written, and while the study writes on, what says that
        something is finished is read before what it depends on is listed.

        What has not been sent when an upload fails is sent by the next start: see `resume`.

        Raises:
            UserError: A local file is a link, which may lead out of the folder.
        """
        with self._lock:
            try:
                self._push()
            except Exception:
                with contextlib.suppress(OSError):
                    atomic_files.write_text(self._unsent, json.dumps(self._pushed))
                raise
            self._unsent.unlink(missing_ok=True)

    def resume(self) -> bool:
        """Take the local folder as it is if an upload failed last and the remote folder has not changed since.

        Returns:
            Whether that is so; otherwise the remote folder counts, and `pull` takes it.
        """
        try:
            pushed = {str(name): (int(mark[0]), int(mark[1])) for name, mark in _json(self._unsent).items()}
            here = {name: _mark(self.folder / name) for name in self._names()}
        except (OSError, ValueError, TypeError, AttributeError, IndexError, KeyError):
            return False
        there = {name: size for name, size in self.there().items() if not _stays(name)}
        absent = (0, -1)
        for name in {*there, *pushed}:
            # What was being sent or removed may be as it was before, or as it is now.
            either = pushed.get(name, absent)[1], here.get(name, absent)[1]
            if there.get(name, absent[1]) not in either:
                return False
        self._pushed = {name: mark for name, mark in pushed.items() if there.get(name) == mark[1]}
        self._pushed |= {name: (0, 0) for name in there if name not in self._pushed}
        return True

    @property
    def _unsent(self) -> Path:
        """The file that says what had been sent when an upload failed; absent after one that did not."""
        return self.folder.with_name(f"{self.folder.name}.unsent.json")

    def _push(self) -> None:
        shown = self._names()
        results = self._results()
        finished = self._names()
        listed = {_FINISHED: finished, _SHOWN: shown}
        here, seen = dict[str, tuple[int, int]](), set[str]()
        for path in _files_of(self.folder):
            name = path.relative_to(self.folder).as_posix()
            if _stays(name):
                continue
            seen.add(name)
            if name not in listed.get(_rank(name), {name}):
                continue
            safe_paths.below(self.folder, name, self.folder)
            with contextlib.suppress(FileNotFoundError):  # replaced or removed during the scan
                here[name] = _mark(path)
        here.pop(RESULTS, None)
        if results:
            here[RESULTS] = results[0]
        is_whole = seen == finished
        for name, mark in sorted(here.items(), key=lambda item: (_rank(item[0]), item[1])):
            if self._pushed.get(name) != mark:
                try:
                    self._put(name, results[1] if results and name == RESULTS else None)
                    self._pushed[name] = mark
                except FileNotFoundError:
                    is_whole = False
        # While the study writes, what has replaced a removed file may not have been sent.
        for name in [name for name in self._pushed if is_whole and name not in here]:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(f"{self._root}/{name}")
            del self._pushed[name]

    def _names(self) -> set[str]:
        names = (path.relative_to(self.folder).as_posix() for path in _files_of(self.folder))
        return {name for name in names if not _stays(name)}

    def _results(self) -> tuple[tuple[int, int], bytes] | None:
        """Return the mark and the content of the results; None where there are none."""
        try:
            mark = _mark(self.folder / RESULTS)
            return mark, (self.folder / RESULTS).read_bytes()
        except FileNotFoundError:
            return None

    def _put(self, name: str, content: bytes | None = None) -> None:
        target = f"{self._root}/{name}"
        if isinstance(self._files, LocalFileSystem):
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
        if content is None:
            self._files.put_file(str(self.folder / name), target)
        else:
            self._files.pipe_file(target, content)


RESULTS = "results.jsonl"
"""Name of the results in a workdir: an arm that is in them does not run again."""

_FINISHED, _SHOWN = 3, 5
"""Ranks of files that say that something is finished, and of what shows results."""


def _rank(name: str) -> int:
    """Return the place of a file of a workdir in the order of uploads: after what it depends on.

    The ledger goes first: one that is newer than the checkpoints gets its rows replaced on resume, and rows
    of one that is older would be missing.
    """
    if name == "config.json":
        return 0
    if name in ("weights.txt", "leaks.json", "ledger.jsonl"):
        return 1
    if name == RESULTS:
        return 4
    if name in ("report.html", "report.md", "status.json"):
        return _SHOWN
    is_finished = name.endswith("/adapted.safetensors") or name.startswith("checkpoints/halving-")
    return _FINISHED if is_finished else 2


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _mark(path: Path) -> tuple[int, int]:
    """Return the values whose change marks a file as modified."""
    about = path.stat()
    return about.st_mtime_ns, about.st_size


def _files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(str(error))[:200]}" if str(error) else type(error).__name__


def _stays(name: str) -> bool:
    is_unfinished = name.endswith(".partial") or ".orbax-checkpoint-tmp" in name
    return is_unfinished or name.startswith(_STAYS)


def _copy_of(url: str, kind: str) -> Path:
    url = url.rstrip("/")
    digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    return user_cache.folder(kind) / f"{safe_paths.clean(redact(url).rpartition('/')[2], 'copy')}-{digest}"


@contextlib.contextmanager
def workdir(place: str | None, mode: str, say: Callable[[str], None] | None = None) -> Iterator[Path | None]:
    """Yield the local folder to work in: the place itself, or a local copy that is kept in sync.

    Args:
        place: Path or URL of a workdir, or None.
        mode: Mode of the command: "run" holds the lock of the remote folder; the others work in another
            local copy, those of `_READS` in one of records alone.
        say: Function that receives a line, from another thread; prints to standard error by default.

    Raises:
        UserError: The place cannot be read or written.
    """
    if place is None or not is_url(place):
        # Shells leave the ~ of --workdir=~/runs as it is, and a folder of that name is one that people lose.
        yield home.expanded(place) if place else None
        return
    say = say or (lambda line: streams.say(line, sys.stderr))
    mirror = Mirror(place, _copy_of(place, "workdirs"))
    if mode == "run":
        with lock.held(mirror.lock_file, redact(place), say):
            if mirror.resume():
                say(f"{mirror.url}: what could not be sent before is sent now")
            else:
                mirror.pull()
            yield from _pushed_on(mirror, say)
        return
    # A study may be running in the copy of this machine.
    mirror.folder = mirror.folder.with_name(f"{mirror.folder.name}.{mode}")
    shutil.rmtree(mirror.folder, ignore_errors=True)
    mirror.pull(*(_RECORDS if mode in _READS else ()))
    yield from _pushed_on(mirror, say)


def _pushed_on(mirror: Mirror, say: Callable[[str], None]) -> Iterator[Path]:
    """Yield the local folder, and upload what changes in it until it is given back."""
    ended = threading.Event()
    pusher = threading.Thread(target=_push_on, args=(mirror, ended, say), name="storage", daemon=True)
    pusher.start()
    try:
        yield mirror.folder
    finally:
        is_ending_well = sys.exc_info()[1] is None
        ended.set()
        pusher.join()
        try:
            mirror.push()
        except Exception as error:  # each file system has its own errors
            line = (
                f"{mirror.url}: cannot be written ({_told(error)}); the study's files are in {mirror.folder}"
            )
            if is_ending_well:
                raise UserError(f"{line}, and the same command sends them") from error
            say(line)


def _push_on(mirror: Mirror, ended: threading.Event, say: Callable[[str], None]) -> None:
    failed = False
    while not ended.wait(PUSH_S):
        try:
            mirror.push()
            failed = False
        except Exception as error:  # each file system has its own errors
            if not failed:
                say(f"{mirror.url}: cannot be written now ({error}); tried again every {PUSH_S:g} s")
            failed = True


_VERSION = (
    "etag", "ETag", "generation", "md5Hash", "CRC", "last_modified", "LastModified", "updated", "mtime", "created"
)  # fmt: skip
"""What file systems tell of a file that changes with its content, by the names of S3, Google, Azure, disks, archives."""


def _version(about: Mapping[str, Any]) -> str:
    """Return what tells one content of a remote file from another."""
    told = [str(about.get("size")), *(f"{name}={about[name]}" for name in _VERSION if name in about)]
    return hashlib.blake2b(" ".join(told).encode(), digest_size=8).hexdigest()


@functools.cache
def data(place: str) -> str:
    """Return a local folder of data: the place itself, or a local copy that later studies reuse.

    What has changed there since (a label that was mended leaves the size of a manifest) is copied again, and what
    was removed there is removed here. Of a file system that tells nothing but sizes, they decide.

    Raises:
        UserError: The place cannot be read, or is empty.
    """
    if not is_url(place):
        return place
    folder = _copy_of(place, user_cache.DATA)
    mirror = Mirror(place, folder)
    listed = mirror.listed()
    if not listed:
        raise UserError(
            f"data_dir {place}: nothing is there; expected a folder with the manifest and its images"
        )
    wanted = {name: _version(about) for name, about in listed.items()}
    record = folder.with_name(f"{folder.name}.files.json")
    try:
        known = dict(_json(record))
    except (OSError, ValueError, TypeError):
        known = {}
    here = {name: path for name in wanted if (path := safe_paths.below(folder, name, place)).exists()}
    changed = [name for name in here if known.get(name) != wanted[name]]
    missing = [
        name
        for name, about in listed.items()
        if name not in here or here[name].stat().st_size != int(about.get("size") or 0)
    ]
    if copied := {*changed, *missing}:
        streams.say(f"data_dir {place}: copying {len(copied)} of {len(wanted)} files to {folder}")
    if changed:
        mirror.pull(*changed)
    for name in known.keys() - wanted.keys():
        safe_paths.below(folder, name, place).unlink(missing_ok=True)
    # Before what is missing: a copy that is interrupted goes on with the files that are not here.
    if known != wanted:
        atomic_files.write_text(record, json.dumps(wanted))
    if missing := [name for name in missing if name not in changed]:
        mirror.pull(*missing)
    return str(folder)
