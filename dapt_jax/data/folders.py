"""Image folders: one folder per class, above or below folders of splits if there are any."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dapt_jax.data import identity, layout, records
from dapt_jax.data.dataset import Dataset, matching
from dapt_jax.data.decode import CACHE_BYTES
from dapt_jax.data.layout import Layout, why_empty
from dapt_jax.data.paths import IMAGES
from dapt_jax.data.plane import Plane, Window, file_of
from dapt_jax.data.records import Record
from dapt_jax.data.tiles import Tiles
from dapt_jax.errors import MissingLabelsError, UserError, nearest_beside


def load_folder(
    path: str | Path,
    *,
    image_size: int,
    classes: Sequence[str] = (),
    drop_classes: Sequence[str] = (),
    where: str = "",
    crop: int | None = None,
    resize: str = "squash",
    group: str = "",
    on_bad_image: str = "error",
    cache_bytes: int = CACHE_BYTES,
    workers: int | None = None,
    name: str = "",
    window: str = "",
    tiles: Tiles | None = None,
) -> Dataset:
    r"""Read `path/CLASS/*.png`, `path/SPLIT/CLASS/*.png` or `path/CLASS/SPLIT/*.png`.

    Folders with the name of a split in any spelling (`Training`, `TEST`, `fold_0`, see `identity.split_name`)
    are splits; the split is then in `columns["split"]` as "train", "val", "dev", "test" or "fold_0". Images
    may be nested deeper in a class folder. A file is an image if its suffix or, without a known suffix, its
    first bytes say so. Folders of operating systems and archives (`__MACOSX`, `.Trash`) are ignored, links
    are followed, and omissions and interpretations are listed in `Dataset.notes`, see `dapt_jax.data.layout`.

    Args:
        path: The folder.
        image_size: Side of the images in pixels.
        classes: The classes in the wanted order; by default the names of all folders, numbers in numerical
            order.
        drop_classes: Classes whose images are left out.
        where: Condition that selects images, such as "split=train", see `Dataset.where`.
        crop: Side in pixels of a centre crop before resizing, see `dapt_jax.data.decode.decode`.
        resize: How an image that is not square becomes one: `squash`, `pad` or `crop`, see `Framing`.
        group: Regular expression whose first group, searched in an image's path below `path`, is the patient,
            such as r"(P\d+)_"; by default DICOM files are grouped by PatientID, and every other image is its
            own group.
        on_bad_image: "error", or "skip" to leave out and count images that cannot be read.
        cache_bytes: See `ImageStore.from_files`.
        workers: Number of decoding threads; see `ImageStore.verify`.
        name: Name of the data set; by default that of the folder.
        window: Black and white values of the images, see `Window.parse`; "" for the rule of each kind of
            file.
        tiles: How images are cut into tiles; None for whole images.

    Raises:
        UserError: One line that names the folder or file, the expected form, and the nearest valid choice:
            the folder does not exist, a class folder has no images, or folders are neither classes nor
            splits.
    """
    root = Path(path)
    records.check_on_bad_image(on_bad_image)
    found, seen = _records(root, patient_pattern(group), (*classes, *drop_classes))
    if shown := Window.parse(window):
        found = [replace(record, image=Plane(file_of(record.image), window=shown)) for record in found]
    records.check_once(found, str(root))
    if seen.has_splits:
        places, splits = [record.place for record in found], [record.columns["split"] for record in found]
        records.check_splits(places, [record.group for record in found], splits, "patient", str(root))
    _check_empty(seen, where, drop_classes, classes)
    columns = {key: [record.columns[key] for record in found] for key in found[0].columns}
    columns |= {"label": [record.labels[0] for record in found]}
    kept = matching(columns, where, str(root))
    found = [record for record, keep in zip(found, kept, strict=True) if keep]
    there = {record.labels[0] for record in found}
    bare = {label for _, label, _ in seen.empty} - there  # classes without images have no records to drop
    found = records.drop(found, [name for name in drop_classes if name not in bare], str(root))
    return records.to_dataset(
        found,
        records.resolve_classes(found, classes, str(root)),
        name=name or root.absolute().name,
        origin=str(root),
        multi_label=False,
        image_size=image_size,
        crop=crop,
        resize=resize,
        on_bad_image=on_bad_image,
        cache_bytes=cache_bytes,
        workers=workers,
        tiles=tiles,
        notes=seen.notes,
    )


def _check_empty(found: Layout, where: str, dropped: Sequence[str], classes: Sequence[str]) -> None:
    """Refuse a class folder without images, unless the user drops the class."""
    clauses = dict(clause.split("=", 1) for clause in where.replace(" ", "").split(",") if "=" in clause)
    wanted = {key: [identity.clean(part) for part in value.split("|")] for key, value in clauses.items()}
    for split, label, folder in found.empty:
        splits = {identity.split_name(name) for name in wanted.get("split", [""])}
        other_split = not splits & {"", split}
        if label in dropped or label not in wanted.get("label", [label]) or other_split:
            continue
        if split is not None and any(each.split == split for each in found.images) and label in classes:
            continue  # the user names this class; a split may lack it
        raise UserError(
            f"{folder}: a class folder without images; {why_empty(folder)}; expected images, or "
            f"drop_classes={label!r}"
        )


def patient_pattern(group: str) -> re.Pattern[str] | None:
    """Return the regular expression that finds a patient in a path; None for an empty text.

    Raises:
        UserError: It is not a regular expression, or marks no group.
    """
    if not group:
        return None
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UserError(f"group={group!r} is not a regular expression ({error})") from error
    if pattern.groups < 1:
        raise UserError(
            f"group={group!r} marks no part of the path as the patient; put it in brackets: ({group})"
        )
    return pattern


def _records(
    root: Path, pattern: re.Pattern[str] | None, classes: Sequence[str]
) -> tuple[list[Record], Layout]:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; {nearest_beside(root, Path.is_dir)}")
    found = layout.read(root, classes)
    if not found.images:
        if found.empty:
            _, label, folder = found.empty[0]
            raise UserError(f"{root}: no images; class folder {label!r}: {why_empty(folder)}")
        expected = "SPLIT/CLASS/image.png" if found.has_splits else "CLASS/image.png"
        raise MissingLabelsError(f"{root}: no images; expected {expected} with one of {', '.join(IMAGES)}")
    images = []
    for image in found.images:
        written = image.file.relative_to(root).as_posix()
        match = pattern.search(written) if pattern else None
        if pattern and not (match and match[1]):
            raise UserError(f"{image.file}: group={pattern.pattern!r} finds no patient in {written!r}")
        columns = {} if image.split is None else {"split": image.split}
        group = match[1] if match else ""
        images.append(
            Record(
                written,
                image=image.file,
                written=written,
                labels=(image.label,),
                group=group,
                columns=columns,
            )
        )
    return images, found
