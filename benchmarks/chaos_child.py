"""Studies of `benchmarks.chaos`: forks of a process that has imported everything, killed at one of their file operations."""

import builtins
import contextlib
import errno
import functools
import io
import json
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = ("before", "inside", "after")
"""A write that is killed inside has written its first half."""

FAILURES = {"ENOSPC": ("open", "mkdir", "write"), "EROFS": ()}
"""Errors of a disk that is full or has become read-only, and the operations that they hit; all if none are named."""

_OF_TWO_PATHS = ("rename", "replace", "link")


@dataclass(frozen=True)
class Kill:
    """A moment at which a study is killed.

    Attributes:
        pattern: Regular expression of the paths of the file operations that count.
        number: Number of the operation among them.
        stage: One of `STAGES`, where "inside" is "before" for operations that are atomic; or one of `FAILURES`,
            with which this and all later operations on such paths fail, and no process is killed.
    """

    pattern: str
    number: int
    stage: str


class Operations:
    """The file operations of this process, each logged, one of which may kill it."""

    def __init__(self, kill: Kill | None):
        """Count from zero."""
        self.log: list[str] = []
        self._kill, self._count, self._lock = kill, 0, threading.RLock()

    @contextlib.contextmanager
    def one(self, name: str, path: object, half: Callable[[], object] | None = None) -> Iterator[None]:
        """Log an operation, run the block, and kill the process where it is the one to be killed at.

        Args:
            name: Name of the operation.
            path: Path of what it changes.
            half: Does half of it.
        """
        with self._lock:
            text = str(os.fspath(path)) if isinstance(path, str | os.PathLike) else str(path)
            self.log.append(f"{name} {text}")
            is_it = self._kill is not None and bool(re.search(self._kill.pattern, text))
            is_it, self._count = is_it and self._count == self._kill.number, self._count + is_it
            if self._kill is not None and self._kill.stage in FAILURES:
                is_past = self._count > self._kill.number and bool(re.search(self._kill.pattern, text))
                if is_past and name in (FAILURES[self._kill.stage] or (name,)):
                    number = getattr(errno, self._kill.stage)
                    raise OSError(number, os.strerror(number), text)
                is_it = False
            if is_it and self._kill.stage != "after":
                if half is not None and self._kill.stage == "inside":
                    half()
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                yield
            finally:
                if is_it:
                    os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Watch the operations of this process from now on."""
        for name in (*_OF_TWO_PATHS, "unlink", "remove", "rmdir", "mkdir"):
            setattr(os, name, self._watched(name, getattr(os, name)))
        fsync, sendfile, opened = os.fsync, os.sendfile, io.open

        def watched_fsync(descriptor: int) -> None:
            with self.one("fsync", _path_of(descriptor)):
                fsync(descriptor)

        def watched_sendfile(target: int, source: int, offset: Any, count: int, *more: Any) -> int:
            with self.one("write", _path_of(target), lambda: sendfile(target, source, offset, 1, *more)):
                return sendfile(target, source, offset, count, *more)

        operations = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                whole = super().write
                with operations.one("write", self.name, lambda: whole(memoryview(data)[: len(data) // 2])):
                    return whole(data)

        def watched_open(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
            is_path = isinstance(file, str | os.PathLike) and not named.get("opener")
            if not is_path or not set(mode) & set("wxa") or "+" in mode or buffering == 0:
                return opened(file, mode, buffering, *more, **named)
            with operations.one("open", file):
                raw = Raw(os.fspath(file), mode.replace("b", "").replace("t", ""))
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *more, **named)

        os.fsync, os.sendfile = watched_fsync, watched_sendfile
        io.open = builtins.open = watched_open  # type: ignore[assignment]

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def watched(path: Any, *more: Any, **named: Any) -> Any:
            folder = _path_of(named["dir_fd"]) if named.get("dir_fd") is not None else ""
            with self.one(name, os.path.join(folder, more[0] if name in _OF_TWO_PATHS else path)):
                return original(path, *more, **named)

        return watched


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def warm_up() -> None:
    """Import what a study imports, without starting XLA, whose threads no fork survives."""
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    import matplotlib.pyplot  # noqa: F401

    from dapt_jax.export import encoders  # noqa: F401
    from dapt_jax.monitoring import heartbeat
    from dapt_jax.runtime import storage
    from dapt_jax.settings import flags  # noqa: F401
    from dapt_jax.study import study

    # A checkpoint and a push at every step.
    study.RunContext = functools.partial(study.RunContext, sync_every_s=0.0)  # type: ignore[misc, assignment]
    heartbeat.BEAT_S = storage.PUSH_S = 0.05
    quicken_report()


def quicken_report() -> None:
    """Leave out what takes time in a report: pictures and resamples."""
    from matplotlib.figure import Figure
    from PIL import Image

    from dapt_jax.report import predictions

    def one_pixel(figure: Figure, target: Any, *_: Any, **__: Any) -> None:
        Image.new("L", (1, 1)).save(target, "PNG")

    predictions.RESAMPLES = 10
    Figure.savefig = one_pixel  # type: ignore[method-assign]
    Figure.draw_without_rendering = lambda self: None  # type: ignore[method-assign]


def start(
    arguments: Sequence[str],
    xla: Path,
    log: Path,
    environment: Mapping[str, str] | None = None,
    kill: Kill | None = None,
) -> int:
    """Start a command in a fork of this process.

    Args:
        arguments: Command-line arguments, without the program's name.
        xla: Folder of compiled programs.
        log: File of what it prints; one beside it, with the suffix .json, lists its file operations.
        environment: Additional environment variables.
        kill: Moment at which it is killed.

    Returns:
        The process id.
    """
    if (pid := os.fork()) != 0:
        return pid
    code = 70
    try:
        os.environ.update(environment or {})
        import jax

        jax.config.update("jax_compilation_cache_dir", str(xla))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(xla)  # `main.set_up_jax` leaves it then
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(written, 1)
        os.dup2(written, 2)
        from dapt_jax.main import main

        operations = Operations(kill)
        operations.watch()
        code = main(["dapt_jax", *arguments])
        descriptor = os.open(log.with_suffix(".json"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.write(descriptor, json.dumps(operations.log).encode())
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def fault(code: int, said: str) -> str:
    """Return what is wrong with how a command ended, by its exit code and what it said; empty for nothing."""
    if "Traceback" in said:
        return "a traceback: " + said.strip().splitlines()[-1][:200]
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == 2 and not lines:
        return "exit code 2 without a line"
    return "" if code in (0, 2) else f"exit code {code}: {said[-200:]}"
