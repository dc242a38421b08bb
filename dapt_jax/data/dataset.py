"""A labelled set of images: the result of every reader and the input of every study."""

import functools
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dapt_jax.data import identity, intensity
from dapt_jax.data.decode import ImageStore
from dapt_jax.data.mask_values import convention
from dapt_jax.data.masks import Mask, draw
from dapt_jax.errors import UserError, nearest

LABEL = "label"
"""Column of the labels in a condition; several labels of one image are joined by |."""
_OPERATORS = ("!", "<", ">", "~")
"""Signs that with `=` are other comparisons elsewhere, such as `!=`, and that no name of a column ends with."""


@dataclass(frozen=True)
class Dataset:
    """Images with labels, groups and the other columns of their manifest.

    >>> images = ImageStore.from_arrays(np.zeros((4, 8, 8, 3), np.uint8), 8)
    >>> patients = np.array(["P1", "P1", "P2", "P3"])
    >>> data = Dataset("mine", images, np.array([0, 1, 0, 1]), ("benign", "malignant"), patients)
    >>> len(data), data.class_counts()
    (4, {'benign': 2, 'malignant': 2})

    Attributes:
        name: Name of the set in messages and tables.
        images: The pixels, by index.
        labels: int64 [n], one class per image, from 0; or float32 [n, classes] of 0 and 1, with NaN for a missing
            label, and -1 for an uncertain one if `uncertain` defines its meaning.
        classes: Name of each class; labels index into it. Empty for a set without labels, whose `labels` are
            all 0: see `is_labelled`.
        groups: str [n], the patient (or other group) of each image. Splits never separate a group. An image
            without a group forms its own.
        columns: Other columns of the manifest, each str [n] ("split", "source", ...).
        masks: Location of each mask (None for an image without one), or uint8 [n, h, w] class indices; None
            if no image has a mask.
        skipped: Number of images left out at the user's request because they could not be read.
        segments: Names of the mask values of a segmentation set, whose masks are in memory; the first is the
            background. Empty for a classification set.
        overlapping: Whether a pixel may belong to several segments; masks are then bit fields, with bit k for
            `segments[k + 1]`.
        ordinal: Whether the classes are ordered grades.
        uncertain: Interval from which the target of an uncertain label (-1) is drawn uniformly, again for
            every image and epoch (LSR of Pham et al., 2021). None if no label is -1.
        spacing: float64 [n, 2], height and width in millimetres of a pixel of each decoded image, if the
            files of all images state it; else None, and distances are in pixels.
        pixel_scale: float64 [n, 2], height and width of a pixel of each decoded image in pixels of its file;
            None where an image is as large as in its file. Distances in pixels are in pixels of the file, so
            that resizing distorts none.
        merge_look_alikes: Whether splits keep near-duplicate images on one side, like images of one patient.
        cohort: Cohort in which patient names are unique: sets of two cohorts share no patient, even if names
            coincide.
        notes: The reader's interpretations and omissions, one per line; see `dapt_jax.data.findings.of_set`.
    """

    name: str
    images: ImageStore
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    masks: tuple[Mask | None, ...] | np.ndarray | None = None
    skipped: int = 0
    segments: tuple[str, ...] = ()
    overlapping: bool = False
    ordinal: bool = False
    uncertain: tuple[float, float] | None = None
    spacing: np.ndarray | None = None
    pixel_scale: np.ndarray | None = None
    merge_look_alikes: bool = True
    cohort: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parts = {"labels": self.labels, "groups": self.groups, **self.columns}
        if self.masks is not None:
            parts["masks"] = self.masks  # type: ignore[assignment]
        if self.spacing is not None:
            parts["spacing"] = self.spacing
        if self.pixel_scale is not None:
            parts["pixel scales"] = self.pixel_scale
        for part, values in parts.items():
            if len(values) != len(self.images):
                raise ValueError(f"{self.name}: {len(values)} {part} for {len(self.images)} images")
        # A class twice would be two columns with one label, or one without images, and count twice in a mean.
        if twice := [name for name in dict.fromkeys(self.classes) if self.classes.count(name) > 1]:
            raise UserError(f"{self.name}: classes name {twice[0]!r} twice; expected each class once")
        if not self.multi_label and (negative := np.flatnonzero(self.labels < 0)).size:
            raise UserError(
                f"{self.name}: {len(negative)} of {len(self)} labels are negative, first: "
                f"{self.labels[negative[0]]} of {self.images.names[negative[0]]}; expected class numbers from 0"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def multi_label(self) -> bool:
        """Whether an image can have several classes."""
        return self.labels.ndim == 2

    @property
    def is_labelled(self) -> bool:
        """Whether the images have classes or segments; objectives that need no labels take all sets."""
        return bool(self.classes or self.segments)

    def without_labels(self) -> "Dataset":
        """Return the same images without labels, masks and segments: nothing can depend on them any more.

        >>> images = ImageStore.from_arrays(np.zeros((2, 8, 8, 3), np.uint8), 8)
        >>> data = Dataset("mine", images, np.array([0, 1]), ("a", "b"), np.array(["P1", "P2"]))
        >>> data.without_labels().is_labelled
        False
        """
        return replace(
            self,
            labels=np.zeros(len(self), np.int64),
            classes=(),
            masks=None,
            segments=(),
            overlapping=False,
            ordinal=False,
            uncertain=None,
            spacing=None,
            pixel_scale=None,
        )

    def take(self, indices: Sequence[int] | np.ndarray) -> "Dataset":
        """Return the images at `indices`, in that order, with the same classes."""
        chosen = np.asarray(indices, np.int64)
        masks = self.masks
        if isinstance(masks, np.ndarray):
            masks = masks[chosen]
        elif masks is not None:
            masks = tuple(masks[index] for index in chosen)
        return replace(
            self,
            images=self.images.take(chosen),
            labels=self.labels[chosen],
            groups=self.groups[chosen],
            columns={name: values[chosen] for name, values in self.columns.items()},
            masks=masks,
            spacing=None if self.spacing is None else self.spacing[chosen],
            pixel_scale=None if self.pixel_scale is None else self.pixel_scale[chosen],
        )

    def intensity_summary(self) -> list[dict[str, Any]]:
        """Return a summary of the images' intensity ranges, one row per origin.

        See `dapt_jax.data.intensity.summary`.

        Rows hold only numbers and text, as in JSON; `dapt_jax.data.intensity.line` formats a row. Images that
        are not in memory and have not been read yet are read.
        """
        return intensity.summary(self.images.ranges(), self.images.names)

    def pixel_sizes(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the pixel sizes of the images at `rows`.

        [k, 2], height and width of a pixel of the decoded image: in millimetres or, where these are unknown, in
        pixels of the file.
        """
        chosen = np.asarray(rows, np.int64)
        known = self.pixel_scale if self.spacing is None else self.spacing
        return np.ones((len(chosen), 2)) if known is None else known[chosen]

    def without_padding(self, masks: np.ndarray, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return predicted masks with nothing in the padding of their images, where there is no picture.

        Args:
            masks: uint8 [k, size, size].
            rows: The images that they are of, int [k].
        """
        cleared = np.zeros_like(masks)
        for target, mask, row in zip(cleared, masks, rows, strict=True):
            top, left, bottom, right = self.images.inside(int(row))
            target[top:bottom, left:right] = mask[top:bottom, left:right]
        return cleared

    def where(self, condition: str) -> "Dataset":
        """Return the images whose columns have the given values.

        Args:
            condition: "column=value" or "column=value|value", or several joined by commas, all of which must
                hold; "" selects all images. Besides `columns`, "label" and "group" are valid; an image with
                several labels is selected by any of them. A split is found in all of its spellings.

        Raises:
            UserError: The column does not exist, or no image has such a value (names the nearest), or images
                that are not selected have another spelling of the value.
        """
        columns = {"group": self.groups, **self.columns}
        if self.multi_label:
            named = ["|".join(np.array(self.classes)[row == 1]) for row in self.labels]
            columns.setdefault(LABEL, np.array(named, dtype=str))
        elif self.classes:
            columns.setdefault(LABEL, np.array(self.classes, dtype=str)[self.labels])
        return self.take(np.flatnonzero(matching(columns, condition, self.name)))

    def keep_classes(self, classes: Iterable[str]) -> "Dataset":
        """Return the images of the given classes, with labels renumbered in the given order.

        In a multi-label set, all images remain and the columns of the other classes are removed.

        Raises:
            UserError: The set does not have one of the classes; names the nearest.
        """
        kept = tuple(classes)
        for name in kept:
            if name not in self.classes:
                raise UserError(f"{self.name}: no class {name!r}; {nearest(name, self.classes)}")
        old = [self.classes.index(name) for name in kept]
        if self.multi_label:
            return replace(self, labels=self.labels[:, old], classes=kept)
        renumbered = np.full(len(self.classes), -1, np.int64)
        renumbered[old] = np.arange(len(kept))
        labels = renumbered[self.labels]
        rows = np.flatnonzero(labels >= 0)
        return replace(self.take(rows), labels=labels[rows], classes=kept)

    def class_counts(self) -> dict[str, int]:
        """Return the number of images of each class, in the order of `classes`.

        Missing and uncertain labels are not counted.
        """
        counts = (
            np.bincount(self.labels[self.labels >= 0], minlength=len(self.classes))[: len(self.classes)]
            if self.labels.ndim == 1
            else (self.labels == 1).sum(axis=0)
        )
        return {name: int(count) for name, count in zip(self.classes, counts, strict=True)}

    def load_masks(self) -> np.ndarray:
        """Read every mask in the framing of the images.

        Returns:
            uint8 [n, size, size] class indices.

        Raises:
            UserError: An image has no mask, or a mask cannot be read.
        """
        if isinstance(self.masks, np.ndarray):
            return self.masks
        sources = self.masks or (None,) * len(self)
        without = [name for name, mask in zip(self.images.names, sources, strict=True) if mask is None]
        if without:
            raise UserError(
                f"{self.name}: {len(without)} of {len(self)} images have no mask, first: {without[0]}"
            )
        framing = self.images.framing
        drawn = [draw(mask) for mask in sources if mask is not None]
        read = convention((str(mask), each.facts()) for mask, each in zip(sources, drawn, strict=True))
        masks = [framing.mask(read.apply(each)) for each in drawn]
        return np.stack(masks) if masks else np.zeros((0, framing.size, framing.size), np.uint8)

    def segmented(self, segments: Sequence[str], *, overlapping: bool = False) -> "Dataset":
        """Return the same images as a segmentation set, with their masks in memory.

        Args:
            segments: Name of each value of the masks, the background first. Values with the same name become
                one segment.
            overlapping: See the attribute.

        Raises:
            UserError: An image has no mask, a mask contains a value without a name, or fewer than two names
                are given.
        """
        names = tuple(dict.fromkeys(segments))
        if len(names) < 2:
            raise UserError(
                f"{self.name}: segments are {tuple(segments)}; expected the background and one more, or more"
            )
        masks = self.load_masks()
        values = (1 << (len(segments) - 1)) if overlapping else len(segments)
        if overlapping and (len(names) < len(segments) or len(segments) > 9):
            raise UserError(
                f"{self.name}: overlapping segments are {tuple(segments)}; expected 2 to 9 different names"
            )
        for image, mask in zip(self.images.names, masks, strict=True):
            if mask.max(initial=0) >= values:
                raise UserError(
                    f"{self.name}: the mask of {image} holds the value {mask.max()}; expected 0 to "
                    f"{values - 1}, one for each of the segments {', '.join(segments)}"
                )
        if not overlapping:
            masks = np.array([names.index(name) for name in segments], np.uint8)[masks]
        return replace(self, masks=masks, segments=names, overlapping=overlapping)

    @property
    def targets(self) -> np.ndarray:
        """Return the training targets of all images, in the dtype used on devices.

        Returns:
            int32 [n] class numbers; float32 [n, classes] of 0, 1, NaN and -1 (see `labels`) for a multi-label
            set; uint8 [n, h, w] masks for a segmentation set.
        """
        if self.segments:
            assert isinstance(self.masks, np.ndarray)
            return self.masks
        return self.labels.astype(np.float32 if self.multi_label else np.int32)

    @property
    def truth(self) -> np.ndarray:
        """Return the labels used for evaluation: those of `labels`, with NaN for uncertain ones as well."""
        return self.labels if self.uncertain is None else np.where(self.labels == -1, np.nan, self.labels)

    @property
    def expected(self) -> np.ndarray:
        """Return `targets` with every uncertain label replaced by its mean target."""
        if self.uncertain is None:
            return self.targets
        return np.where(self.labels == -1, np.mean(self.uncertain), self.labels).astype(np.float32)

    def fingerprint(self) -> str:
        """Return a hash that changes when images, labels, classes, groups, image size or crop do.

        The hash is part of the keys of cached features, and shows a resumed study that its data have changed.
        """
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        hashed = hashlib.blake2b(self.images.digest().encode(), digest_size=16)
        hashed.update(repr((self.classes, self.labels.dtype.str, self.labels.shape)).encode())
        hashed.update(self.labels.tobytes())
        hashed.update("\0".join(map(str, self.groups)).encode())
        if self.uncertain:
            hashed.update(repr(self.uncertain).encode())
        if self.segments:
            hashed.update(repr((self.segments, self.overlapping)).encode())
            hashed.update(self.targets.tobytes())
        return hashed.hexdigest()


def with_classes(dataset: Dataset, classes: Sequence[str], dropped: Sequence[str], origin: str) -> Dataset:
    """Return a set with the classes that its description names.

    Args:
        dataset: The set, with all of its classes.
        classes: The classes in the wanted order; empty for all.
        dropped: Classes that are left out with their images (in a multi-label set, without them).
        origin: The file or set to name in an error.

    Raises:
        UserError: The set does not have one of the classes, or images of one label have a class in neither.
    """
    for name in (*classes, *dropped):
        if name not in dataset.classes:
            raise UserError(f"{origin}: no class {name!r}; {nearest(name, dataset.classes)}")
    kept = [name for name in dataset.classes if name not in dropped]
    counts = {} if dataset.multi_label else dataset.class_counts()
    for name in kept:
        if classes and name not in classes and counts.get(name):
            raise UserError(
                f"{origin}: label {name!r} ({counts[name]} images) is not in classes; {nearest(name, classes)}; images to "
                "leave out go into drop_classes"
            )
    return dataset.keep_classes([name for name in classes or kept if name not in dropped])


def matching(columns: Mapping[str, Sequence[str] | np.ndarray], condition: str, origin: str) -> np.ndarray:
    """Return which rows satisfy a condition.

    Args:
        columns: Values of each column, all of length n.
        condition: See `Dataset.where`.
        origin: The file or set to name in an error.

    Returns:
        bool [n].

    Raises:
        UserError: The condition cannot be parsed, a column does not exist, no row has such a value, or a row
            that is not selected has another spelling of it.
    """
    length = len(next(iter(columns.values()), ()))
    kept = np.ones(length, bool)
    for clause in filter(None, (part.strip() for part in condition.split(","))):
        column, equals, value = (part.strip() for part in clause.partition("="))
        if not equals or (column.endswith(_OPERATORS) and column not in columns):
            raise UserError(
                f"{origin}: cannot read the condition {clause!r}; expected column=value, or column=value|value with "
                "all values to select"
            )
        if len(meant := identity.column(column, columns)) == 1:
            column = meant[0]
        if column not in columns:
            raise UserError(
                f"{origin}: the condition {clause!r} names no column here; {nearest(column, columns)}"
            )
        values = np.asarray([identity.clean(cell) for cell in columns[column]], dtype=str)
        value = identity.clean(value)
        several = column == LABEL and any("|" in cell for cell in values.tolist())
        is_one = not several and bool((values == value).any())  # a cell may hold the sign | itself
        parts = [value] if is_one else [identity.clean(part) for part in value.split("|")]
        found = np.zeros(length, bool)
        for part in parts:
            found |= _having(values, part, column, clause, origin)
        left = {name for cell in values[~found].tolist() for name in (_labels(cell) if several else [cell])}
        for part, other in itertools.product(parts, sorted(left)):
            if identity.spelling(part) == identity.spelling(other):
                raise UserError(
                    f"{origin}: {clause!r} leaves out rows with {other!r}, another spelling of {part!r}; expected "
                    f"'{column}={part}|{other}' for both, or one spelling in the column"
                )
        kept &= found
    if length and not kept.any():
        raise UserError(f"{origin}: no row meets all of {condition!r}, though each part of it is met by some")
    return kept


def _labels(cell: str) -> list[str]:
    """Return the labels that a cell of the column of labels joins."""
    return [identity.clean(part) for part in cell.split("|")]


def _having(values: np.ndarray, value: str, column: str, clause: str, origin: str) -> np.ndarray:
    """Return which cells are a value, name the same split, or hold it among several labels: bool [n].

    `test` finds every spelling of the split; `test_2`, where a cell is just that, not `test_1`.
    """
    found: np.ndarray = values == value
    # A sign before a split, as in `!test`, may mean all others: it is no spelling of that split.
    split = identity.split_name(value) if value[:1].isalnum() else ""
    if split and (identity.is_split(value) or not found.any()):
        found |= np.isin(
            values, [cell for cell in set(values.tolist()) if identity.split_name(cell) == split]
        )
    several = [_labels(cell) for cell in values.tolist()] if column == LABEL else []
    if any(len(cell) > 1 for cell in several):
        found = np.array([value in cell for cell in several], bool)
    if not found.any():
        known = {name for cell in several for name in cell} or set(values.tolist())
        raise UserError(f"{origin}: no row has {clause!r}; {nearest(value, sorted(known))}")
    return found
