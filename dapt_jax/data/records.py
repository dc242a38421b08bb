"""Conversion of image records to a `Dataset`, with the checks that all readers of files share."""

import functools
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from absl import logging

from dapt_jax.data import (
    arrays,
    dicom,
    formats,
    identity,
    intensity,
    limits,
    mask_values,
    masks,
    near_duplicates,
    tiling,
)
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.decode import CACHE_BYTES, ImageStore
from dapt_jax.data.framing import Framing
from dapt_jax.data.mask_values import Drawn, Facts
from dapt_jax.data.masks import Mask
from dapt_jax.data.paths import true_path
from dapt_jax.data.plane import Plane, Source, file_of, plane
from dapt_jax.data.record import Record
from dapt_jax.data.tiles import Tiles
from dapt_jax.errors import UserError, nearest

ON_BAD_IMAGE = ("error", "skip")
_UID = re.compile(r"\d+(\.\d+)+")
_FLAGS = ({"0", "false", "no"}, {"1", "true", "yes"})
"""Labels that say the same, as `identity.spelling` gives them."""
_JOINING = (";", ",", "/", "+")
"""Signs by which tables join labels in their own way; this library's is |."""


def check_on_bad_image(choice: str) -> None:
    """Refuse any value except "error" and "skip"."""
    if choice not in ON_BAD_IMAGE:
        raise UserError(f"on_bad_image={choice!r}; {nearest(choice, ON_BAD_IMAGE)}")


def check_splits(
    places: Sequence[str], groups: Sequence[str], splits: Sequence[str], word: str, origin: str
) -> None:
    """Refuse a source in which one group is in two splits.

    Args:
        places: Location of each row ("row 5").
        groups: The group of each row; rows with "" are not checked.
        splits: The split of each row, in any spelling; rows with a missing one are not checked.
        word: Name for a group in errors ("patient").
        origin: The file to name in errors.
    """
    seen: dict[str, tuple[str, str]] = {}
    torn: dict[str, str] = {}
    for place, group, split in zip(places, groups, splits, strict=True):
        if not group or identity.is_missing(split):
            continue
        first_split, first_place = seen.setdefault(group, (split, place))
        if _canonical(split) != _canonical(first_split) and group not in torn:
            numbered = all(where.startswith("row ") for where in (first_place, place))
            where = f"rows {first_place[4:]}, {place[4:]}" if numbered else f"{first_place}; {place}"
            torn[group] = f"{word} {group} is in splits {first_split!r} and {split!r} ({where})"
    if torn:
        more = f", and {len(torn) - 1} more like it" if len(torn) > 1 else ""
        raise UserError(f"{origin}: {next(iter(torn.values()))}{more}; a {word} belongs in one split")


def _canonical(split: str) -> str:
    return identity.split_name(split) or split


def check_once(records: Sequence[Record], origin: str) -> None:
    """Refuse a source that names an image twice, which would then count twice or have two labels."""
    seen: dict[Path | Plane, Record] = {}
    for record in records:
        image = plane(record.image)
        # Of a file that holds one picture, the picture 0 is the whole.
        first = seen.setdefault(
            replace(image, path=Path(true_path(image.path)), index=image.index or 0), record
        )
        if first is not record:
            labels = (
                f", as {'|'.join(first.labels)!r}, and here as {'|'.join(record.labels)!r}"
                if first.labels
                else ""
            )
            raise UserError(
                f"{origin}: {record.place}: {record.written} is in {first.place} already{labels}; "
                "expected one row per image; several labels of one image are joined by |"
            )


def with_patients(records: Sequence[Record]) -> list[Record]:
    """Return the records with the PatientID of DICOM files for those that name no patient."""
    return [
        replace(record, group=record.group or patient_of_file(file_of(record.image))) for record in records
    ]


def patient_of_file(file: Path) -> str:
    """Return the PatientID of a DICOM file; "" for other files and for an ID that names no patient.

    IDs that consist only of zeros, and words such as "anonymous", name no patient.
    """
    return _identity_of_file(file)[0]


