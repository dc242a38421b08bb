"""The manifest: a CSV file beside the images, one row per image.

`image,label[,mask][,patient][,split][,source][,...]`, image and mask paths relative to the manifest. Several labels of
one image are joined by `|`, or there is one 0/1 column per class (then `label="edema,effusion"` names the columns). A slice of
a volume, page of a TIFF or frame of a DICOM file is written `scan.nii.gz[12]`, counted from 0.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dapt_jax.data import records
from dapt_jax.data.dataset import Dataset, matching
from dapt_jax.data.decode import CACHE_BYTES
from dapt_jax.data.lists import read_columns
from dapt_jax.data.plane import Plane, Window
from dapt_jax.data.records import Record
from dapt_jax.errors import UserError, nearest

_INDEX = re.compile(r"\[(\d+)\]$")
_VALUES = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "": float("nan")}


def load_manifest(
    path: str | Path,
    *,
    image_size: int,
    label: str = "label",
    classes: Sequence[str] = (),
    drop_classes: Sequence[str] = (),
    where: str = "",
    crop: int | None = None,
    group: str = "patient",
    on_bad_image: str = "error",
    cache_bytes: int = CACHE_BYTES,
    workers: int | None = None,
    name: str = "",
    segments: Sequence[str] = (),
    window: str = "",
    axis: int = 2,
    mask_orientation: str = "",
) -> Dataset:
    """Reads a manifest and checks every row and file that it names.

    Args:
        path: the CSV file (comma, semicolon or tab between cells; UTF-8).
        image_size: side of the images in pixels.
        label: the label column; or several 0/1 columns joined by commas, one per class, blank where missing.
            A label column in which any cell holds `|` makes the set multi-label; there a blank means no class.
        classes: the classes in the order wanted; by default all labels of the rows kept, sorted (or the 0/1 columns).
        drop_classes: labels whose rows are left out. In a multi-label set the labels go and the rows stay.
        where: which rows to use, see `Dataset.where`; applied before any label or file is looked at.
        crop: side in pixels of a centre crop before resizing, see `dapt_jax.data.decode.decode`.
        group: column that names the patient, or another group that splits must not separate. A manifest without a
            "patient" column is fine: each image is its own group.
        on_bad_image: "error", or "skip" to leave out and count images that are missing or cannot be read.
        cache_bytes: see `ImageStore.from_files`.
        workers: threads that decode; see `ImageStore.verify`.
        name: name of the data set; by default the name of the manifest's folder.
        segments: of a set to be segmented, the name of each value of the masks, see `Dataset.segmented`.
        window: black and white of the images, see `Window.parse`; "" for the rule of each kind of file.
        axis: of NIfTI volumes, along which "volume.nii.gz[12]" counts, in the file's own order: 0 sagittal, 1 coronal,
            2 axial.
        mask_orientation: of masks without coordinates beside NIfTI slices (or the reverse): "shown" or "stored", see
            `dapt_jax.data.masks.Placed`; "" refuses them.

    Returns:
        The data set; columns that are not image, label, mask or group are in `columns`.

    Raises:
        UserError: one line that names the file and row, what was expected, and the nearest valid choice.
    """
    manifest = Path(path)
    records.check_on_bad_image(on_bad_image)
    places, columns = read_columns(manifest)
    label_columns = [part.strip() for part in label.split(",")]
    wanted = ["image", *label_columns, *([group] if group != "patient" else [])]
    for column in wanted:
        if column not in columns:
            hint = nearest(column, columns)
            listed = "" if hint.startswith("valid") else f" its columns: {', '.join(columns)}"
            raise UserError(f"{manifest}: no column {column!r}; {hint}{listed}")
    if "split" in columns:
        groups = columns.get(group, [""] * len(places))
        records.check_splits(places, groups, columns["split"], group, str(manifest))
        files = [_INDEX.sub("", image) for image in columns["image"]]
        records.check_splits(places, files, columns["split"], "image", str(manifest))

    rows = np.flatnonzero(matching(columns, where, str(manifest)))
    per_class = len(label_columns) > 1
    if per_class and (strange := [other for other in (*classes, *drop_classes) if other not in label_columns]):
        raise UserError(
            f"{manifest}: class {strange[0]!r} is not in label={label!r}; {nearest(strange[0], label_columns)}"
        )
    if per_class:
        label_columns = [column for column in classes or label_columns if column not in drop_classes]
    multi_label = per_class or any("|" in cell for cell in columns[label_columns[0]])
    shown = Window.parse(window)
    if axis not in (0, 1, 2):
        raise UserError(f"axis={axis}; expected 0 (sagittal), 1 (coronal) or 2 (axial)")
    plain = set(columns) - {"image", "mask", group, *label_columns}

    def record(row: int) -> Record:
        place, image = places[row], columns["image"][row]
        if not image:
            raise UserError(f"{manifest}: {place}: no image named")
        cells = [columns[column][row] for column in label_columns]
        labels: tuple[str, ...] = ()
        values: tuple[float, ...] = ()
        if per_class:
            values = _values(cells, label_columns, f"{manifest}: {place}")
        else:
            labels = tuple(part for part in map(str.strip, cells[0].split("|")) if part)
            if not labels and not multi_label:
                raise UserError(f"{manifest}: {place}: {image} has no label; expected a name in column {label!r}")
        mask = columns["mask"][row] if "mask" in columns else ""
        return Record(
            place=place,
            image=_resolve(manifest, image, axis, shown),
            written=image,
            labels=labels,
            values=values,
            mask=_resolve(manifest, mask, axis) if mask else None,
            group=columns[group][row] if group in columns else "",
            columns={column: columns[column][row] for column in columns if column in plain},
        )

    chosen = [record(int(row)) for row in rows]
    records.check_once(chosen, str(manifest))
    if per_class:
        names = tuple(label_columns)
    else:
        chosen = records.drop(chosen, drop_classes, str(manifest), multi_label)
        names = records.resolve_classes(chosen, classes, str(manifest))
    return records.to_dataset(
        chosen,
        names,
        name=name or manifest.absolute().parent.name,
        origin=str(manifest),
        multi_label=multi_label,
        image_size=image_size,
        crop=crop,
        on_bad_image=on_bad_image,
        cache_bytes=cache_bytes,
        workers=workers,
        segments=segments,
        mask_orientation=mask_orientation,
    )


def _resolve(manifest: Path, written: str, axis: int, window: Window | None = None) -> Path | Plane:
    # Manifests made on Windows separate folders by backslashes.
    path = manifest.parent / _INDEX.sub("", written).replace("\\", "/")
    found = _INDEX.search(written)
    if found is None and window is None:
        return path
    return Plane(path, int(found[1]) if found else None, axis, window=window)


def _values(cells: Sequence[str], label_columns: Sequence[str], place: str) -> tuple[float, ...]:
    for cell, column in zip(cells, label_columns, strict=True):
        if cell not in _VALUES:
            raise UserError(f"{place}: {column} is {cell!r}, expected 0, 1 or blank (missing)")
    return tuple(_VALUES[cell] for cell in cells)
