"""Identification of the image, label, patient, split and mask columns of a table by their usual names."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dapt_jax.data import identity
from dapt_jax.data.paths import IMAGES, VOLUMES, Finder, true_path
from dapt_jax.errors import MissingLabelsError, UserError, nearest

_FEW = 10
_INDEX = r"\[\d+\]$"


@dataclass(frozen=True)
class Roles:
    """Roles of the columns of a table.

    Attributes:
        image: The column of images.
        labels: The columns of labels; none of a set of masks without one.
        group: The column of patients; "" if there is none.
        split: The column of splits; "" if there is none.
        mask: The column of masks; "" if there is none.
        find: Finds the files of images: beside the table, or in the only folder below it that holds all of
            them.
        notes: A line for each column that was used although it has another name, and for one that seems to
            identify patients and is not used.
    """

    image: str
    labels: tuple[str, ...]
    group: str
    split: str
    mask: str
    find: Finder
    notes: list[str] = field(default_factory=list)


def columns_of(
    manifest: Path,
    columns: Mapping[str, Sequence[str]],
    find: Finder,
    *,
    label: str,
    group: str,
    needs_label: bool = True,
) -> Roles:
    """Return the roles of a table's columns.

    A column of another name is used only if the choice is unambiguous: an image column if its cells name
    files, a label column if its values repeat, and a split column if every value is the name of a split.

    Args:
        manifest: The table, for error lines.
        columns: Cells of the table, by column.
        find: Finds the files that cells name.
        label: See `load_manifest`.
        group: See `load_manifest`.
        needs_label: Whether a table without a column of labels is refused.

    Raises:
        UserError: No column fits, or several do.
    """
    notes: list[str] = []
    for name in identity.column("image", columns, identity.IMAGE_NAMES):
        bare = [re.sub(_INDEX, "", cell) for cell in columns[name] if not identity.is_missing(cell)]
        if folder := find.below(bare):
            find = Finder(folder)
            notes.append(f"{manifest}: its images lie in {folder}")
            break
    image = _image(manifest, columns, find, notes)
    free = {name: cells for name, cells in columns.items() if name != image}
    labels = _labels(manifest, columns, free, label, notes, needs_label)
    free = {name: cells for name, cells in free.items() if name not in labels}
    mask = _mask(free, notes, manifest)
    split = _split(free, notes, manifest)
    free = {name: cells for name, cells in free.items() if name not in (mask, split)}
    patients = _group(manifest, columns, free, group, image, notes)
    return Roles(image, labels, patients, split, mask, find, notes)


def _image(manifest: Path, columns: Mapping[str, Sequence[str]], find: Finder, notes: list[str]) -> str:
    candidates = identity.column("image", columns, identity.IMAGE_NAMES)
    if len(candidates) > 1 or (
        candidates and identity.column_key(candidates[0]) in ("id", "imageid", "idcode")
    ):
        candidates = _distinct(
            [name for name in candidates if _name_files(columns[name], find)], columns, find
        )
    return _one(manifest, "image", candidates, columns, notes, "names the images")


def _distinct(names: Sequence[str], columns: Mapping[str, Sequence[str]], find: Finder) -> list[str]:
    """Return one column of each set of columns that name the same files, the first."""
    seen: dict[tuple[str, ...], str] = {}
    for name in names:
        seen.setdefault(tuple(true_path(find(cell)) for cell in columns[name][:200]), name)
    return list(seen.values())


def _name_files(cells: Sequence[str], find: Finder) -> bool:
    named = [cell for cell in cells[:200] if not identity.is_missing(cell)]
    return any(os.path.isfile(find(re.sub(_INDEX, "", cell))) for cell in named)


def _labels(
    manifest: Path,
    columns: Mapping[str, Sequence[str]],
    free: Mapping[str, Sequence[str]],
    label: str,
    notes: list[str],
    needs_label: bool,
) -> tuple[str, ...]:
    if not label:
        return ()
    wanted = [part.strip() for part in label.split(",")]
    if len(wanted) > 1 or wanted[0] != "label":
        return tuple(_one(manifest, name, identity.column(name, free), columns, notes) for name in wanted)
    candidates = identity.column("label", free, identity.LABEL_NAMES)
    if candidates and identity.column_key(candidates[0]) != "label":
        candidates = [name for name in candidates if _repeat(free[name])]
        if len(candidates) > 1 and identity.same_partition(free, candidates):
            # The number and the name of a class are equivalent; the name is more informative.
            candidates = sorted(candidates, key=lambda name: identity.in_order(set(free[name]))[1])[:1]
    if not candidates:
        flags = [
            name
            for name, cells in free.items()
            if {*cells} <= {"0", "1", "0.0", "1.0"} and len({*cells}) == 2
        ]
        if len(flags) > 1:
            raise UserError(
                f"{manifest}: no column 'label', but {len(flags)} columns of 0 and 1: "
                f"label={','.join(flags[:30])!r}"
            )
        if not needs_label:
            notes.append(
                f"{manifest}: no column 'label': its images count as one class, and masks alone as targets"
            )
            return ()
        raise MissingLabelsError(_missing(manifest, "label", columns))
    return (_one(manifest, "label", candidates, columns, notes, "holds the labels"),)


def _repeat(cells: Sequence[str]) -> bool:
    named = [cell for cell in cells if not identity.is_missing(cell)]
    return bool(named) and (len(named) < _FEW or 2 * len(set(named)) <= len(named))


def _mask(free: Mapping[str, Sequence[str]], notes: list[str], manifest: Path) -> str:
    if "mask" in free:
        return "mask"
    candidates = [
        name
        for name in identity.column("mask", free, identity.MASK_NAMES)
        if all(_is_file_name(cell) for cell in free[name] if not identity.is_missing(cell))
        and any(free[name])
    ]
    if len(candidates) != 1:
        return ""
    notes.append(f"{manifest}: column {candidates[0]!r} names the masks")
    return candidates[0]


def _is_file_name(cell: str) -> bool:
    return re.sub(_INDEX, "", cell.lower()).endswith((*IMAGES, *VOLUMES, ".npy"))


def _split(free: Mapping[str, Sequence[str]], notes: list[str], manifest: Path) -> str:
    if "split" in free:
        return "split"
    found = []
    for name, cells in free.items():
        values = {cell for cell in cells if not identity.is_missing(cell)}
        splits = {identity.split_name(value) for value in values}
        named = identity.column_key(name) == "split"
        if named or (len(splits) > 1 and "" not in splits and splits & {"train", "test"}):
            found.append(name)
    if found:
        more = "" if len(found) == 1 else f", not {', '.join(map(repr, found[1:]))}"
        notes.append(f"{manifest}: column {found[0]!r} names the splits{more}")
        return found[0]
    return ""


def _group(
    manifest: Path,
    columns: Mapping[str, Sequence[str]],
    free: Mapping[str, Sequence[str]],
    group: str,
    image: str,
    notes: list[str],
) -> str:
    if group != "patient":
        found = _one(manifest, group, identity.column(group, columns), columns, notes)
        return "" if found == image else found
    candidates = [
        name
        for name in identity.patient_columns(free)
        if name == "patient" or not identity.names_two_states(free[name])
    ]
    chosen = candidates[0] if candidates else ""
    if chosen and chosen != "patient":
        own = [identity.patient(cell) for cell in free[chosen]]
        for other in candidates[1:]:
            if identity.joins([identity.patient(cell) for cell in free[other]], own):
                raise UserError(
                    f"{manifest}: columns {chosen!r} and {other!r} both seem to name patients and disagree; "
                    f"expected one, such as group={chosen!r}"
                )
        notes.append(f"{manifest}: column {chosen!r} names the patients")
    groups = [identity.patient(cell) for cell in free[chosen]] if chosen else [""] * len(columns[image])
    groups = [name or f"row {row}" for row, name in enumerate(groups)]
    for name, cells in free.items():
        named = [identity.patient(cell) for cell in cells]
        if name != chosen and identity.looks_like_identities(name, cells) and identity.joins(named, groups):
            used = f"patients are those of {chosen!r}" if chosen else "no column names patients"
            notes.append(
                f"{manifest}: {used}, but {name!r} looks like identities ({len({*named} - {''})} in "
                f"{len(cells)} rows); group={name!r} keeps each of them on one side of every split"
            )
    return chosen


def _one(
    manifest: Path,
    wanted: str,
    candidates: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    notes: list[str],
    is_for: str = "",
) -> str:
    """Return the only candidate, and note it if it has another name."""
    if len(candidates) > 1:
        listed = " or ".join(map(repr, candidates))
        raise UserError(
            f"{manifest}: no column {wanted!r}; it could be {listed}; expected {_way_out(wanted, candidates)}"
        )
    if not candidates:
        raise UserError(_missing(manifest, wanted, columns))
    if candidates[0] != wanted and is_for:
        notes.append(f"{manifest}: column {candidates[0]!r} {is_for}")
    return candidates[0]


def _missing(manifest: Path, wanted: str, columns: Mapping[str, Sequence[str]]) -> str:
    hint = nearest(wanted, columns)
    listed = "" if hint.startswith("valid") else f" its columns: {', '.join(columns)}"
    return f"{manifest}: no column {wanted!r}; {hint}{listed}"


def _way_out(wanted: str, candidates: Sequence[str]) -> str:
    return f"{wanted}={candidates[0]!r}" if wanted == "label" else f"one column named {wanted!r}"
