"""Atomic file writes: a new file is written beside the old one and renamed over it."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dapt_jax.errors import UserError


def read(path: Path) -> list[dict[str, Any]]:
    """Read every line of a JSON-lines file; a file that does not exist has no lines.

    Raises:
        UserError: The file cannot be read, or a line is not a JSON object; names the file and the line.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line:  # the part after the last newline
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = getattr(error, "msg", str(error).splitlines()[0])
            raise UserError(
                f"{path}:{number}: not a line of JSON ({what}); delete or mend the line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return rows


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSON-lines file atomically: a reader, or a kill, sees the old file or the new one."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a text file atomically.

    Without `durable`, the new file may be lost if the machine loses power.
    """
    with replacing(path, durable=durable) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that atomically replaces another once the block has ended without an error.

    Args:
        path: The file to replace; its folder is created if missing.
        durable: Whether the new file is flushed to disk before it replaces the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
