"""A labelled set of images: what every reader returns and every study consumes."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dapt_jax.data import identity, intensity
from dapt_jax.data.decode import ImageStore
from dapt_jax.data.mask_values import convention
from dapt_jax.data.masks import Mask, draw, resized
from dapt_jax.errors import UserError, nearest


@dataclass(frozen=True)
class Dataset:
    """Images with labels, groups and whatever else their manifest says.

    >>> images = ImageStore.from_arrays(np.zeros((4, 8, 8, 3), np.uint8), 8)
    >>> patients = np.array(["P1", "P1", "P2", "P3"])
    >>> data = Dataset("mine", images, np.array([0, 1, 0, 1]), ("benign", "malignant"), patients)
    >>> len(data), data.class_counts()
    (4, {'benign': 2, 'malignant': 2})

    Attributes:
        name: what to call the set in messages and tables.
        images: the pixels, by index.
        labels: int64 [n], one class per image; or float32 [n, classes] of 0 and 1, NaN where a label is
            missing, and -1 where it is uncertain if `uncertain` says what that stands for.
        classes: name of each class; labels index into it.
        groups: str [n], the patient (or other group) of each image. Splits never separate a group. An image
            without one is its own group.
        columns: other columns of the manifest, each str [n] ("split", "source", ...).
        masks: where each mask lies (None for an image without), or uint8 [n, h, w] class indices; None if no
            image has a mask.
        skipped: images left out because they could not be read, on the user's request.
        segments: of a set to be segmented, the names of the values of its masks, which are in memory; the
            first is the background. Empty for a set to be classified.
        overlapping: whether a pixel may be of several segments: masks are bit fields then, bit k for
            `segments[k + 1]`.
        ordinal: whether the classes are grades, in their order.
        uncertain: what an uncertain label of -1 stands for: a target drawn uniformly between these two, anew
            for every image and epoch (LSR of Pham et al., 2021). None where no label is -1.
        spacing: float64 [n, 2], height and width in millimetres of a pixel of each decoded image, where the
            files of all images say it; else None, and distances are in pixels.
        merge_look_alikes: whether splits keep images that look alike on one side, as they do images of one
            patient.
        cohort: whose numbering its patients' names are of: sets of two cohorts share no patient, whatever the
            names say.
        notes: what its reader took for what and what it left out, a line each; see
            `dapt_jax.data.findings.of_set`.
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
    merge_look_alikes: bool = True
    cohort: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parts = {"labels": self.labels, "groups": self.groups, **self.columns}
        if self.masks is not None:
            parts["masks"] = self.masks  # type: ignore[assignment]
        if self.spacing is not None:
            parts["spacing"] = self.spacing
        for part, values in parts.items():
            if len(values) != len(self.images):
                raise ValueError(f"{self.name}: {len(values)} {part} for {len(self.images)} images")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def multi_label(self) -> bool:
        """Whether an image can have several classes at once."""
        return self.labels.ndim == 2

    def take(self, indices: Sequence[int] | np.ndarray) -> "Dataset":
        """Returns the images at `indices`, in that order, with the same classes."""
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
        )

    def intensity_summary(self) -> list[dict[str, Any]]:
        """Returns how the images got their black and white, a row for each origin, see `dapt_jax.data.intensity.summary`.

        Rows hold numbers and text alone, as JSON does; `dapt_jax.data.intensity.line` makes one line of a
        row. Images that are not in memory and were never read are read.
        """
        return intensity.summary(self.images.ranges(), self.images.names)

    def pixel_sizes(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns height and width of a pixel of the decoded images at `rows`, [k, 2], in millimetres; 1 where unknown."""
        chosen = np.asarray(rows, np.int64)
        return np.ones((len(chosen), 2)) if self.spacing is None else self.spacing[chosen]

    def where(self, condition: str) -> "Dataset":
        """Returns the images whose columns have the given values.

        Args:
            condition: "column=value", several joined by commas, all of which must hold; "" keeps everything.
                Beside `columns`, "label" (unless multi-label) and "group" can be asked for.

        Raises:
            UserError: no such column, or no image has such a value; names the nearest.
        """
        columns = {"group": self.groups, **self.columns}
        if not self.multi_label:
            columns.setdefault("label", np.array(self.classes, dtype=str)[self.labels])
        return self.take(np.flatnonzero(matching(columns, condition, self.name)))

    def keep_classes(self, classes: Iterable[str]) -> "Dataset":
        """Returns the images of the given classes, with labels renumbered in the given order.

        Of a multi-label set every image stays and the other classes' columns go.

        Raises:
            UserError: a class that the set does not have; names the nearest.
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
        """Returns the number of images of each class, in the order of `classes`; missing or uncertain labels count for none."""
        one_each = (
            np.arange(len(self.classes)) == self.labels[:, None]
            if self.labels.ndim == 1
            else self.labels == 1
        )
        counts = one_each.sum(axis=0)
        return {name: int(count) for name, count in zip(self.classes, counts, strict=True)}

    def load_masks(self) -> np.ndarray:
        """Reads every mask at the images' size and crop.

        Returns:
            uint8 [n, size, size] class indices.

        Raises:
            UserError: an image has no mask, or a mask cannot be read.
        """
        if isinstance(self.masks, np.ndarray):
            return self.masks
        sources = self.masks or (None,) * len(self)
        without = [name for name, mask in zip(self.images.names, sources, strict=True) if mask is None]
        if without:
            raise UserError(
                f"{self.name}: {len(without)} of {len(self)} images have no mask, first: {without[0]}"
            )
        size = self.images.size
        drawn = [draw(mask) for mask in sources if mask is not None]
        read = convention((str(mask), each.facts()) for mask, each in zip(sources, drawn, strict=True))
        masks = [resized(read.apply(each), size, self.images.crop) for each in drawn]
        return np.stack(masks) if masks else np.zeros((0, size, size), np.uint8)

    def segmented(self, segments: Sequence[str], *, overlapping: bool = False) -> "Dataset":
        """Returns the same images with their masks in memory, to be segmented.

        Args:
            segments: name of each value of the masks, the background first. Values of one name become one
                segment.
            overlapping: see the attribute.

        Raises:
            UserError: an image has no mask, a mask holds a value that has no name, or fewer than two names
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
                    f"{self.name}: the mask of {image} holds the value {mask.max()}; expected 0 to {values - 1}, "
                    f"one for each of the segments {', '.join(segments)}"
                )
        if not overlapping:
            masks = np.array([names.index(name) for name in segments], np.uint8)[masks]
        return replace(self, masks=masks, segments=names, overlapping=overlapping)

    @property
    def targets(self) -> np.ndarray:
        """What a network is trained to say of each image, in the dtype that devices hold.

        Returns:
            int32 [n] class numbers; float32 [n, classes] of 0, 1, NaN and -1 (see `labels`) of a multi-label
            set; uint8 [n, h, w] masks of a set to be segmented.
        """
        if self.segments:
            assert isinstance(self.masks, np.ndarray)
            return self.masks
        return self.labels.astype(np.float32 if self.multi_label else np.int32)

    @property
    def truth(self) -> np.ndarray:
        """Labels that predictions are scored by: those of `labels`, with NaN for uncertain ones too."""
        return self.labels if self.uncertain is None else np.where(self.labels == -1, np.nan, self.labels)

    @property
    def expected(self) -> np.ndarray:
        """`targets` with the mean of what an uncertain label stands for in its place."""
        if self.uncertain is None:
            return self.targets
        return np.where(self.labels == -1, np.mean(self.uncertain), self.labels).astype(np.float32)

    def fingerprint(self) -> str:
        """Returns a hash that changes when images, labels, classes, groups, image size or crop do.

        It keys caches of computed features and tells a resumed study that its data are no longer the same.
        """
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


def matching(columns: Mapping[str, Sequence[str] | np.ndarray], condition: str, origin: str) -> np.ndarray:
    """Finds the rows for which a condition holds.

    Args:
        columns: the values of each column, all of length n.
        condition: see `Dataset.where`.
        origin: the file or set that an error line should name.

    Returns:
        bool [n].

    Raises:
        UserError: the condition cannot be read, no such column, or no row has such a value.
    """
    length = len(next(iter(columns.values()), ()))
    kept = np.ones(length, bool)
    for clause in filter(None, (part.strip() for part in condition.split(","))):
        column, equals, value = (part.strip() for part in clause.partition("="))
        if not equals:
            raise UserError(f"{origin}: cannot read the condition {clause!r}; expected column=value")
        if len(meant := identity.column(column, columns)) == 1:
            column = meant[0]
        if column not in columns:
            raise UserError(
                f"{origin}: the condition {clause!r} names no column here; {nearest(column, columns)}"
            )
        values = np.asarray([identity.clean(cell) for cell in columns[column]], dtype=str)
        value = identity.clean(value)
        found = values == value
        if not found.any() and (split := identity.split_name(value)):
            found = np.array([identity.split_name(cell) == split for cell in values.tolist()], bool)
        if not found.any():
            raise UserError(
                f"{origin}: no row has {clause!r}; {nearest(value, sorted(set(values.tolist())))}"
            )
        kept &= found
    if length and not kept.any():
        raise UserError(f"{origin}: no row meets all of {condition!r}, though each part of it is met by some")
    return kept
