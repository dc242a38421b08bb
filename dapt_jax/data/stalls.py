"""Detection of stalled reads, which block a thread without an error when a disk or network fails."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_reads: dict[int, tuple[Path, float]] = {}
"""File that each thread is reading, and since when; each thread writes its own entry."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Record that this thread is reading a file inside the `with` block."""
    thread = threading.get_ident()
    _reads[thread] = path, time.monotonic()
    try:
        yield
    finally:
        del _reads[thread]


@contextlib.contextmanager
def told(after_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """Report reads that stall inside the `with` block, each once, without ending them.

    Args:
        after_s: Seconds after which a read counts as stalled; 0 never reports.
        say: Function that receives a line, from another thread.
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
