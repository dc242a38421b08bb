"""A lock on a workdir, so that one study at a time runs in it, on disks, network file systems and buckets.

The lock is a file that names its holder and that the holder renews. The system's own locks (flock) are not
used: network file systems and buckets have none to rely on. A lock that a killed process has left is
recognised, on the same machine, by a process number that is free or has another start time, and elsewhere by
a lock that is not renewed while another process watches it: no clocks are compared, since those of two
machines differ and may be set back.
"""

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from fsspec import AbstractFileSystem

from dapt_jax.errors import EXIT_CODE, UserError, one_line

LOCK = "study.lock"
"""Name of the lock in a workdir."""

RENEW_S = 5.0
"""Seconds between two renewals of a lock."""

STALE_S = 60.0
"""Seconds without renewal after which the lock of another machine counts as left behind."""

_READS = 3

SETTLE_S = 0.5
"""Seconds after which a lock that was written without exclusion is read again: the last writer has it."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        host: Name of its machine.
        pid: Process number.
        started: Start of the study, as text in UTC.
        process: What identifies the process among all that this machine ever had: boot, process namespace,
            number and start time. Empty where the system does not say.
        token: Random text, new for each start of a study.
        renewals: Number of times that the lock was renewed.
    """

    host: str
    pid: int
    started: str
    process: str
    token: str
    renewals: int = 0

    @classmethod
    def this_process(cls) -> "Holder":
        """Return the holder of a new lock."""
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        return cls(socket.gethostname(), os.getpid(), started, _identity(os.getpid()), secrets.token_hex(8))

    @classmethod
    def from_bytes(cls, content: bytes) -> "Holder | None":
        """Return the holder that a file names; None for a file without one."""
        try:
            values = json.loads(content)
            found = cls(**values)
        except (ValueError, TypeError, RecursionError):
            return None
        defaults = vars(cls("", 0, "", "", ""))
        return (
            found if all(type(value) is type(defaults[name]) for name, value in vars(found).items()) else None
        )

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        return (json.dumps(dataclasses.asdict(self)) + "\n").encode()

    @property
    def is_alive(self) -> bool | None:
        """Whether the process lives; None where this machine cannot know."""
        machine, _, _ = self.process.rpartition(":")
        here, _, _ = _identity(os.getpid()).rpartition(":")
        if not machine or machine != here:
            return None
        return _identity(self.pid) == self.process


def _identity(pid: int) -> str:
    """Return what identifies a living process of this machine; empty for none, or an unknown system.

    `BOOT:NAMESPACE:START`: containers on one machine may share its name, and not its process numbers.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        state, *after = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else f"{boot}:{namespace}:{after[18]}"


class LockFile(Protocol):
    """Where a lock is stored."""

    def read(self) -> bytes | None:
        """Return the content, or None if there is no lock."""

    def create(self, content: bytes) -> bool:
        """Write a lock where there is none; return False if there is one."""

    def replace(self, content: bytes) -> None:
        """Write a lock over another."""

    def remove(self) -> None:
        """Remove the lock."""


class LocalLockFile:
    """A lock in a folder, which may be on a network file system."""

    def __init__(self, folder: Path):
        """Name the file; write nothing.

        Args:
            folder: The workdir.
        """
        self._path = folder / LOCK
        self._is_new = False

    def read(self) -> bytes | None:
        """Return the content, or None if there is no lock."""
        try:
            return self._path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def create(self, content: bytes) -> bool:
        """Write a lock where there is none, with its content at once; return False if there is one."""
        self._is_new = not self._path.parent.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._written(content) as own:
            try:
                os.link(own, self._path)
            except FileExistsError:
                return False
            except OSError as error:  # a file system without hard links
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                    raise
                if self._path.exists():
                    return False
                own.rename(self._path)
        return True

    def replace(self, content: bytes) -> None:
        """Write a lock over another."""
        with self._written(content) as own:
            own.rename(self._path)

    def remove(self) -> None:
        """Remove the lock, and a folder that was made for it and that nothing else was written to."""
        self._path.unlink(missing_ok=True)
        if self._is_new:
            with contextlib.suppress(OSError):
                self._path.parent.rmdir()

    @contextlib.contextmanager
    def _written(self, content: bytes) -> Iterator[Path]:
        own = self._path.with_name(f".{LOCK}-{secrets.token_hex(4)}.partial")
        try:
            own.write_bytes(content)
            yield own
        finally:
            own.unlink(missing_ok=True)


class RemoteLockFile:
    """A lock in a bucket: whoever has written last has it."""

    def __init__(self, files: AbstractFileSystem, root: str):
        """Name the file; write nothing.

        Args:
            files: The file system.
            root: Path of the workdir in it.
        """
        self._files, self._path = files, f"{root}/{LOCK}"

    def read(self) -> bytes | None:
        """Return the content, or None if there is no lock."""
        try:
            return self._files.cat_file(self._path)
        except FileNotFoundError:
            return None

    def create(self, content: bytes) -> bool:
        """Write a lock where there is none; return False if there is one."""
        if self.read() is not None:
            return False
        self._files.makedirs(self._path.rpartition("/")[0], exist_ok=True)
        self._files.pipe_file(self._path, content)
        time.sleep(SETTLE_S)
        return self.read() == content

    def replace(self, content: bytes) -> None:
        """Write a lock over another."""
        self._files.pipe_file(self._path, content)

    def remove(self) -> None:
        """Remove the lock."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path)


