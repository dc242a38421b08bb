"""Location of a user's caches: compiled programs, and measurements of the machine."""

import os
from pathlib import Path


def folder(name: str) -> Path:
    """Return a folder under the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`), existing or not."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dapt_jax" / name
