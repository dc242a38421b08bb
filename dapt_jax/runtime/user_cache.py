"""Location of a user's caches: compiled programs, and measurements of the machine."""

import os
from pathlib import Path

DATA = "data"
"""Name of the folder of copies of remote data sets."""


def folder(name: str) -> Path:
    """Return a folder under the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`), existing or not."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dapt_jax" / name


def copy_with(path: Path) -> Path | None:
    """Return the copy of a remote data set that holds a path; None if the path is the user's own."""
    copies = folder(DATA)
    path = path.absolute()
    return (
        copies / path.relative_to(copies).parts[0] if path != copies and path.is_relative_to(copies) else None
    )
