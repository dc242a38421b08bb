"""Corpora without labels: every picture below a folder, slices of volumes, or a table without a label column.

For objectives that need no labels (see `dapt_jax.objectives`). A folder is listed once, pixels are read lazily
(see `ImageStore`), and folder names mean nothing.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dapt_jax.data import lists, mask_names, nifti, records
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.decode import CACHE_BYTES
from dapt_jax.data.folders import patient_pattern
from dapt_jax.data.manifest import load_manifest
from dapt_jax.data.paths import IMAGES, holds_picture, walk
from dapt_jax.data.plane import Plane, Window
from dapt_jax.data.records import Record
from dapt_jax.data.tiles import Tiles
from dapt_jax.errors import UserError, nearest_beside

_NIFTI = (".nii", ".nii.gz")
_ANY = "image"


def load_images(
    path: str | Path,
    *,
    image_size: int,
    where: str = "",
    crop: int | None = None,
    resize: str = "squash",
    group: str = "",
    on_bad_image: str = "error",
    cache_bytes: int = CACHE_BYTES,
    workers: int | None = None,
    name: str = "",
    window: str = "",
    axis: int = 2,
    tiles: Tiles | None = None,
) -> Dataset:
    r"""Read pictures without labels: a folder of any structure, or a manifest whose labels are not read.

    Args:
        path: A folder, of which every picture at any depth is read: image files, DICOM files, and every slice
            of a NIfTI volume, but no masks, which their names tell (see `dapt_jax.data.mask_names.apart`); or a
            CSV file (see `load_manifest`), of which the column of images, and those of
            patients and splits if there are any, are read.
        image_size: Side of the images in pixels.
        where: Condition that selects rows of a manifest, see `Dataset.where`.
        crop: Side in pixels of a centre crop before resizing, see `dapt_jax.data.decode.decode`.
        resize: How an image that is not square becomes one: `squash`, `pad` or `crop`, see `Framing`.
        group: Of a folder, a regular expression whose first group, searched in an image's path below `path`,
            is the patient, such as r"(P\d+)_"; of a manifest, the column of patients. By default DICOM files
            are grouped by PatientID, the slices of a volume form a group, and every other image is its own
            group.
        on_bad_image: "error", or "skip" to leave out and count images that cannot be read.
        cache_bytes: See `ImageStore.from_files`.
        workers: Number of decoding threads; see `ImageStore.verify`.
        name: Name of the data set; by default that of the folder.
        window: Black and white values of the images, see `Window.parse`; "" for the rule of each kind of
            file.
        axis: Axis of NIfTI volumes: 0 sagittal, 1 coronal, 2 axial slices.
        tiles: How images are cut into tiles; None for whole images.

    Returns:
        The data set, without classes: see `Dataset.is_labelled`.

    Raises:
        UserError: The path does not exist, holds no picture, or a file cannot be read; names it.
    """
    root = Path(path)
    records.check_on_bad_image(on_bad_image)
    if axis not in (0, 1, 2):
        raise UserError(f"axis={axis}; expected 0 (sagittal), 1 (coronal) or 2 (axial)")
    shared: dict[str, Any] = {
        "image_size": image_size,
        "crop": crop,
        "resize": resize,
        "on_bad_image": on_bad_image,
        "cache_bytes": cache_bytes,
        "workers": workers,
        "tiles": tiles,
    }
    if root.suffix.lower() in lists.TABLES:
        return load_manifest(
            root,
            label="",
            where=where,
            group=group or "patient",
            name=name,
            window=window,
            axis=axis,
            **shared,
        )
    if not root.is_dir():
        hint = nearest_beside(root, lambda entry: entry.is_dir() or entry.suffix.lower() in lists.TABLES)
        raise UserError(f"{root}: no such folder; {hint}")
    if where:
        raise UserError(
            f"{root}: where={where!r} selects rows of a manifest; expected the path of a CSV file"
        )
    found, notes = _records(root, group, Window.parse(window), axis)
    dataset = records.to_dataset(
        found,
        (_ANY,),
        name=name or root.absolute().name,
        origin=str(root),
        multi_label=False,
        notes=notes,
        **shared,
    )
    return dataset.without_labels()


def _records(root: Path, group: str, window: Window | None, axis: int) -> tuple[list[Record], Sequence[str]]:
    pattern, files, others = patient_pattern(group), list[Path](), Counter[str]()
    for file in walk(root):
        if _is_volume(file) or holds_picture(file):
            files.append(file)
        else:
            others[file.suffix.lower() or "no suffix"] += 1
    if not files:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common(4))
        held = f"it holds files of other kinds ({kinds})" if others else "it is empty"
        raise UserError(f"{root}: no images; {held}; expected {', '.join(IMAGES[:4])}, DICOM or NIfTI files")
    kept, notes = mask_names.apart(files, root)
    if not kept:
        raise UserError(
            f"{root}: holds {mask_names.images(len(files))}, all in folders named as masks, first: {files[0]}; "
            "expected images beside them, or the path of such a folder itself if it holds images"
        )
    found = []
    for file in kept:
        written = file.relative_to(root).as_posix()
        patient = _patient(pattern, written, file) if pattern else ""
        found += [
            Record(written, image=each, written=written, labels=(_ANY,), group=patient)
            for each in _planes(file, window, axis)
        ]
    records.check_once(found, str(root))
    kinds = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common(6))
    return found, [*notes, *([f"{root}: left out files that are not images: {kinds}"] if others else [])]


def _planes(file: Path, window: Window | None, axis: int) -> Sequence[Path | Plane]:
    """Return the pictures of an image file or volume."""
    if _is_volume(file):
        return [Plane(file, index, axis, window=window) for index in range(nifti.length(file, axis))]
    return [Plane(file, window=window) if window else file]


def _is_volume(file: Path) -> bool:
    return file.name.lower().endswith(_NIFTI)


def _patient(pattern: re.Pattern[str], written: str, file: Path) -> str:
    match = pattern.search(written)
    if not (match and match[1]):
        raise UserError(f"{file}: group={pattern.pattern!r} finds no patient in {written!r}")
    return match[1]
