"""The manifest: a CSV file beside the images, with one row per image.

`image,label[,mask][,patient][,split][,source][,...]`; image and mask paths are relative to the manifest.
Several labels of one image are joined by `|`, or there is one 0/1 column per class (then
`label="edema,effusion"` names the columns). A slice of a volume, page of a TIFF or frame of a DICOM file is
written `scan.nii.gz[12]`, counted from 0.

Columns with other usual names (`filename`, `diagnosis`, `Patient ID`, `subset`) are used if the choice is
unambiguous, and `Dataset.notes` lists them; see `dapt_jax.data.columns`.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dapt_jax.data import identity, records
from dapt_jax.data.columns import Roles, columns_of
from dapt_jax.data.dataset import LABEL, Dataset, matching
from dapt_jax.data.decode import CACHE_BYTES
from dapt_jax.data.lists import read_columns
from dapt_jax.data.paths import Finder, true_path
from dapt_jax.data.plane import Plane, Window
from dapt_jax.data.records import Record
from dapt_jax.data.tiles import Tiles
from dapt_jax.errors import UserError, nearest

_INDEX = re.compile(r"\[(\d+)\]$")
_UNLABELLED = ""
_FORMULA_ERROR = re.compile(r"#(?:REF!|VALUE!|DIV/0!|NUM!|NULL!|NAME\?)")
_ROUNDED = re.compile(r"\d(?:[.,]\d+)?E\+\d{2,}")
_VALUES = {"0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0}


def load_manifest(
    path: str | Path,
    *,
    image_size: int,
    label: str = "label",
    classes: Sequence[str] = (),
    drop_classes: Sequence[str] = (),
    where: str = "",
    crop: int | None = None,
    resize: str = "squash",
    group: str = "patient",
    on_bad_image: str = "error",
    cache_bytes: int = CACHE_BYTES,
    workers: int | None = None,
    name: str = "",
    segments: Sequence[str] = (),
    window: str = "",
    axis: int = 2,
    mask_orientation: str = "",
    tiles: Tiles | None = None,
) -> Dataset:
    """Read a manifest and check every row and file that it names.

    Args:
        path: The CSV file (comma, semicolon or tab between cells; UTF-8).
        image_size: Side of the images in pixels.
        label: The label column, which a set with `segments` may lack; or several 0/1 columns joined by
            commas, one per class, blank for a missing label; empty to read no labels. A label column in which
            any cell holds `|` makes the set multi-label; a blank then means no class.
        classes: The classes in the wanted order; by default all labels of the selected rows, numbers in
            numerical order, names alphabetically (or the 0/1 columns).
        drop_classes: Labels whose rows are left out; "nan" stands for rows without a label. In a multi-label
            set the labels are removed and the rows remain.
        where: Condition that selects rows, see `Dataset.where`; applied before labels and files are checked.
        crop: Side in pixels of a centre crop before resizing, see `dapt_jax.data.decode.decode`.
        resize: How an image that is not square becomes one: `squash`, `pad` or `crop`, see `Framing`.
        group: Column that names the patient, or another group that splits must not separate; "image" makes
            each image its own group. By default "patient" or a column with another usual name; without one,
            the PatientID of DICOM files; other images are groups of their own.
        on_bad_image: "error", or "skip" to leave out and count images that are missing or cannot be read.
        cache_bytes: See `ImageStore.from_files`.
        workers: Number of decoding threads; see `ImageStore.verify`.
        name: Name of the data set; by default the name of the manifest's folder.
        segments: Name of each mask value of a segmentation set, see `Dataset.segmented`.
        window: Black and white values of the images, see `Window.parse`; "" for the rule of each kind of
            file.
        axis: Axis of NIfTI volumes along which "volume.nii.gz[12]" counts, in the file's own order: 0
            sagittal, 1 coronal, 2 axial.
        mask_orientation: Orientation of masks without coordinates beside NIfTI slices (or the reverse):
            "shown" or "stored", see `dapt_jax.data.masks.Placed`; "" refuses them.
        tiles: How images are cut into tiles; None for whole images.

    Returns:
        The data set; columns other than image, label, mask and group are in `columns`, and a split column of
        another name is also available as "split".

    Raises:
        UserError: One line that names the file and row, the expected value, and the nearest valid choice.
    """
    manifest = Path(path)
    records.check_on_bad_image(on_bad_image)
    places, columns = read_columns(manifest)
    find = Finder(manifest.parent)
    needs_label = not segments or bool(classes or drop_classes)
    roles = columns_of(manifest, columns, find, label=label, group=group, needs_label=needs_label)
    if label and not roles.labels:  # a set of masks, whose images are of one class
        columns, roles = {**columns, LABEL: ["unlabelled"] * len(places)}, replace(roles, labels=(LABEL,))
    _check_cells(manifest, places, columns, roles)
    if roles.split:
        columns.setdefault("split", columns[roles.split])
        groups = [identity.patient(cell) for cell in columns.get(roles.group, [""] * len(places))]
        records.check_splits(places, groups, columns["split"], group, str(manifest))
        files = [_INDEX.sub("", image) for image in columns[roles.image]]
        named: dict[str, str] = {}
        files = [named.setdefault(true_path(roles.find(file)), file) if file else "" for file in files]
        records.check_splits(places, files, columns["split"], "image", str(manifest))

    label_columns = roles.labels
    if not label:  # one unspoken class, which `without_labels` removes at the end
        columns[_UNLABELLED], label_columns = ["image"] * len(places), (_UNLABELLED,)
    labels = columns[label_columns[0]]
    if len(label_columns) > 1:
        cells = zip(*(columns[name] for name in label_columns), strict=True)
        labels = [
            "|".join(n for n, cell in zip(label_columns, row, strict=True) if _VALUES.get(cell.casefold()))
            for row in cells
        ]
    known = {"image": columns[roles.image], LABEL: labels, **columns}
    known |= {"patient": columns[roles.group]} if roles.group else {}
    rows = np.flatnonzero(matching(known, where, str(manifest)))
    if roles.split:
        roles.notes.extend(_about_splits(manifest, places, known, roles.split, where, rows))
    per_class = len(label_columns) > 1
    classes, drop_classes = (tuple(map(identity.clean, names)) for names in (classes, drop_classes))
    if per_class and (
        strange := [other for other in (*classes, *drop_classes) if other not in label_columns]
    ):
        raise UserError(
            f"{manifest}: class {strange[0]!r} is not in label={label!r}; "
            f"{nearest(strange[0], label_columns)}"
        )
    if per_class:
        label_columns = tuple(column for column in classes or label_columns if column not in drop_classes)
    multi_label = per_class or any("|" in cell for cell in columns[label_columns[0]])
    spoken = set(classes)
    unlabelled = (
        [] if multi_label else [row for row in rows if _is_unlabelled(columns[label_columns[0]][row], spoken)]
    )
    dropped = {name for name in drop_classes if identity.is_missing(name)} - spoken
    if dropped and unlabelled:
        rows = np.setdiff1d(rows, unlabelled)
        drop_classes = tuple(name for name in drop_classes if name not in dropped)
        roles.notes.append(f"{manifest}: left out {len(unlabelled)} rows without a label on request")
    shown = Window.parse(window)
    if axis not in (0, 1, 2):
        raise UserError(f"axis={axis}; expected 0 (sagittal), 1 (coronal) or 2 (axial)")
    plain = set(columns) - {roles.image, roles.mask, roles.group, *label_columns}

    def record(row: int) -> Record:
        place, image = places[row], columns[roles.image][row]
        if identity.is_missing(image):
            raise UserError(f"{manifest}: {place}: no image named")
        cells = [columns[column][row] for column in label_columns]
        labels: tuple[str, ...] = ()
        values: tuple[float, ...] = ()
        if per_class:
            values = _values(cells, label_columns, f"{manifest}: {place}")
        else:
            parts = cells[0].split("|") if multi_label else cells
            labels = tuple(part for part in map(str.strip, parts) if not _is_unlabelled(part, spoken))
            if not labels and not multi_label:
                said = f" ({cells[0]!r})" if cells[0] else ""
                raise UserError(
                    f"{manifest}: {place}: {image} has no label{said}; expected a name in column "
                    f"{label_columns[0]!r}; drop_classes='nan' leaves such rows out"
                )
        mask = columns[roles.mask][row] if roles.mask else ""
        return Record(
            place=place,
            image=_source(roles.find, image, axis, shown),
            written=image,
            labels=labels,
            values=values,
            mask=None if identity.is_missing(mask) else _source(find, mask, axis),
            group=identity.patient(columns[roles.group][row]) if roles.group else "",
            columns={column: columns[column][row] for column in columns if column in plain},
        )

    chosen = [record(int(row)) for row in rows]
    records.check_once(chosen, str(manifest))
    if per_class:
        names = tuple(label_columns)
    else:
        chosen = records.drop(chosen, drop_classes, str(manifest), multi_label)
        names = records.resolve_classes(chosen, classes, str(manifest))
    dataset = records.to_dataset(
        chosen,
        names,
        name=name or manifest.absolute().parent.name,
        origin=str(manifest),
        multi_label=multi_label,
        image_size=image_size,
        crop=crop,
        resize=resize,
        on_bad_image=on_bad_image,
        cache_bytes=cache_bytes,
        workers=workers,
        segments=segments,
        mask_orientation=mask_orientation,
        tiles=tiles,
        notes=roles.notes,
    )
    return dataset if label else dataset.without_labels()


def _about_splits(
    manifest: Path,
    places: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    split: str,
    where: str,
    rows: np.ndarray,
) -> list[str]:
    """Return a line where rows of several splits are one set unasked, and one for each cell that misspells a split."""
    cells = columns[split]
    splits = {identity.split_name(cell) for cell in set(cells)} - {""}
    lines = []
    asked = {
        name
        for clause in where.split(",")
        for name in identity.column(clause.partition("=")[0].strip(), columns)
    }
    counts = Counter(identity.split_name(cells[row]) for row in rows)
    if len(counts.keys() - {""}) > 1 and not asked & {split, "split"}:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items() if name)
        lines.append(
            f"{manifest}: rows of all splits in column {split!r} are used as one set ({listed}); where='split="
            f"{next(filter(None, counts))}' selects those of one"
        )
    unknown = {
        cell: place for place, cell in zip(places, cells, strict=True) if not identity.split_name(cell)
    }
    for cell, place in unknown.items():
        hint = nearest(cell.casefold(), sorted(splits)) if splits and not identity.is_missing(cell) else ""
        if hint.startswith("did you mean"):
            lines.append(f"{manifest}: {place}: {cell!r} in column {split!r} names no split; {hint}")
    return lines


def _check_cells(
    manifest: Path, places: Sequence[str], columns: Mapping[str, Sequence[str]], roles: Roles
) -> None:
    """Refuse what a spreadsheet has put in the place of a value, which would be one patient or class for many."""
    for column in filter(None, (roles.image, *roles.labels, roles.mask, roles.group, roles.split)):
        for place, cell in zip(places, columns[column], strict=True):
            at = f"{manifest}: {place}: {cell!r} in column {column!r}"
            if _FORMULA_ERROR.fullmatch(cell):
                raise UserError(f"{at} is the error of a formula; expected its value, or blank")
            if column == roles.group and _ROUNDED.fullmatch(cell):
                raise UserError(
                    f"{at} is a number that a spreadsheet has rounded, and several patients may share it; expected all "
                    "of its digits: format the column as text before numbers are entered"
                )


def _is_unlabelled(cell: str, named: Collection[str]) -> bool:
    """Return whether a cell names no class; "NA" names one if the user lists it as a class."""
    return identity.is_missing(cell) and cell not in named


def _source(find: Finder, written: str, axis: int, window: Window | None = None) -> Path | Plane:
    path, found = find(_INDEX.sub("", written)), _INDEX.search(written)
    if found is None and window is None:
        return path
    return Plane(path, int(found[1]) if found else None, axis, window=window)


def _values(cells: Sequence[str], label_columns: Sequence[str], place: str) -> tuple[float, ...]:
    found = []
    for cell, column in zip(cells, label_columns, strict=True):
        value = float("nan") if identity.is_missing(cell) else _VALUES.get(cell.casefold())
        if value is None:
            raise UserError(f"{place}: {column} is {cell!r}, expected 0, 1 or blank (missing)")
        found.append(value)
    return tuple(found)
