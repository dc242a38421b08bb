"""Search for files below the folder of a data set."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dapt_jax.data.paths import named, walk
from dapt_jax.errors import UserError, nearest

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".dcm", ".dicom", ".nii", ".nii.gz")


def stem(name: str) -> str:
    """Return a file's name without an image suffix; other dots, common in DICOM names, remain."""
    lower = name.lower()
    suffix = next((suffix for suffix in sorted(IMAGES, key=len, reverse=True) if lower.endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def images(folder: Path) -> list[Path]:
    """Return the images in a folder and below it, sorted, without hidden and system files."""
    return sorted(file for file in walk(folder) if stem(file.name) != file.name)


def first(root: Path, *names: str) -> Path | None:
    """Return the first of several files or folders that exists, in a folder or at any depth below it."""
    for name in names:
        if (root / name).exists():
            return root / name
    return next((found for name in names for found in sorted(root.rglob(name))), None)


def needed(root: Path, *names: str) -> Path:
    """Return the result of `first`, which must exist.

    Raises:
        UserError: None exists; names the nearest file.
    """
    found = first(root, *names)
    if found is None:
        there = sorted(file.name for file in root.iterdir())
        raise UserError(
            f"{root}: no {' or '.join(names)}; {nearest(names[0], there) if there else 'it is empty'}"
        )
    return found


def lists(root: Path, names: Sequence[str], required: bool = True) -> list[tuple[str, Path]]:
    """Return lists with their splits, given by "train", "val" or "test" in their names.

    Args:
        root: Folder in or below which the lists are.
        names: Names of the lists.
        required: Whether it is an error if all lists are missing; missing only some of them always is.

    Raises:
        UserError: A list is missing, or its name contains no split.
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
    """Return a function from an image's name in a list to its file, in any folder and format.

    A name that matches nothing gives the path where the file was expected; one that matches several files, such as
    originals and smaller copies, is refused by the function.
    """
    known: dict[str, list[Path]] = {}

    def find(written: str) -> Path:
        direct = named(root, written)
        if direct.is_file():
            return direct
        if not known:
            for file in images(root):
                known.setdefault(stem(file.name), []).append(file)
        fitting = known.get(stem(direct.name), [direct])
        if len(fitting) > 1:
            raise UserError(
                f"{root}: {written} may be {fitting[0].relative_to(root)} or {fitting[1].relative_to(root)}; expected "
                "one file of that name below the folder: keep masks and other versions elsewhere"
            )
        return fitting[0]

    return find


def relative(file: Path, root: Path) -> str:
    """Return a path relative to the folder, with slashes."""
    return file.relative_to(root).as_posix()


def folders(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """Yield the named folders that exist."""
    yield from (folder / name for name in names if (folder / name).is_dir())