def own_group(image: Source) -> str:
    """Return the group of an image without a patient.

    That of a DICOM file is its StudyInstanceUID, else its SeriesInstanceUID: series are kept as one file per slice.
    Slices and frames of one other file form a group; pictures of an array do not.
    """
    whole = plane(image).whole
    if study := _identity_of_file(whole.path)[1]:
        return study
    return str(whole) if formats.module(whole.path) is arrays else str(whole.path)


def is_own_group(group: str, image: Source) -> bool:
    """Return whether a group is that of an image without a patient, see `own_group`."""
    whole = plane(image).whole
    is_study = _UID.fullmatch(group) is not None and group == _identity_of_file(whole.path)[1]
    return is_study or group in (str(whole), str(whole.path))


def _identity_of_file(file: Path) -> tuple[str, str]:
    """Return the patient, and the study or series, that the header of a DICOM file names; "" for other files."""
    try:
        stat = file.stat()
        return _identity_in_header(file, stat.st_mtime_ns, stat.st_size)
    except (OSError, UserError):
        return "", ""  # unreadable files are reported when the pixels are read


@functools.lru_cache(maxsize=1 << 18)
def _identity_in_header(file: Path, changed: int, length: int) -> tuple[str, str]:
    del changed, length  # the path may refer to another file later
    if formats.module(file) is not dicom:
        return "", ""
    patient, *uids = dicom.header(file, ("PatientID", "StudyInstanceUID", "SeriesInstanceUID"))
    found = identity.patient(patient)
    return found if found.strip("0") else "", next(filter(None, uids), "")


def drop(
    records: Sequence[Record], names: Sequence[str], origin: str, multi_label: bool = False
) -> list[Record]:
    """Leave out the records of the named classes, and log their number.

    In a multi-label set the records remain without the named labels.

    Raises:
        UserError: No record has one of the names.
    """
    names = [identity.clean(name) for name in names]
    present = Counter(label for record in records for label in record.labels)
    for name in names:
        if name not in present:
            raise UserError(
                f"{origin}: drop_classes names {name!r}, which no row has; {nearest(name, present)}"
            )
    if names:
        listed = ", ".join(f"{name} ({present[name]})" for name in names)
        logging.info("%s: left out classes on request: %s", origin, listed)
    if multi_label:
        return [replace(record, labels=tuple(set(record.labels) - set(names))) for record in records]
    return [record for record in records if not set(record.labels) & set(names)]


def resolve_classes(records: Sequence[Record], classes: Sequence[str], origin: str) -> tuple[str, ...]:
    """Return the classes in order: the requested ones, or all labels, sorted.

    Numbers are sorted numerically, names alphabetically.

    Raises:
        UserError: A record has a label outside `classes`, a class is named twice, or, without `classes`, a label
            has two spellings, as `1` and `True` are, or is several others that another sign than | joins.
    """
    present = Counter(label for record in records for label in record.labels)
    if not classes:
        # Tables that were joined say the same in numbers and in words.
        flags = (
            tuple(name for name in sorted(present) if identity.spelling(name) in same) for same in _FLAGS
        )
        alike = [*identity.near_spellings(present), *(names for names in flags if len(names) > 1)]
        for first, other, *_ in alike:
            place = next(record.place for record in records if other in record.labels)
            raise UserError(
                f"{origin}: {place}: label {other!r} ({present[other]} rows), elsewhere {first!r} "
                f"({present[first]} rows); expected one spelling; labels that differ on purpose go into "
                "classes"
            )
        _check_joined(records, present, origin)
        return identity.in_order(present)[0]
    classes = tuple(identity.clean(name) for name in classes)
    if len(set(classes)) < len(classes):
        raise UserError(f"{origin}: classes name {Counter(classes).most_common(1)[0][0]!r} twice")
    for record in records:
        for label in record.labels:
            if label not in classes:
                raise UserError(
                    f"{origin}: {record.place}: label {label!r} ({present[label]} rows) is not in classes; "
                    f"{nearest(label, classes)}; rows to leave out go into drop_classes"
                )
    return classes


