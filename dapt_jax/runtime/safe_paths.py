"""Paths from names that others chose: remote listings, archive members, indices of weights, server headers.

Every such name passes `check` before it becomes part of a path, and `below` before anything is written or
removed there. The rules are those of all platforms at once, so that what is refused does not depend on where
a study runs.
"""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from dapt_jax.errors import UserError, redact

LONGEST_NAME = 255
"""Maximum bytes of one file name on common file systems."""
_LONGEST_PATH = 3800
"""Maximum bytes of a path, with room for what is appended to it while it is written; Linux allows 4096."""
_LONGEST_CLEAN = 120


def check(name: str, origin: object) -> tuple[str, ...]:
    """Return the components of a name that stays below its folder.

    Args:
        name: Name relative to a folder, with `/` between components.
        origin: Source of the name, for the error.

    Raises:
        UserError: The name is empty, absolute, too long, or has a component `.` or `..`, a drive letter, a
            backslash or a control character.

    Example:
        >>> check("images/1.png", "data.zip")
        ('images', '1.png')
        >>> check("../1.png", "data.zip")
        Traceback (most recent call last):
        dapt_jax.errors.UserError: data.zip: holds '../1.png', a name that leads out of its folder; expected \
names of files below the folder
    """
    parts = tuple(name.split("/"))
    if not name or ".." in parts or not parts[0] or "\\" in name or any(map(_DRIVE.match, parts)):
        raise _refused(name, origin, "leads out of its folder")
    if "" in parts or "." in parts:
        raise _refused(name, origin, "is another spelling of a shorter one")
    if any(unicodedata.category(each) in ("Cc", "Cs") for each in name):
        raise _refused(name, origin, "holds a control character")
    if max(len(part.encode()) for part in parts) > LONGEST_NAME:
        raise _refused(name, origin, f"has more than {LONGEST_NAME} bytes")
    return parts


_DRIVE = re.compile(r"[A-Za-z]:")


def below(folder: Path, name: str, origin: object) -> Path:
    """Return the path of a name below a folder, for writing and removing.

    Args:
        folder: The folder; links that lead to it are the user's own, and are followed.
        name: See `check`.
        origin: See `check`.

    Raises:
        UserError: See `check`; also if a component below the folder is a symbolic link, or the path is too
            long.
    """
    parts, path = check(name, origin), folder
    if len(os.fsencode(folder.absolute().joinpath(*parts))) > _LONGEST_PATH:
        raise _refused(name, origin, f"makes a path of more than {_LONGEST_PATH} bytes")
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise _refused(name, origin, f"is led elsewhere by the link {path}")
    return path


def inside(folder: Path, path: Path, origin: object) -> Path:
    """Return a path unchanged if it is inside a folder once links and `..` are resolved.

    Raises:
        UserError: It is not.
    """
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise _refused(str(path), origin, "leads out of its folder")
    return path


def check_together(names: Iterable[str], folder: Path, origin: object) -> None:
    """Refuse names that cannot all be files of one folder.

    Args:
        names: Names that passed `check`.
        folder: The folder, which exists; case and Unicode form matter as its file system distinguishes them.
        origin: Source of the names, for the error.

    Raises:
        UserError: A name is also a folder of another, or two names would be the same file.
    """
    known = set(names)
    for name in known:
        parent = name.rpartition("/")[0]
        while parent:
            if parent in known:
                raise _refused(name, origin, f"needs {_shown(parent)} to be a folder, which is also a file")
            parent = parent.rpartition("/")[0]
    spelled: dict[str, str] = {}
    for name in sorted(known):
        other = spelled.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name and _is_one_file(other, name, folder):
            raise _refused(name, origin, f"is the same file as {_shown(other)} on this disk")


def clean(name: str, otherwise: str) -> str:
    """Return a file name of letters, digits and `._+-` for a name from a URL or a header.

    Args:
        name: Any text.
        otherwise: Name to use if nothing is left.

    Example:
        >>> clean("../resnet 50.pth", "weights"), clean("..", "weights")
        ('_resnet_50.pth', 'weights')
    """
    kept = re.sub(r"[^A-Za-z0-9._+-]", "_", name).lstrip(".")
    return kept[-_LONGEST_CLEAN:].lstrip(".") or otherwise


def _is_one_file(name: str, other: str, folder: Path) -> bool:
    """Return whether a file system takes two spellings for one file."""
    probes = [folder / f".probe-{os.getpid()}-{each.replace('/', '-')[-80:]}" for each in (name, other)]
    try:
        probes[0].touch()
        return probes[1].exists()
    except OSError:
        return True
    finally:
        probes[0].unlink(missing_ok=True)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def _refused(name: str, origin: object, why: str) -> UserError:
    return UserError(
        f"{redact(str(origin))}: holds {_shown(name)}, a name that {why}; expected names of files below the "
        "folder"
    )
