"""Finding files below a data set's folder."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dapt_jax.data.paths import walk
from dapt_jax.errors import UserError, nearest

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".dcm", ".dicom", ".nii", ".nii.gz")


def stem(name: str) -> str:
    """Return a file's name without the suffix of an image; other dots stay, for DICOM names are full of them."""
    lower = name.lower()
    suffix = next((suffix for suffix in sorted(IMAGES, key=len, reverse=True) if lower.endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def images(folder: Path) -> list[Path]:
    """Return images in a folder and below it, sorted; hidden files and folders and those of systems are not looked at."""
    return sorted(file for file in walk(folder) if stem(file.name) != file.name)


def first(root: Path, *names: str) -> Path | None:
    """Return the first of several files or folders that is there, directly below a folder or anywhere deeper."""
    for name in names:
        if (root / name).exists():
            return root / name
    return next((found for name in names for found in sorted(root.rglob(name))), None)


def needed(root: Path, *names: str) -> Path:
    """As `first`.

    Raises:
        UserError: None is there; names the nearest file.
    """
    found = first(root, *names)
    if found is None:
        there = sorted(file.name for file in root.iterdir())
        raise UserError(
            f"{root}: no {' or '.join(names)}; {nearest(names[0], there) if there else 'it is empty'}"
        )
    return found


def lists(root: Path, names: Sequence[str], required: bool = True) -> list[tuple[str, Path]]:
    """Return lists with the split that each is for, told by "train", "val" or "test" in its name.

    Args:
        root: The folder in or below which they are.
        names: Their names.
        required: Whether it is an error if none of them is there; some without the others always is.

    Raises:
        UserError: A list is missing, or its name tells no split.
    """
    found = [(name, first(root, name)) for name in names]
    if not required and not any(path for _, path in found):
        return []
    chosen = []
    for name, path in found:
        split = next((split for split in ("train", "val", "test") if split in Path(name).name.lower()), "")
        if not split:
            raise UserError(
                f"{root}: the name of list {name} tells no split; expected train, val or test in it"
            )
        chosen.append((split, path or needed(root, name)))
    return chosen


def finder(root: Path) -> Callable[[str], Path]:
    """Return a function from an image as a list names it to its file, whatever folder and format the images were put into.

    A name that matches nothing gives the path at which it was looked for first.
    """
    known: dict[str, Path] = {}

    def find(written: str) -> Path:
        direct = root / written.replace("\\", "/")
        if direct.is_file():
            return direct
        if not known:
            known.update({stem(file.name): file for file in reversed(images(root))})
        return known.get(stem(direct.name), direct)

    return find


def relative(file: Path, root: Path) -> str:
    """Return a path as it is below the folder, with slashes."""
    return file.relative_to(root).as_posix()


def folders(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """Yield those of the named folders that are there."""
    yield from (folder / name for name in names if (folder / name).is_dir())
