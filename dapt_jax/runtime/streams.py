"""Standard streams that may be closed, narrow, full, or read by a program that has ended."""

import errno
import io
import os
import sys
from typing import TextIO

from dapt_jax.errors import EXIT_CODE, one_line

_UNREAD = (errno.EPIPE, errno.EIO, errno.ENXIO)
"""Errors of a pipe whose reader has ended (`| head -1`), and of a terminal that is gone."""


class _Output(io.FileIO):
    """A stream that drops what nobody can read any more: a study does not end because its log does."""

    is_lost = False

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        """Write bytes; after the reader has ended, drop them."""
        size = memoryview(data).nbytes
        if self.is_lost:
            return size
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in _UNREAD:
                raise
            self.is_lost = True
            return size


def guard() -> None:
    """Make the standard streams of this process safe to print any text to.

    Closed ones are opened on the null device, else the next file opened would take their place. Characters
    that the encoding lacks are escaped.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            os.set_inheritable(opened, True)
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        is_err = name == "stderr"
        stream = io.TextIOWrapper(
            io.BufferedWriter(_Output(number, "w", closefd=False)),  # type: ignore[type-var]
            encoding=before.encoding if before else "utf-8",
            errors="backslashreplace",
            line_buffering=is_err or bool(before and before.line_buffering),
            write_through=bool(before and before.write_through),
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def finish(code: int) -> int:
    """Write out what the standard streams still hold.

    Args:
        code: Exit code so far.

    Returns:
        The exit code; that of a user error if the output was wanted and could not be written.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            raw = getattr(getattr(stream, "buffer", None), "raw", None)
            if isinstance(raw, _Output):
                raw.is_lost = True  # else the interpreter tries again, and fails with a traceback
            if stream is sys.stdout and not code:
                say(f"error: standard output cannot be written ({error.strerror}); make room", sys.stderr)
            code = code or EXIT_CODE
    return code


def say(line: str, file: TextIO | None = None) -> None:
    """Print one line at once, without control characters of names that are in it.

    Args:
        line: The line.
        file: Stream; standard output by default. A standard error that is full is left to the exit code.

    Raises:
        OSError: The stream cannot be written.
    """
    try:
        print(one_line(line), file=file or sys.stdout, flush=True)
    except OSError:
        if file is None or file is not sys.stderr:
            raise