def _check_joined(records: Sequence[Record], present: Mapping[str, int], origin: str) -> None:
    """Refuse labels such as `edema;effusion` beside `edema` and `effusion`: two labels, not a third class."""
    known = {identity.spelling(label) for label in present}
    for label, sign in itertools.product(present, _JOINING):
        parts = [part for part in map(identity.clean, label.split(sign)) if part]
        if len(parts) > 1 and known.issuperset(map(identity.spelling, parts)):
            place = next(record.place for record in records if label in record.labels)
            raise UserError(
                f"{origin}: {place}: label {label!r} ({present[label]} rows) joins labels that other rows have, by "
                f"{sign!r}; expected {'|'.join(parts)!r} for an image with several labels; for a class of its own, "
                "name all classes in classes"
            )


def to_dataset(
    records: Sequence[Record],
    classes: tuple[str, ...],
    *,
    name: str,
    origin: str,
    multi_label: bool,
    image_size: int,
    crop: int | None = None,
    resize: str = "squash",
    on_bad_image: str = "error",
    cache_bytes: int = CACHE_BYTES,
    workers: int | None = None,
    segments: Sequence[str] = (),
    overlapping: bool = False,
    mask_orientation: str = "",
    tiles: Tiles | None = None,
    notes: Sequence[str] = (),
) -> Dataset:
    """Check that every file exists and can be read, and build the data set.

    Args:
        records: One record per image.
        classes: The classes in order; they include every label.
        name: Name of the data set.
        origin: The file or folder to name in errors.
        multi_label: Whether labels become float32 [n, classes] rather than int64 [n].
        image_size: Side of the images in pixels.
        crop: See `dapt_jax.data.decode.decode`.
        resize: See `dapt_jax.data.decode.decode`.
        on_bad_image: "error", or "skip" to leave out and count images that are missing or cannot be read.
        cache_bytes: See `ImageStore.from_files`.
        workers: Number of decoding threads; see `ImageStore.verify`.
        segments: Segments of a segmentation set, see `Dataset.segmented`; its masks are read and held in
            memory.
        overlapping: As in `Dataset.segmented`.
        mask_orientation: Orientation of masks without coordinates, see `dapt_jax.data.masks.Placed`.
        tiles: How images are cut into tiles, which become the images of the set; None for whole images.
        notes: See `Dataset.notes`.

    Raises:
        UserError: Files are missing or unreadable, or a mask differs in size from its image or contains a
            value without a segment; gives their number and names the first.
    """
    check_on_bad_image(on_bad_image)
    if tiles and crop:
        raise UserError(f"tile_size is {tiles.size} and crop is {crop}; expected one of them")
    skip = on_bad_image == "skip"
    if mask_orientation not in masks.ORIENTATIONS:
        raise UserError(
            f"mask_orientation={mask_orientation!r}; {nearest(mask_orientation, masks.ORIENTATIONS[1:])}"
        )
    there = [os.path.isfile(file_of(record.image)) for record in records]
    kept = [record for record, found in zip(records, there, strict=True) if found]
    if not all(there) and not skip:
        first = records[there.index(False)]
        raise UserError(
            f"{len(records) - len(kept)} of {len(records)} images named in {origin} do not exist, "
            f"first: {first.place}: {first.written}; {_near_files(file_of(first.image))}"
        )
    kept = [replace(each, mask=masks.place(each.mask, each.image, mask_orientation)) for each in kept]
    _check_masks(kept, origin)
    pictures = len(kept)
    if tiles:
        kept = tiling.cut(kept, tiles)
    store = ImageStore.from_files([record.image for record in kept], image_size, crop, cache_bytes, resize)
    seen, means = near_duplicates.Collector(len(kept)), np.ones(len(kept))

    def visit(index: int, pixels: np.ndarray) -> None:
        seen.add(index, pixels)
        means[index] = pixels.mean() / 255

    bad = store.verify(workers, visit)
    if bad and not skip:
        raise UserError(
            f"{tiling.count(kept[each.index] for each in bad)} of {pictures} images named in {origin} cannot be read, "
            f"first: {kept[bad[0].index].place}: {bad[0].reason}"
        )
    unreadable = {image.index for image in bad}
    good = np.array([index for index in range(len(kept)) if index not in unreadable], np.int64)
    skipped = len(records) - tiling.count(kept[index] for index in good)
    if skipped:
        reason = bad[0].reason if bad else f"{file_of(records[there.index(False)].image)}: no such file"
        notes = [*notes, f"{origin}: skipped {skipped} of {len(records)} images on request, first: {reason}"]
    if not len(good):
        raise UserError(f"{origin}: none of its {len(records)} images can be read")
    if tiles:
        bright = good[means[good] >= tiles.min_brightness]
        notes = [*notes, tiling.about([kept[index] for index in good], len(bright), tiles, origin)]
        if not len(bright):
            raise UserError(
                f"{origin}: all of its {len(good)} tiles are darker than tile_min_brightness="
                f"{tiles.min_brightness}; the brightest has {means[good].max():.3g}"
            )
        if without := {file_of(kept[i].image) for i in good} - {file_of(kept[i].image) for i in bright}:
            notes.append(f"{origin}: {len(without)} images have dark tiles only, first: {min(without)}")
        good = bright
        seen.of_pictures(store, good)
    kept = [kept[index] for index in good]
    named = with_patients(kept)
    if inside := sum(a.group != b.group for a, b in zip(named, kept, strict=True)):
        notes = [*notes, f"{origin}: the PatientID of {inside} DICOM files names their patients"]
        splits = [record.columns.get("split", "") for record in named]
        check_splits([r.place for r in named], [r.group for r in named], splits, "patient", origin)
    kept = named
    groups = [identity.patient(record.group) for record in kept]
    bare = [place for place, group in enumerate(groups) if not group]
    for place in bare:
        groups[place] = own_group(kept[place].image)
    if studies := [groups[place] for place in bare if _identity_of_file(file_of(kept[place].image))[1]]:
        notes = [
            *notes,
            f"{origin}: {len(studies)} images of DICOM files name no patient: each of their {len(set(studies))} studies "
            "(StudyInstanceUID, else SeriesInstanceUID) counts as one",
        ]
    images = store.take(good)
    near_duplicates.remember(images, seen.looks(good))

    columns: dict[str, list[str]] = defaultdict(list)
    for record in kept:
        for column, value in record.columns.items():
            columns[column].append(value)
    drawn = _checked_masks(kept, origin, images.framing, segments, overlapping, workers)
    dataset = Dataset(
        name=name,
        images=images,
        labels=_labels(kept, classes, multi_label),
        classes=classes,
        groups=np.array(groups, dtype=str),
        columns={column: np.array(values, dtype=str) for column, values in columns.items()},
        masks=drawn,
        skipped=skipped,
        spacing=_spacing(kept, images.framing) if segments else None,
        pixel_scale=_pixel_scale(kept, images.framing) if segments else None,
        notes=tuple(notes),
    )
    if segments:
        unit = "pixels of the files" if dataset.spacing is None else "millimetres"
        logging.info("%s: distances between surfaces are in %s", origin, unit)
    for row in dataset.intensity_summary():
        logging.info("%s: %s", origin, intensity.line(row))
    return dataset.segmented(segments, overlapping=overlapping) if segments else dataset


