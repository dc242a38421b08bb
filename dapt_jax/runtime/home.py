"""The home folder in paths: shells leave the ~ of --flag=~/folder as it is, and Python's own functions do so too."""

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """Return a path with a leading `~` or `~USER` replaced by the home folder, and any other as it is.

    That of a user who does not exist stays too, and is then a folder of that name which is not there.

    >>> expanded("~nobody-of-this-name/runs"), expanded("runs/~")
    (PosixPath('~nobody-of-this-name/runs'), PosixPath('runs/~'))
    """
    return Path(os.path.expanduser(path))
