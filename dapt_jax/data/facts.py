"""Description of a set of images: what was read, from what files, and how it is scaled."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from dapt_jax.data import dicom, formats, identity, intensity, near_duplicates
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.plane import file_of
from dapt_jax.data.records import is_own_group
from dapt_jax.errors import UserError

MOST_FILES = 2000
"""Number of files, evenly spaced, whose headers are read for their sizes."""
_SHOWN = 6


def of_set(dataset: Dataset) -> dict[str, str]:
    """Return facts about a set by heading; values may have several lines.

    Pixels are not decoded again, except those of images that are not in memory where ranges are unknown.
    """
    facts = {
        "images": f"{len(dataset):,}" + (f", {dataset.skipped:,} skipped" if dataset.skipped else ""),
        "classes": "\n".join(_classes(dataset)),
        "patients": _patients(dataset),
        "columns": "\n".join(_columns(dataset)),
        "formats": _formats(dataset),
        "stored sizes": _sizes(dataset),
        "decoded": _decoded(dataset),
        "intensities": "\n".join(map(intensity.line, dataset.intensity_summary())),
        "without content": _without_content(dataset),
        "look-alikes": _look_alikes(dataset),
        "masks": "\n".join(_masks(dataset)),
    }
    return {heading: value for heading, value in facts.items() if value}


def regions(dataset: Dataset, masks: np.ndarray) -> dict[str, np.ndarray]:
    """Return the pixels of each foreground segment, bool arrays of the shape of the masks."""
    names = dataset.segments[1:]
    if dataset.overlapping:
        return {name: (masks >> bit & 1).astype(bool) for bit, name in enumerate(names)}
    return {name: masks == value for value, name in enumerate(names, start=1)}


def has_class(dataset: Dataset, column: int) -> np.ndarray:
    """Return which images are of a class, bool [n]."""
    found: np.ndarray = dataset.labels[:, column] == 1 if dataset.multi_label else dataset.labels == column
    return found


def unnamed(dataset: Dataset) -> np.ndarray:
    """Return which images name no patient, bool [n].

    Each counts as a patient of its own, and so do the slices of a volume, the files of a study and the tiles of an
    image: see `records.own_group`.
    """
    alone: np.ndarray = np.asarray(dataset.groups) == np.asarray(dataset.images.names)
    for row in np.flatnonzero(~alone).tolist():
        source = dataset.images.source(row)
        alone[row] = source is not None and is_own_group(str(dataset.groups[row]), source)
    return alone


def nobody_named(dataset: Dataset) -> str:
    """Return in words what counts as a patient in a set that names none."""
    groups = len(np.unique(dataset.groups))
    if groups == len(dataset):
        return "each image counts as a patient of its own"
    return f"each image, volume or study counts as a patient of its own ({groups:,} of them)"


def sources_of(dataset: Dataset) -> dict[str, np.ndarray]:
    """Return the rows of each value of the column `source`; empty without two values or more, or over 12."""
    if "source" not in dataset.columns:
        return {}
    values = dataset.columns["source"]
    names = np.unique(values).tolist()
    return {name: np.flatnonzero(values == name) for name in names} if 1 < len(names) <= 12 else {}


def _classes(dataset: Dataset) -> Iterable[str]:
    alone = unnamed(dataset)
    for column, name in enumerate(dataset.classes):
        has = has_class(dataset, column)
        count, patients = int(has.sum()), len(np.unique(dataset.groups[has]))
        line = f"{name}: {count:,} ({count / max(len(dataset), 1):.1%})"
        line += "" if alone.all() else f" of {_counted(patients, 'patient')}"
        if dataset.multi_label:
            missing, uncertain = (
                int(np.isnan(dataset.labels[:, column]).sum()),
                int((dataset.labels[:, column] == -1).sum()),
            )
            line += f", {missing:,} without a label" if missing else ""
            line += f", {uncertain:,} uncertain" if uncertain else ""
        yield line


def _patients(dataset: Dataset) -> str:
    """Return number and size of the patients; an image without a patient counts as one of its own."""
    alone = unnamed(dataset)
    if alone.all():
        return f"none named: {nobody_named(dataset)}"
    sizes = np.unique(dataset.groups[~alone], return_counts=True)[1]
    of = f"{sizes.min()} to {sizes.max()} images each (median {np.median(sizes):g})"
    if sizes.min() == sizes.max():
        of = f"{_counted(int(sizes.min()), 'image')} each"
    line = f"{len(sizes):,}, of {of}"
    return line + (f"; {_counted(int(alone.sum()), 'image')} of unnamed ones" if alone.any() else "")


def _columns(dataset: Dataset) -> Iterable[str]:
    for name, values in dataset.columns.items():
        cells = values.tolist()
        missing = sum(map(identity.is_missing, cells))
        counts = Counter(cell for cell in cells if not identity.is_missing(cell))
        few = ", ".join(f"{value} {count:,}" for value, count in counts.most_common())
        line = f"{name}: {few if len(counts) <= _SHOWN else f'{len(counts):,} values'}"
        yield line + (f", {missing:,} missing" if missing else "")


def _formats(dataset: Dataset) -> str:
    """Return the kinds of files, by what reads them and by suffix."""
    kinds: Counter[str] = Counter()
    for row in range(len(dataset)):
        source = dataset.images.source(row)
        if source is None:
            kinds["in memory"] += 1
            continue
        file = file_of(source)
        suffix = file.suffix.lstrip(".").upper() or "no suffix"
        is_dicom = formats.module(file) is dicom and suffix not in ("DCM", "DICOM")
        kinds[f"DICOM ({suffix})" if is_dicom else suffix] += 1
    return ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common())


def _sizes(dataset: Dataset) -> str:
    """Return the commonest sizes of the files, and the smallest and largest."""
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), MOST_FILES)).astype(int))
    sizes: Counter[tuple[int, int]] = Counter()
    for row in rows.tolist():
        source = dataset.images.source(row)
        if source is None:
            return ""
        try:
            sizes[formats.extent(source)] += 1
        except UserError:
            continue  # the decoded image is what counts, and it was read
    if not sizes:
        return ""

    def shown(size: tuple[int, int]) -> str:
        return f"{size[1]} x {size[0]}"

    line = ", ".join(f"{shown(size)} {count:,}" for size, count in sizes.most_common(_SHOWN))
    if len(sizes) > _SHOWN:
        least, most = min(sizes, key=np.prod), max(sizes, key=np.prod)
        line += f", and {len(sizes) - _SHOWN} more from {shown(least)} to {shown(most)}"
    return line + (f" (of {len(rows):,} files looked at)" if len(rows) < len(dataset) else "")


def _decoded(dataset: Dataset) -> str:
    images = dataset.images
    crop, resize = images.framing.crop, images.framing.resize
    cut = f"a centre crop of {crop} px" if crop else "the whole image"
    line = f"{images.size} x {images.size}, from {cut}" + ("" if resize == "squash" else f", by {resize}")
    if dataset.spacing is not None:
        low, high = dataset.spacing.min(), dataset.spacing.max()
        line += f"; a pixel is {low:.3g}{'' if low == high else f' to {high:.3g}'} mm"
    return line


def _without_content(dataset: Dataset) -> str:
    seen = near_duplicates.looks(dataset.images)
    flat, black = int(seen.flat.sum()), int(seen.black.sum())
    return f"{_counted(flat, 'image')}, {black:,} of them black" if flat else "none"


def _look_alikes(dataset: Dataset) -> str:
    seen = near_duplicates.looks(dataset.images)
    equal = len(dataset) - int(seen.flat.sum()) - len(np.unique(seen.digests[~seen.flat]))
    pairs = near_duplicates.duplicates(dataset, dataset)
    if not pairs:
        return "none"
    images = len({row for pair in pairs for row in pair})
    apart = sum(dataset.groups[a] != dataset.groups[b] for a, b in pairs)
    line = f"{_counted(len(pairs), 'pair')} among {images:,} images, {apart:,} of different patients"
    return line + (f"; pixel for pixel equal to another image: {equal:,}" if equal else "")


def _masks(dataset: Dataset) -> Iterable[str]:
    if dataset.masks is None:
        return
    if not isinstance(dataset.masks, np.ndarray) or not dataset.segments:
        named = sum(mask is not None for mask in dataset.masks)
        yield f"{named:,} of {len(dataset):,} images have one; not read, since the set names no segments"
        return
    for name, region in regions(dataset, dataset.masks).items():
        inside = region.any((1, 2))
        line = f"{name}: {region.mean():.2%} of all pixels, in {inside.sum():,} of {len(dataset):,} images"
        if inside.any():
            shares = region[inside].mean((1, 2))
            line += f", where it takes {shares.min():.2%} to {shares.max():.2%}"
        yield line


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def luminance_counts(images: Iterable[np.ndarray]) -> np.ndarray:
    """Return how many pixels have each grey value, int64 [256]; colours count by their mean."""
    counts = np.zeros(256, np.int64)
    for image in images:
        grey = np.rint(image.mean(-1)).astype(np.int64)
        counts += np.bincount(grey.reshape(-1), minlength=256)
    return counts
