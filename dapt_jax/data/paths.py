"""Resolution of names in tables to files: Unicode forms, upper and lower case, omitted suffixes."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dapt_jax.data import identity
from dapt_jax.runtime import safe_paths, user_cache

IMAGES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".pgm",
    ".ppm", ".pnm",
    ".jp2", ".dcm", ".dicom", ".ima", ".dic",
)  # fmt: skip
"""Suffixes of files that hold one picture."""
VOLUMES = (".nii", ".nii.gz", ".mat", ".h5", ".hdf5", ".nrrd", ".mha", ".mhd", ".hdr", ".img")
"""Suffixes of files that hold several pictures, of which a table has to select one."""

_SYSTEM = frozenset(
    ("__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found",
     "__pycache__", "recycler", "found.000")
)  # fmt: skip
"""Folders made by operating systems and archives, in lower case; names that start with a dot or a tilde are
also theirs."""

_MARKS = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*", b"II+\x00",
    b"MM\x00+",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n",
)  # fmt: skip


class Finder:
    """Search for files below a folder by the names in a table.

    Folder listings are cached, so a table with many rows costs one listing per folder.
    """

    def __init__(self, root: Path):
        """Use a folder as the root, without reading anything yet.

        Args:
            root: Folder that relative names start from.
        """
        self._root = root
        self._listed: dict[Path, dict[str, list[str]]] = {}

    def __call__(self, written: str) -> Path:
        """Return the file that a name refers to.

        A name that matches no file exactly may match one after Unicode normalisation, in another case, or, if
        it has no image suffix, with a suffix; but only if exactly one file matches.

        Args:
            written: The name, relative to the root or absolute; backslashes may separate folders.

        Returns:
            The file, or the path where it was expected if nothing matches.
        """
        path = named(self._root, written)
        if os.path.exists(path):
            return path
        found = Path(path.parts[0]) if path.is_absolute() else Path()
        parts = path.parts[1:] if path.is_absolute() else path.parts
        for depth, part in enumerate(parts):
            candidate = found / part
            if not os.path.exists(candidate):
                fitting = self._fitting(found, part, is_file=depth == len(parts) - 1)
                if len(fitting) != 1:
                    return path
                candidate = found / fitting[0]
            found = candidate
        return found

    def below(self, names: Sequence[str]) -> Path | None:
        """Return the only folder that holds all of the named files.

        The names have no folder, and match no file in the root itself.

        Args:
            names: Names as written in the table.
        """
        if (
            not names
            or any(re.search(r"[\\/]", name) for name in names)
            or any(os.path.isfile(self(name)) for name in names)
        ):
            return None
        folders = sorted({file.parent for file in walk(self._root)})
        holding = [
            folder for folder in folders if all(self._fitting(folder, name, is_file=True) for name in names)
        ]
        return holding[0] if len(holding) == 1 else None

    def _fitting(self, folder: Path, part: str, *, is_file: bool) -> list[str]:
        """Return names in a folder that match a part of a path, only those of the most reliable kind."""
        there = self._names(folder)
        wanted = identity.clean(part)
        entries = there.get(wanted.casefold(), [])
        exact = [name for name in entries if identity.clean(name) == wanted]
        if exact or entries or not is_file or wanted.casefold().endswith((*IMAGES, *VOLUMES)):
            return exact or entries
        return [name for suffix in (*IMAGES, ".npy") for name in there.get(wanted.casefold() + suffix, [])]

    def _names(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._listed:
            listed: dict[str, list[str]] = {}
            try:
                for name in sorted(os.listdir(folder)):
                    listed.setdefault(identity.clean(name).casefold(), []).append(name)
            except OSError:
                pass
            self._listed[folder] = listed
        return self._listed[folder]


def named(folder: Path, written: str) -> Path:
    """Return the path that a table means by a name.

    A table of the user's own may name files anywhere. A table that was copied from remote storage came with
    its images: its names stay inside the copy.

    Args:
        folder: Folder that relative names start from.
        written: The name; backslashes may separate folders.

    Raises:
        UserError: The table was copied, and the name leads out of the copy.
    """
    path = folder / written.replace("\\", "/")
    copy = user_cache.copy_with(folder)
    return path if copy is None else safe_paths.inside(copy, path, f"{folder}: a table there")


def is_of_system(name: str) -> bool:
    """Return whether a file or folder is hidden, or made by an operating system or an archive."""
    return name.lower() in _SYSTEM or name.startswith((".", "~"))


def walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the files in a folder and below it; links are followed once, system files are ignored.

    Args:
        folder: The folder.
        above: Folders that are not entered, links resolved: those above, so that no link leads back.
    """
    place = os.path.realpath(folder)
    if place in above:
        return
    for name in sorted(os.listdir(folder)):
        entry = folder / name
        if is_of_system(name):
            continue
        if entry.is_dir():
            yield from walk(entry, (*above, place))
        elif entry.is_file():
            yield entry


def true_path(path: str | Path) -> str:
    """Return the canonical name of a file, with links and `..` resolved; other names are unchanged."""
    return os.path.realpath(path) if os.path.exists(path) else str(path)


def holds_picture(file: Path) -> bool:
    """Return whether a file is an image by its suffix or, without a known suffix, by its first bytes."""
    lower = file.name.lower()
    if lower.endswith((*IMAGES, ".npy")):
        return True
    if lower.endswith(VOLUMES):
        return False
    try:
        with file.open("rb") as opened:
            head = opened.read(132)
    except OSError:
        return False
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return head[128:] == b"DICM" or head.startswith(_MARKS) or is_webp
