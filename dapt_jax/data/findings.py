"""Irregularities in a set of images, one per line, that a study reports before training."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dapt_jax.data import dicom, formats, identity, near_duplicates, pixels
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.framing import Framing
from dapt_jax.data.plane import Source, file_of, plane
from dapt_jax.data.splits import Split
from dapt_jax.errors import UserError

_FILES = 200
_FAR_FROM_SQUARE, _SHRUNK = 1.5, 8
_FEW_LEVELS, _WIDER = 32, 2


def of_set(dataset: Dataset, *, is_split: bool = False) -> list[str]:
    """Return warnings about a set: the reader's notes, empty images, duplicate images and patients.

    Nothing is decoded again: the required properties of the pixels were recorded when the set was read.

    Args:
        dataset: The set.
        is_split: Whether the study divides the set into folds, so that near-duplicates within it matter.

    Returns:
        One line per warning, without the name of the set.
    """
    lines = [*dataset.notes, *_without_content(dataset), *_few_levels(dataset), *_several_windows(dataset)]
    lines += _empty_or_full_masks(dataset)
    found = near_duplicates.merged(dataset) if is_split else None
    lines += _spellings(dataset, found.spellings if found else None)
    if found and found.pairs:
        images = len({index for pair in found.pairs for index in pair})
        first = " and ".join(dataset.images.names[index] for index in found.pairs[0])
        lines.append(
            f"{images} images of different patients look alike ({len(found.pairs)} pairs, first: {first}): "
            "each pair stays on one side of every split; merge_look_alikes=False divides them"
        )
    lines += _torn_labels(dataset)
    return lines + _lost_in_resizing(dataset)


def of_folds(dataset: Dataset, splits: Sequence[Split]) -> list[str]:
    """Return a warning for each class that some training part lacks and that its head cannot learn.

    Args:
        dataset: The set that is divided.
        splits: Training and held-out rows of each fold.
    """
    lines = []
    present = (
        dataset.labels == 1
        if dataset.multi_label
        else dataset.labels[:, None] == np.arange(len(dataset.classes))
    )
    for column, name in enumerate(dataset.classes):
        folds = [fold for fold, (train, _) in enumerate(splits) if not present[train, column].any()]
        if folds and present[:, column].any():
            groups = len(np.unique(near_duplicates.merged(dataset).groups[present[:, column]]))
            patients = "1 patient" if groups == 1 else f"{groups} patients"
            listed = ", ".join(str(fold + 1) for fold in folds)
            lines.append(
                f"class {name!r} has {patients}: the training part of fold {listed} of {len(splits)} lacks "
                "it, so the head of that fold is not scored on it"
            )
    return lines


def _without_content(dataset: Dataset) -> list[str]:
    """Return a line that names the set, the classes or the images that are constant."""
    seen = near_duplicates.looks(dataset.images)
    flat = seen.flat
    if not flat.any():
        return []
    kinds = Counter(_kind(dataset, int(index), seen) for index in np.flatnonzero(flat)[:2000])
    first = dataset.images.names[int(np.argmax(flat))]
    listed = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    lines = []
    if flat.all():
        lines.append(
            f"all {len(flat)} images are without content ({listed}), first: {first}; nothing can be learned"
        )
    else:
        share = flat.mean()
        lines.append(
            f"{flat.sum()} of {len(flat)} images ({share:.1%}) are without content ({listed}), first: {first}"
        )
        for column, name in enumerate(dataset.classes):
            has = dataset.labels[:, column] == 1 if dataset.multi_label else dataset.labels == column
            if has.any() and flat[has].all():
                lines.append(f"all {has.sum()} images of class {name!r} are without content")
    return lines


def _few_levels(dataset: Dataset) -> list[str]:
    """Return a line if the foreground of a set takes a small part of the grey levels that images are decoded to."""
    seen = near_duplicates.looks(dataset.images)
    if seen.flat.all():
        return []
    low, high = np.percentile(seen.low[~seen.flat], 5), np.percentile(seen.high[~seen.flat], 95)
    if high - low >= _FEW_LEVELS:
        return []
    origin = dataset.intensity_summary()[0]["origin"]
    return [
        f"the images are shown in {high - low + 1:.0f} of 256 grey levels ({low:.0f} to {high:.0f}, without the "
        f"background; black and white by {origin}), so finer differences are lost; expected window='LOW,HIGH' with the "
        "values of what is to be seen"
    ]


def _several_windows(dataset: Dataset) -> list[str]:
    """Return a line if the CT files of a set name windows of very different widths; some files are looked at."""
    ranges = dataset.images.ranges()
    widths = {}
    for row in _some(dataset):
        source = dataset.images.source(row)
        if source is not None and ranges[row].origin == "window of the file" and _is_ct(file_of(source)):
            widths[ranges[row].high - ranges[row].low] = dataset.images.names[row]
    narrow, wide = min(widths, default=0.0), max(widths, default=0.0)
    if wide <= _WIDER * narrow:
        return []
    return [
        f"windows of the CT files are {narrow:g} to {wide:g} wide ({widths[narrow]} and {widths[wide]}), so one tissue "
        "has several grey levels; expected one window='LOW,HIGH' for all"
    ]


def _is_ct(file: Path) -> bool:
    return formats.module(file) is dicom and dicom.header(file, ("Modality",)) == ("CT",)


def _some(dataset: Dataset) -> list[int]:
    """Return the rows of some images, evenly spaced, whose headers are read."""
    rows = np.linspace(0, len(dataset) - 1, min(len(dataset), _FILES)).astype(int)
    return [int(row) for row in np.unique(rows)]


def _lost_in_resizing(dataset: Dataset) -> list[str]:
    """Return lines on images that are far from square, and on those much larger than they are decoded.

    The sizes are those in the headers of some files, evenly spaced.
    """
    found = [
        formats.extent(source) for row in _some(dataset) if (source := dataset.images.source(row)) is not None
    ]
    if not found:
        return []
    framing, size = dataset.images.framing, dataset.images.size
    sides = np.minimum(found, framing.crop) if framing.crop else np.array(found)
    height, width = (round(float(side)) for side in np.median(sides, 0))
    shown = f"the images ({width} x {height} pixels, median of {len(found)} files)"
    lines = []
    if (ratio := np.median(sides.max(1) / sides.min(1))) > _FAR_FROM_SQUARE:
        lines.append(f"{shown} are far from square and {_made_square(framing, float(ratio))}")
    if (factor := np.median(sides.max(1)) / size) >= _SHRUNK:
        lines.append(
            f"{shown} are shrunk {factor:.0f} times to {size} x {size}, which hides details of fewer pixels; "
            "expected a larger model.image_size, or a larger image_size of the set with augment.patch"
        )
    return lines


def _made_square(framing: Framing, ratio: float) -> str:
    """Return in words what becomes of images that are far from square.

    Args:
        framing: How they become square.
        ratio: Longer side over shorter side.
    """
    square = f"{framing.size} x {framing.size}"
    if framing.resize == "pad":
        return f"padded with black to {square}, of which {1 - 1 / ratio:.0%} is padding (model.resize=pad)"
    if framing.resize == "crop":
        return f"cropped to their central square, which drops {1 - 1 / ratio:.0%} (model.resize=crop)"
    return (
        f"squashed to {square}, the default (model.resize=squash): circles become ellipses; expected "
        "model.resize=pad to keep all of them, or crop to keep their central square"
    )


def _empty_or_full_masks(dataset: Dataset) -> list[str]:
    """Return a line if no mask marks anything, or every mask marks everything."""
    if not dataset.segments or not isinstance(dataset.masks, np.ndarray):
        return []
    if not dataset.masks.any():
        return [f"all of its {len(dataset)} masks are empty; expected some that mark something"]
    if dataset.masks.all():
        return [f"all of its {len(dataset)} masks are full, without background; are they inverted?"]
    return []


def _kind(dataset: Dataset, index: int, seen: near_duplicates.Looks) -> str:
    source = dataset.images.source(index)
    try:
        if source and np.isnan(_values(source)).all():
            return "all NaN"
    except (UserError, TypeError, ValueError):
        pass  # reported when the pixels are read
    return "all black" if seen.black[index] else "one grey value"


def _values(source: Source) -> np.ndarray:
    """Return the values of a file before conversion to 8 bits."""
    reader = formats.module(file_of(source))
    if reader is not pixels:
        return np.asarray(reader.values(plane(source)), np.float64)
    with pixels.opened(source) as image:
        return np.asarray(image, np.float64)


def _spellings(dataset: Dataset, found: list[tuple[str, ...]] | None) -> list[str]:
    """Return a line that names patients with nearly the same spelling."""
    if found is None:
        own = set(dataset.images.names)
        found = identity.near_spellings(
            name for name in np.unique(dataset.groups).tolist() if name not in own
        )
    if not found:
        return []
    more = f", and {len(found) - 1} more like it" if len(found) > 1 else ""
    listed = " and ".join(map(repr, found[0]))
    return [
        f"patients {listed} differ in case, separators or zeros alone{more}; splits keep them on one side"
    ]


def _torn_labels(dataset: Dataset) -> list[str]:
    """Return a line that names identical images that have two labels."""
    if dataset.segments:
        return []
    seen = near_duplicates.looks(dataset.images)
    rows: dict[int, list[int]] = defaultdict(list)
    for index in np.flatnonzero(~seen.flat).tolist():
        rows[int(seen.digests[index])].append(index)
    same = [group for group in rows.values() if len(group) > 1]
    torn = [group for group in same if len({dataset.labels[index].tobytes() for index in group}) > 1]
    lines = []
    if same:
        first = " and ".join(Path(dataset.images.names[index]).name for index in same[0][:2])
        pictures = f"{len(same)} picture{'s' * (len(same) > 1)}"
        lines.append(
            f"{sum(map(len, same))} images are {pictures} under several names, pixel for pixel, "
            f"first: {first}"
        )
    if torn:
        first = " and ".join(dataset.images.names[index] for index in torn[0][:2])
        lines.append(f"{len(torn)} of these pictures have several labels, first: {first}")
    return lines
