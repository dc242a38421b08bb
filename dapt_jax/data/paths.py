"""From a name as a table writes it to a file: Unicode forms, upper and lower case, suffixes left out."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dapt_jax.data import identity

IMAGES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm", ".pnm",
    ".jp2", ".dcm", ".dicom", ".ima", ".dic",
)  # fmt: skip
"""Suffixes of files that hold one picture."""
VOLUMES = (".nii", ".nii.gz", ".mat", ".h5", ".hdf5", ".nrrd", ".mha", ".mhd", ".hdr", ".img")
"""Suffixes of files that hold several pictures, of which a table has to name one."""

_SYSTEM = frozenset(
    ("__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found",
     "__pycache__", "recycler", "found.000")
)  # fmt: skip
"""Folders that systems and archives make, in lower case; names with a dot or a tilde in front are theirs
too."""

_MARKS = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n",
)  # fmt: skip


class Finder:
    """Finds files below a folder by the names that a table gives them.

    Listings of folders are kept, so that a table of many rows costs one listing per folder.
    """

    def __init__(self, root: Path):
        """Start from a folder; nothing is read yet.

        Args:
            root: The folder that relative names start from.
        """
        self._root = root
        self._listed: dict[Path, dict[str, list[str]]] = {}

    def __call__(self, written: str) -> Path:
        """Return the file that a name means.

        A name that fits no file to the letter may fit one after Unicode normalisation, or in another case,
        or, if it has no suffix of an image, with one; but only where a single file fits.

        Args:
            written: The name, relative to the root or absolute; folders may be separated by backslashes.

        Returns:
            The file, or where it was looked for if nothing fits.
        """
        path = self._root / written.replace("\\", "/")
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
        """Return the one folder that holds all of several files whose names, without a folder, fit none in
        the root itself.

        Args:
            names: As a table writes them.
        """
        if (
            not names
            or any(re.search(r"[\\/]", name) for name in names)
            or any(self(name).is_file() for name in names)
        ):
            return None
        folders = sorted({file.parent for file in walk(self._root)})
        holding = [
            folder for folder in folders if all(self._fitting(folder, name, is_file=True) for name in names)
        ]
        return holding[0] if len(holding) == 1 else None

    def _fitting(self, folder: Path, part: str, *, is_file: bool) -> list[str]:
        """Names in a folder that a part of a path may mean, of the surest kind alone."""
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


def is_of_system(name: str) -> bool:
    """Return whether a file or folder is hidden, or made by a system or an archive."""
    return name.lower() in _SYSTEM or name.startswith((".", "~"))


def walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the files in a folder and below it; links are followed once, files of systems left out."""
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
    """Return the one name of a file, links and `..` resolved; a name of no file stays as it is."""
    return os.path.realpath(path) if os.path.exists(path) else str(path)


def holds_picture(file: Path) -> bool:
    """Return whether a file is an image by its name or, where that says nothing, by its first bytes."""
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
