"""Reads that hang: a disk that is gone or a network that is down holds a reading thread, and nothing else would say why."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_reads: dict[int, tuple[Path, float]] = {}
"""What every thread is reading now, and since when; each thread writes its own entry."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say that this thread is reading a file inside the `with` block."""
    thread = threading.get_ident()
    _reads[thread] = path, time.monotonic()
    try:
        yield
    finally:
        del _reads[thread]


@contextlib.contextmanager
def told(after_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """Tell of reads that hang inside the `with` block, each once; it cannot end them.

    Args:
        after_s: Seconds after which a read is said to hang; 0: never.
        say: Takes a line, from another thread.
    """
    ended, known = threading.Event(), set[tuple[Path, float]]()

    def look() -> None:
        while not ended.wait(min(after_s / 4, 5.0)):
            for path, since in list(_reads.values()):
                seconds = time.monotonic() - since
                if seconds > after_s and (path, since) not in known:
                    known.add((path, since))
                    say(
                        f"{path}: has been read for {seconds:.0f} s (data.stall_s {after_s:g}): is its "
                        "disk or network gone?"
                    )

    thread = threading.Thread(target=look, name="stalls", daemon=True)
    if after_s:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if after_s:
            thread.join()
