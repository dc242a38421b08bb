"""Classes and splits of the images below a folder, and the files that are not used."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dapt_jax.data import identity, mask_names
from dapt_jax.data.paths import VOLUMES, holds_picture, is_of_system, walk
from dapt_jax.errors import UserError

_JUNK = frozenset(("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"))


@dataclass(frozen=True)
class Found:
    """An image of a class: its file, and its split if the folders name splits."""

    file: Path
    label: str
    split: str | None = None


@dataclass
class Layout:
    """Contents of a folder of images.

    Attributes:
        images: Images, sorted by path.
        empty: Class folders without images, as (split or None, class, folder).
        notes: Omissions and interpretations, one per line.
        has_splits: Whether folders name splits.
    """

    images: list[Found] = field(default_factory=list)
    empty: list[tuple[str | None, str, Path]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    has_splits: bool = False


def read(root: Path, classes: Sequence[str] = ()) -> Layout:
    """Read CLASS/image, SPLIT/CLASS/image or CLASS/SPLIT/image below a folder.

    Args:
        root: The folder. If it holds only one folder of folders, as unpacked archives do, that one is read.
        classes: Classes that the user names; a folder with such a name is a class, even if it looks like
            something else.

    Raises:
        UserError: The folders are neither classes nor splits, or are a mixture of both.
    """
    layout = Layout()
    named = {identity.clean(name) for name in classes}
    walker = _Walker(root, layout.notes)
    top = _unwrapped(root, walker, named)
    folders = walker.folders(top)
    splits = {folder: _split_of(folder, named) for folder in folders}
    with_classes = [
        folder for folder in folders if splits[folder] and walker.folders(_inner(folder, walker, named))
    ]
    if any(splits.values()) and not with_classes and not all(splits.values()):
        strange = next(folder for folder in folders if splits[folder])
        raise UserError(
            f"{strange}: a folder named as a split, without class folders, beside "
            f"{_others(folders, strange)}; expected SPLIT/CLASS/image or CLASS/image; if it is a class, "
            "say so by classes"
        )
    if with_classes or (folders and all(splits.values())):
        _read_splits(folders, splits, layout, walker, named)
    else:
        _read_classes(folders, layout, walker, named)
    walker.finish()
    if pictures := [file for file in walker.files(top) if holds_picture(file)]:
        layout.notes.append(
            f"{top}: left out {mask_names.images(len(pictures))} in no class folder, first: {pictures[0].name}"
        )
    return layout


def _read_splits(
    folders: Sequence[Path], splits: dict[Path, str], layout: Layout, walker: "_Walker", named: set[str]
) -> None:
    layout.has_splits = True
    spelt = {folder.name: split for folder, split in splits.items() if split and folder.name != split}
    if spelt:
        listed = ", ".join(f"{name} is {split}" for name, split in spelt.items())
        layout.notes.append(f"{walker.root}: folders taken for splits: {listed}")
    for folder in folders:
        split = splits[folder]
        if not split:
            count = sum(1 for _ in walker.pictures(folder))
            layout.notes.append(
                f"{folder}: left out, a folder of {mask_names.images(count)} beside those of splits"
            )
            continue
        inner = _inner(folder, walker, named)
        loose = [file for file in walker.files(inner) if holds_picture(file)]
        if loose:
            layout.notes.append(
                f"{inner}: left out {mask_names.images(len(loose))} in no class folder, first: {loose[0].name}; "
                "without a label they serve no task"
            )
        class_folders = walker.folders(inner)
        _check_classes(class_folders, inner, named)
        for class_folder in class_folders:
            if _split_of(class_folder, named):
                count = sum(1 for _ in walker.pictures(class_folder))
                layout.notes.append(
                    f"{class_folder}: left out {mask_names.images(count)} in a folder named as a split, not as a class"
                )
            else:
                _read_class(class_folder, split, layout, walker)
    _compare_classes(layout, walker.root)


def _compare_classes(layout: Layout, root: Path) -> None:
    """Note classes that some splits lack."""
    present: dict[str, set[str]] = {}
    for image in layout.images:
        present.setdefault(image.label, set()).add(str(image.split))
    splits = set().union(*present.values())
    for label, held in sorted(present.items()):
        if held != splits:
            layout.notes.append(
                f"{root}: class {label!r} is in {_list(held)} alone, not in {_list(splits - held)}"
            )


def _list(names: set[str]) -> str:
    return " and ".join(sorted(names))


def _read_classes(folders: Sequence[Path], layout: Layout, walker: "_Walker", named: set[str]) -> None:
    _check_classes(folders, walker.root, named)
    # CLASS/SPLIT/image: the folders inside every class have the names of splits.
    by_split = {
        folder: [(inner, _split_of(inner, set())) for inner in walker.folders(folder)] for folder in folders
    }
    sided = {folder for folder, inner in by_split.items() if inner and all(split for _, split in inner)}
    layout.has_splits = bool(sided)
    for folder in folders:
        if not sided:
            _read_class(folder, None, layout, walker)
            continue
        loose = [file for file in walker.files(folder) if holds_picture(file)]
        if folder not in sided or loose:
            raise UserError(
                f"{folder}: holds {loose[0].name if loose else 'folders'} outside of splits, while "
                f"{min(sided)} is divided into splits; expected CLASS/SPLIT/image throughout"
            )
        for inner, split in by_split[folder]:
            _read_class(inner, split, layout, walker, identity.clean(folder.name))


def _check_classes(folders: Sequence[Path], root: Path, named: set[str]) -> None:
    """Refuse folders of images and of masks in place of classes, unless the user names classes."""
    names = [folder.name for folder in folders]
    if (
        not named
        and any(map(mask_names.is_of_images, names))
        and any(mask_names.is_of_masks(name, names) for name in names)
    ):
        raise UserError(
            f"{root}: {', '.join(names)} are folders of images and masks, not of classes; expected CLASS/image; "
            "images with masks take kind 'manifest' with a column mask"
        )


def _read_class(folder: Path, split: str | None, layout: Layout, walker: "_Walker", label: str = "") -> None:
    label = label or identity.clean(folder.name)
    files, notes = mask_names.apart(list(walker.pictures(folder)), folder)
    layout.notes += notes
    layout.images += [Found(file, label, split) for file in files]
    if not files:
        layout.empty.append((split, label, folder))


def why_empty(folder: Path) -> str:
    """Return the contents of a class folder without images, as the end of an error message."""
    names = [
        file.name for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")
    ]
    if not names:
        return "it is empty"
    if pictures := sum(map(holds_picture, walk(folder))):
        return f"it holds {mask_names.images(pictures)} in folders named as masks"
    kinds = ", ".join(
        f"{suffix or 'no suffix'} {count}" for suffix, count in Counter(map(_suffix, names)).most_common(4)
    )
    hint = (
        "; of volumes, kind 'manifest' names slices: scan.nii.gz[12]"
        if any(_is_volume(name) for name in names)
        else ""
    )
    return f"it holds files of other kinds ({kinds}){hint}"


class _Walker:
    """Traversal of folders that records which files are not used."""

    def __init__(self, root: Path, notes: list[str]):
        self.root, self._notes = root, notes
        self._skipped: set[Path] = set()
        self._links: list[Path] = []
        self._broken: set[Path] = set()
        self._others: dict[Path, Counter[str]] = {}

    def folders(self, folder: Path) -> list[Path]:
        """Return the folders in a folder, sorted, without system folders."""
        return [entry for entry in self._entries(folder) if entry.is_dir()]

    def files(self, folder: Path) -> list[Path]:
        """Return the files directly in a folder, sorted, without hidden and system files."""
        return [entry for entry in self._entries(folder) if entry.is_file()]

    def pictures(self, folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
        """Yield the images in a folder and below it; links are followed, except cyclic ones."""
        place = os.path.realpath(folder)
        if place in above:
            self._links.append(folder)
            return
        inner = self.folders(folder)
        pictures = []
        for file in self.files(folder):
            if holds_picture(file):
                pictures.append(file)
            elif file.name.lower() not in _JUNK:
                self._others.setdefault(folder, Counter())[_suffix(file.name)] += 1
        yield from pictures
        for below in inner:
            yield from self.pictures(below, (*above, place))

    def finish(self) -> None:
        """Note which files were not used."""
        for name, count in sorted(Counter(folder.name for folder in self._skipped).items()):
            times = f" ({count} of them)" if count > 1 else ""
            self._notes.append(f"{self.root}: left out system folder {name}{times}")
        for link in dict.fromkeys(self._links):
            self._notes.append(f"{link}: left out, a link that leads back into its own folder")
        for link in sorted(self._broken):
            self._notes.append(f"{link}: left out, a link to a file that does not exist")
        if self._others:
            total: Counter[str] = sum(self._others.values(), Counter())
            kinds = ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in total.most_common(6))
            folders = ", ".join(str(folder.relative_to(self.root)) for folder in list(self._others)[:4])
            more = f" and {len(self._others) - 4} more" if len(self._others) > 4 else ""
            self._notes.append(
                f"{self.root}: left out files that are not images: {kinds} (in {folders}{more})"
            )

    def _entries(self, folder: Path) -> list[Path]:
        kept = []
        for name in sorted(os.listdir(folder)):
            entry = folder / name
            if is_of_system(name):
                if entry.is_dir():
                    self._skipped.add(entry)
            elif not os.path.exists(entry):
                self._broken.add(entry)
            else:
                kept.append(entry)
        return kept


def _unwrapped(root: Path, walker: _Walker, named: set[str]) -> Path:
    """Return the folder of classes or splits, below folders that contain only one folder of folders."""
    folder = root
    while True:
        inner = walker.folders(folder)
        if len(inner) != 1 or identity.clean(inner[0].name) in named or _split_of(inner[0], named):
            break
        below = walker.folders(inner[0])
        if len(below) < 1 or any(holds_picture(file) for file in walker.files(inner[0])):
            break
        if len(below) == 1 and not walker.folders(below[0]):
            break
        folder = inner[0]
    if folder != root:
        walker._notes.append(
            f"{root}: its one folder holds folders, so classes and splits are those below {folder}"
        )
    return folder


def _inner(folder: Path, walker: _Walker, named: set[str]) -> Path:
    """Return a split's folder, or the folder in it that contains the classes (train/train/CLASS)."""
    inner = walker.folders(folder)
    if len(inner) == 1 and walker.folders(inner[0]):
        only = inner[0]
        if _split_of(only, named) == _split_of(folder, named) or identity.column_key(only.name) in (
            "images",
            "data",
        ):
            return only
    return folder


def _split_of(folder: Path, named: set[str]) -> str:
    name = identity.clean(folder.name)
    return "" if name in named else identity.split_name(name)


def _others(folders: Sequence[Path], one: Path) -> str:
    return ", ".join(folder.name for folder in folders if folder != one)


def _suffix(name: str) -> str:
    lower = name.lower()
    return ".nii.gz" if lower.endswith(".nii.gz") else Path(lower).suffix


def _is_volume(name: str) -> bool:
    return name.lower().endswith(VOLUMES)
