"""Where a user's caches are: compiled programs, and what was measured of the machine."""

import os
from pathlib import Path


def folder(name: str) -> Path:
    """A folder of ours under the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`); need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dapt_jax" / name
