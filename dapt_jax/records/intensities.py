"""How the images of each set got their intensity range: `WORKDIR/intensities.json`.

The file holds, by the name of a set ("corpus", "TASK SPLIT"), the rows of `Dataset.intensity_summary`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dapt_jax.records import typed
from dapt_jax.runtime import atomic_files

FILE = "intensities.json"
_ENDS = typed.Kind(
    "two numbers",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(typed.NUMBER.allows, value)),
)
_ROW = {
    "origin": typed.TEXT,
    "images": typed.COUNT,
    "low": _ENDS,
    "high": _ENDS,
    "example": typed.TEXT,
}


def write(workdir: Path, by_set: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the rows of every set."""
    atomic_files.write_text(workdir / FILE, json.dumps(by_set, indent=1) + "\n")


def read(workdir: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every set; empty for a study of an earlier version.

    Raises:
        UserError: The file is damaged; names the set, the key and the value.
    """
    path = workdir / FILE
    if not path.exists():
        return {}
    found = typed.read_object(path)
    typed.check(str(path), found, dict.fromkeys(found, typed.list_of(typed.OBJECT)))
    for name, rows in found.items():
        for row in rows:
            typed.check(f"{path}: {name}", row, _ROW, required=_ROW)
    return found
