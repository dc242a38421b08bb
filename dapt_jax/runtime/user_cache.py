"""Location of a user's caches: compiled programs, and measurements of the machine."""

import os
import tempfile
from pathlib import Path

from dapt_jax.errors import UserError

DATA = "data"
"""Name of the folder of copies of remote data sets."""


def folder(name: str) -> Path:
    """Return a folder under the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`), existing or not."""
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "dapt_jax" / name


def _home() -> Path:
    """Return the user's home; a folder of the user's own among temporary files where there is none.

    Containers run as users without an entry and without HOME.

    Raises:
        UserError: The temporary folder belongs to another user.
    """
    try:
        return Path.home()
    except RuntimeError:
        home = Path(tempfile.gettempdir()) / f"dapt_jax-home-{os.getuid()}"
        home.mkdir(mode=0o700, exist_ok=True)
        about = home.lstat()
        if home.is_symlink() or about.st_uid != os.getuid() or about.st_mode & 0o022:
            raise UserError(
                f"{home}: belongs to another user, or others may write to it; set HOME or XDG_CACHE_HOME to a "
                "folder of your own"
            ) from None
        return home


def copy_with(path: Path) -> Path | None:
    """Return the copy of a remote data set that holds a path; None if the path is the user's own."""
    copies = folder(DATA)
    path = path.absolute()
    return (
        copies / path.relative_to(copies).parts[0] if path != copies and path.is_relative_to(copies) else None
    )