def _labels(records: Sequence[Record], classes: tuple[str, ...], multi_label: bool) -> np.ndarray:
    if not multi_label:
        return np.array([classes.index(record.labels[0]) for record in records], np.int64)
    if records[0].values:
        return np.array([record.values for record in records], np.float32)
    return np.array([[name in record.labels for name in classes] for record in records], np.float32)


def _check_masks(records: Sequence[Record], origin: str) -> None:
    named = [(record, record.mask) for record in records if record.mask is not None]
    absent = [
        next((file for file in masks.files(mask) if not os.path.isfile(file)), None) for _, mask in named
    ]
    missing = [(record, file) for (record, _), file in zip(named, absent, strict=True) if file]
    if missing:
        record, file = missing[0]
        raise UserError(
            f"{len(missing)} of {len(named)} masks named in {origin} do not exist, "
            f"first: {record.place}: {file}; {_near_files(file)}"
        )


def _checked_masks(
    records: Sequence[Record],
    origin: str,
    framing: Framing,
    segments: Sequence[str],
    overlapping: bool,
    workers: int | None,
) -> tuple[Mask | None, ...] | np.ndarray | None:
    """Return masks that fit their images: their locations or, for a segmentation set, their values."""
    if segments and (without := [record for record in records if record.mask is None]):
        first = f"{without[0].place}: {without[0].written}"
        raise UserError(f"{origin}: {len(without)} of {len(records)} images have no mask, first: {first}")
    values = 1 << max(len(segments) - 1, 0) if overlapping else len(segments)

    def attempt(record: Record) -> tuple[Drawn, Facts] | str | None:
        if record.mask is None:
            return None
        try:
            with limits.border(next(masks.files(record.mask), file_of(record.image)), "a mask"):
                image = formats.extent(record.image)
                drawn = masks.draw(record.mask) if segments else None
                mask = masks.extent(record.mask) if drawn is None else drawn.grey.shape
        except UserError as error:
            return str(error)
        if mask != image:
            return f"{record.mask}: {masks.of_other_size(mask, image)}"
        if drawn is None:
            return None
        alpha = None if drawn.alpha is None else framing.mask(drawn.alpha)
        return Drawn(framing.mask(drawn.grey), alpha), drawn.facts()

    with ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 16)) as pool:
        results = list(pool.map(attempt, records))
    bad = [(record, why) for record, why in zip(records, results, strict=True) if isinstance(why, str)]
    if bad:
        raise UserError(
            f"{len(bad)} masks named in {origin} cannot be used, first: {bad[0][0].place}: {bad[0][1]}"
        )
    if not segments:
        drawn = tuple(record.mask for record in records)
        return drawn if any(mask is not None for mask in drawn) else None
    pairs = [
        (record, result) for record, result in zip(records, results, strict=True) if isinstance(result, tuple)
    ]
    read = mask_values.convention((f"{each.place}: {each.mask}", facts) for each, (_, facts) in pairs)
    strange = [
        (record, facts) for record, (_, facts) in pairs if max(read.values(facts), default=0) >= values
    ]
    if strange:
        record, found = strange[0][0], read.values(strange[0][1])
        raise UserError(
            f"{len(strange)} masks named in {origin} cannot be used, first: {record.place}: {record.mask}: "
            f"holds the value {max(found)}, expected 0 to {values - 1} for the segments "
            f"{', '.join(segments)}{mask_values.between(found, values)}"
        )
    return np.stack([read.apply(drawn) for _, (drawn, _) in pairs])


def _pixel_scale(records: Sequence[Record], framing: Framing) -> np.ndarray:
    """Return the size of each decoded image's pixel in pixels of its file, [n, 2]."""
    found = []
    for record in records:
        scale, source = framing.scale(formats.extent(record.image)), plane(record.image)
        of_tile = source.tile.scale(formats.extent(source.whole)) if source.tile else (1.0, 1.0)
        found.append((scale[0] * of_tile[0], scale[1] * of_tile[1]))
    return np.array(found)


def _spacing(records: Sequence[Record], framing: Framing) -> np.ndarray | None:
    """Return the pixel size in millimetres of each decoded image, [n, 2]; None unless all files state it."""
    pixels = []
    for record in records:
        pixel = formats.spacing(record.image)
        if pixel is None:
            return None
        pixels.append(pixel)
    return np.array(pixels) * _pixel_scale(records, framing)


def _near_files(path: Path) -> str:
    folder = path.parent
    if os.path.isdir(path):
        return "it is a folder"
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    there = sorted(other.name for other in folder.iterdir())
    return nearest(path.name, [name for name in there if Path(name).stem == path.stem] or there)