@contextlib.contextmanager
def held(
    file: LockFile, place: str, say: Callable[[str], None], lost: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold a lock during the block; take over one whose holder is gone.

    Args:
        file: The lock.
        place: The workdir, for lines.
        say: Function that receives a line for the user.
        lost: Called from another thread, with a line, if another process has taken the lock over, because
            this one was suspended for longer than `STALE_S`; by default it ends this process with code 2,
            since two would write the same files.

    Raises:
        UserError: A study runs in the workdir: names host, process and start; or the lock cannot be written.
    """
    own = Holder.this_process()
    try:
        _acquire(file, own, place, say)
    except UserError:
        raise
    except Exception as error:  # each file system has its own errors
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{place}: cannot be written to ({why}); expected another --workdir") from error
    ended = threading.Event()
    thread = threading.Thread(
        target=_renew, args=(file, own, place, ended, lost or _end), name="lock", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):
            if (found := file.read()) is not None and _is_of(found, own):
                file.remove()


def _acquire(file: LockFile, own: Holder, place: str, say: Callable[[str], None]) -> None:
    while not file.create(own.to_bytes()):
        content = _settled(file)
        if content is None or _is_of(content, own):
            continue
        holder = Holder.from_bytes(content)
        is_alive = holder.is_alive if holder else None
        if is_alive is None:
            is_alive = _is_renewed(file, content, f"{place}: {_who(holder)}", say)
        if is_alive:
            raise UserError(
                f"{place}: {_who(holder)} runs a study here; expected to wait until it has ended, or another "
                "--workdir"
            )
        if file.read() != content:  # another process was quicker
            continue
        file.replace(own.to_bytes())
        time.sleep(SETTLE_S)
        if (found := file.read()) is not None and _is_of(found, own):
            say(f"{place}: the lock of {_who(holder)} was left behind; taken over")
            return


def _settled(file: LockFile) -> bytes | None:
    """Return the content; where it names no holder, perhaps read while it was written, that of a later read."""
    content = file.read()
    for _ in range(_READS - 1):
        if content is None or Holder.from_bytes(content):
            break
        time.sleep(SETTLE_S)
        content = file.read()
    return content


def _is_renewed(file: LockFile, content: bytes, what: str, say: Callable[[str], None]) -> bool:
    """Watch the lock of another machine; return whether it changes within `STALE_S`."""
    deadline, is_said = time.monotonic() + STALE_S, False
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, RENEW_S / 5))
        if file.read() != content:
            return True
        if not is_said and left < STALE_S - 2 * RENEW_S:
            say(
                f"{what} holds the lock from elsewhere: taken over after {STALE_S:g} s without a sign of life"
            )
            is_said = True
    return False


def _renew(
    file: LockFile, own: Holder, place: str, ended: threading.Event, lost: Callable[[str], None]
) -> None:
    number = 0
    while not ended.wait(RENEW_S):
        number += 1
        with contextlib.suppress(Exception):  # a storage that cannot be reached now
            found = file.read()
            if found is not None and not _is_of(found, own):
                lost(f"{place}: {_who(Holder.from_bytes(found))} has taken the lock over; this one ends")
                return
            file.replace(dataclasses.replace(own, renewals=number).to_bytes())


def _is_of(content: bytes, own: Holder) -> bool:
    holder = Holder.from_bytes(content)
    return holder is not None and holder.token == own.token


def _who(holder: Holder | None) -> str:
    """Return a holder in words."""
    if holder is None:
        return "another process"
    return one_line(f"process {holder.pid} on {holder.host}, started {holder.started},")


def _end(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)
