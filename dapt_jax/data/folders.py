"""Image folders: one folder per class, if need be below train, val and test."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dapt_jax.data import records
from dapt_jax.data.dataset import Dataset, matching
from dapt_jax.data.decode import CACHE_BYTES
from dapt_jax.data.plane import Plane, Window, file_of
from dapt_jax.data.records import Record
from dapt_jax.errors import UserError, nearest

SPLITS = ("train", "val", "valid", "validation", "dev", "test", "external")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom")


def load_folder(
    path: str | Path,
    *,
    image_size: int,
    classes: Sequence[str] = (),
    drop_classes: Sequence[str] = (),
    where: str = "",
    crop: int | None = None,
    group: str = "",
    on_bad_image: str = "error",
    cache_bytes: int = CACHE_BYTES,
    workers: int | None = None,
    name: str = "",
    window: str = "",
) -> Dataset:
    r"""Reads `path/CLASS/*.png` or `path/SPLIT/CLASS/*.png`.

    Folders are taken for splits when all of them are named as in `SPLITS`; the split is then in `columns["split"]`.
    Images may lie deeper within a class's folder. Hidden files, and files that are no images by their suffix, are not
    looked at.

    Args:
        path: the folder.
        image_size: side of the images in pixels.
        classes: the classes in the order wanted; by default all folders' names, sorted.
        drop_classes: classes whose images are left out.
        where: which images to use, such as "split=train", see `Dataset.where`.
        crop: side in pixels of a centre crop before resizing, see `dapt_jax.data.decode.decode`.
        group: regular expression whose first group, searched in an image's path below `path`, names its patient, such
            as r"(P\d+)_"; "" makes each image its own group.
        on_bad_image: "error", or "skip" to leave out and count images that cannot be read.
        cache_bytes: see `ImageStore.from_files`.
        workers: threads that decode; see `ImageStore.verify`.
        name: name of the data set; by default the folder's.
        window: black and white of the images, see `Window.parse`; "" for the rule of each kind of file.

    Raises:
        UserError: one line that names the folder or file, what was expected, and the nearest valid choice.
    """
    root = Path(path)
    records.check_on_bad_image(on_bad_image)
    found = _records(root, _pattern(group))
    if shown := Window.parse(window):
        found = [replace(record, image=Plane(file_of(record.image), window=shown)) for record in found]
    if "split" in found[0].columns:
        places, splits = [record.place for record in found], [record.columns["split"] for record in found]
        records.check_splits(places, [record.group for record in found], splits, "patient", str(root))
    columns = {key: [record.columns[key] for record in found] for key in found[0].columns}
    columns |= {"label": [record.labels[0] for record in found]}
    kept = matching(columns, where, str(root))
    found = [record for record, keep in zip(found, kept, strict=True) if keep]
    found = records.drop(found, drop_classes, str(root))
    return records.to_dataset(
        found,
        records.resolve_classes(found, classes, str(root)),
        name=name or root.absolute().name,
        origin=str(root),
        multi_label=False,
        image_size=image_size,
        crop=crop,
        on_bad_image=on_bad_image,
        cache_bytes=cache_bytes,
        workers=workers,
    )


def _pattern(group: str) -> re.Pattern[str] | None:
    if not group:
        return None
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UserError(f"group={group!r} is not a regular expression ({error})") from error
    if pattern.groups < 1:
        raise UserError(f"group={group!r} marks no part of the path as the patient; put it in brackets: ({group})")
    return pattern


def _records(root: Path, pattern: re.Pattern[str] | None) -> list[Record]:
    if not root.is_dir():
        there = (
            sorted(folder.name for folder in root.parent.iterdir() if folder.is_dir()) if root.parent.is_dir() else []
        )
        hint = nearest(root.name, there) if there else f"there are no folders in {root.parent}"
        raise UserError(f"{root}: no such folder; {hint}")
    tops = _folders(root)
    split = bool(tops) and all(folder.name in SPLITS for folder in tops)
    found = []
    for folder in (inner for top in tops for inner in _folders(top)) if split else tops:
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() not in SUFFIXES or file.name.startswith("."):
                continue
            written = file.relative_to(root).as_posix()
            match = pattern.search(written) if pattern else None
            if pattern and not (match and match[1]):
                raise UserError(f"{file}: group={pattern.pattern!r} finds no patient in {written!r}")
            columns = {"split": folder.parent.name} if split else {}
            group = match[1] if match else ""
            found.append(
                Record(written, image=file, written=written, labels=(folder.name,), group=group, columns=columns)
            )
    if not found:
        layout = "SPLIT/CLASS/image.png" if split else "CLASS/image.png"
        raise UserError(f"{root}: no images; expected {layout} with one of {', '.join(SUFFIXES)}")
    return found


def _folders(root: Path) -> list[Path]:
    return sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
