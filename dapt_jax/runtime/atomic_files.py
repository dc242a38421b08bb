"""JSON-lines files that a kill cannot tear."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dapt_jax.errors import UserError


def read(path: Path) -> list[dict[str, Any]]:
    """Reads every line of a JSON-lines file; a file that does not exist has no lines.

    Raises:
        UserError: a line is not a JSON object; names the file and the line.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not a line of JSON ({error.msg}); delete or mend the line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return rows


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a JSON-lines file in one atomic step: a reader, or a kill, sees the old file or the new one."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replaces a text file in one atomic step; without `durable`, a machine that loses power may lose the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    partial.replace(path)
