"""Concatenation of data sets: the images of several sources as one set."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from dapt_jax.data import near_duplicates
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.decode import ImageStore
from dapt_jax.data.intensity import Range
from dapt_jax.data.masks import Mask
from dapt_jax.data.plane import Source
from dapt_jax.data.records import is_own_group
from dapt_jax.errors import UserError

COHORT = "(cohort)"
"""Column of the cohort of each image, in a set whose sources are of several."""


class JoinedImages(ImageStore):
    """The images of several stores of one size, one after the other."""

    def __init__(self, stores: Sequence[ImageStore], places: np.ndarray, names: tuple[str, ...]):
        """Refer to images by their place.

        Args:
            stores: The stores.
            places: int [n, 2], store and index within it of each image.
            names: Name of each image.
        """
        self._stores, self._places = tuple(stores), places
        self.names, self.framing = names, stores[0].framing

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> np.ndarray:
        store, row = self._places[index]
        return self._stores[store][int(row)]

    def source(self, index: int) -> Source | None:
        """Return the location of an image; None for one that was never a file."""
        store, row = self._places[index]
        return self._stores[store].source(int(row))

    @property
    def is_of_files(self) -> bool:
        """Whether all images are files."""
        return all(store.is_of_files for store in self._stores)

    def for_crop(self, index: int, most: int) -> np.ndarray:
        """Return the picture of a file that random crops are cut from; see `ImageStore.for_crop`."""
        store, row = self._places[index]
        return self._stores[store].for_crop(int(row), most)

    def inside(self, index: int) -> tuple[int, int, int, int]:
        """Return the part of an image that is not padding: top, left, bottom, right in its pixels."""
        store, row = self._places[index]
        return self._stores[store].inside(int(row))

    def take(self, indices: Sequence[int] | np.ndarray) -> "JoinedImages":
        """Return the images at `indices`, in that order; decoded images are shared, not copied."""
        chosen = np.asarray(indices, np.int64)
        return JoinedImages(self._stores, self._places[chosen], tuple(self.names[index] for index in chosen))

    def at_size(self, size: int) -> "JoinedImages":
        """Return the same images with another side; see `ImageStore.at_size`."""
        return JoinedImages([store.at_size(size) for store in self._stores], self._places, self.names)

    def ranges(self) -> list[Range]:
        """Return the black and white values of each image, and their origin."""
        found = [
            {} if rows is None else dict(zip(rows, part.ranges(), strict=True))
            for rows, part in self._parts()
        ]
        return [found[store][row] for store, row in self._places.tolist()]

    def known_ranges(self) -> list[dict[str, Range]]:
        """Return the ranges by kind of image of each set here; see `ImageStore.known_ranges`."""
        return [each for store in self._stores for each in store.known_ranges()]

    def constant(self) -> np.ndarray:
        """Return which images are constant, bool [n]."""
        found = [
            {} if rows is None else dict(zip(rows, part.constant().tolist(), strict=True))
            for rows, part in self._parts()
        ]
        return np.array([found[store][row] for store, row in self._places.tolist()], bool)

    def digest(self) -> str:
        """Return a hash of the pixels and of their order; see `ImageStore.digest`."""
        hashed = hashlib.blake2b(np.ascontiguousarray(self._places[:, 0]).tobytes(), digest_size=16)
        for rows, part in self._parts():
            if rows is not None:
                hashed.update(part.digest().encode())
        return hashed.hexdigest()

    def _parts(self) -> list[tuple[list[int] | None, ImageStore]]:
        """Return the rows of each store that are used, in order (None for no row), and their images."""
        found: list[tuple[list[int] | None, ImageStore]] = []
        for number, store in enumerate(self._stores):
            rows = self._places[self._places[:, 0] == number, 1].tolist()
            found.append((rows or None, store.take(rows)))
        return found


def concatenate(datasets: Sequence[Dataset], name: str = "") -> Dataset:
    """Return the images of several sets as one; a single set is returned as it is.

    Names of images that several sets use are made unique by the number of the set, and names of patients by
    the cohort, where the sets are of different ones. Every set keeps the intensity range that it has alone.

    >>> from dataclasses import replace
    >>> images = ImageStore.from_arrays(np.zeros((2, 8, 8, 3), np.uint8), 8)
    >>> one = Dataset("a", images, np.array([0, 1]), ("x", "y"), np.array(["P1", "P2"]), cohort="A")
    >>> both = concatenate([one, replace(one, name="b", cohort="B")])
    >>> len(both), both.groups.tolist()
    (4, ['P1 (A)', 'P2 (A)', 'P1 (B)', 'P2 (B)'])

    Args:
        datasets: The sets, with the same classes, segments and size of images.
        name: Name of the whole; by default those of the sets.

    Raises:
        UserError: The sets differ in what has to be the same.
    """
    first, *others = datasets
    if not others:
        return first
    for other in others:
        for what in ("classes", "segments", "overlapping", "multi_label", "ordinal", "uncertain"):
            here, there = getattr(first, what), getattr(other, what)
            if here != there:
                raise UserError(
                    f"{what} of {other.name} are {_shown(there)}, of {first.name} {_shown(here)}; expected the "
                    "same in all sources of one split: name all as the classes of each"
                )
        if other.images.size != first.images.size:
            raise UserError(
                f"images of {other.name} have {other.images.size} px, of {first.name} {first.images.size} px; "
                "expected one image_size in all sources of one split"
            )
    cohorts = {dataset.cohort for dataset in datasets}
    columns = dict.fromkeys(key for dataset in datasets for key in dataset.columns)
    texts = {
        key: np.concatenate([d.columns.get(key, np.full(len(d), "")) for d in datasets]) for key in columns
    }
    if len(cohorts) > 1:
        texts[COHORT] = np.concatenate([np.full(len(d), d.cohort) for d in datasets])
    spacings = [dataset.spacing for dataset in datasets]
    known = [spacing for spacing in spacings if spacing is not None]
    scales = [np.ones((len(d), 2)) if d.pixel_scale is None else d.pixel_scale for d in datasets]
    images = _images(datasets)
    seen = [near_duplicates.looks(dataset.images) for dataset in datasets]
    near_duplicates.remember(images, near_duplicates.Looks.concatenate(seen))
    return Dataset(
        name=name or "+".join(dict.fromkeys(dataset.name for dataset in datasets)),
        images=images,
        labels=np.concatenate([dataset.labels for dataset in datasets]),
        classes=first.classes,
        groups=np.array(_groups(datasets, images.names, len(cohorts) > 1), dtype=str),
        columns=texts,
        masks=_masks(datasets),
        skipped=sum(dataset.skipped for dataset in datasets),
        segments=first.segments,
        overlapping=first.overlapping,
        ordinal=first.ordinal,
        uncertain=first.uncertain,
        spacing=np.concatenate(known) if len(known) == len(spacings) else None,
        pixel_scale=None if all(each.pixel_scale is None for each in datasets) else np.concatenate(scales),
        merge_look_alikes=all(dataset.merge_look_alikes for dataset in datasets),
        cohort="" if len(cohorts) > 1 else first.cohort,
        notes=tuple(note for dataset in datasets for note in dataset.notes),
    )


def without_cohort(group: str, cohort: str) -> str:
    """Return the name of a patient before `concatenate` made it unique."""
    return group.removesuffix(f" ({cohort})") if cohort else group


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _images(datasets: Sequence[Dataset]) -> JoinedImages:
    counts = Counter(name for dataset in datasets for name in set(dataset.images.names))
    names = tuple(
        name if counts[name] == 1 else f"{number}:{name}"
        for number, dataset in enumerate(datasets)
        for name in dataset.images.names
    )
    places = [np.stack([np.full(len(d), number), np.arange(len(d))], 1) for number, d in enumerate(datasets)]
    return JoinedImages([dataset.images for dataset in datasets], np.concatenate(places), names)


def _groups(datasets: Sequence[Dataset], names: Sequence[str], by_cohort: bool) -> list[str]:
    """Return the groups; those that are the image itself get its name, those of patients the cohort."""
    found: list[str] = []
    for dataset in datasets:
        for row, (group, own) in enumerate(zip(dataset.groups.tolist(), dataset.images.names, strict=True)):
            source = dataset.images.source(row)
            if group == own:
                group = names[len(found)]
            elif by_cohort and dataset.cohort and not (source and is_own_group(group, source)):
                group = f"{group} ({dataset.cohort})"
            found.append(group)
    return found


def _masks(datasets: Sequence[Dataset]) -> tuple[Mask | None, ...] | np.ndarray | None:
    masks = [dataset.masks for dataset in datasets]
    if all(part is None for part in masks):
        return None
    arrays = [part for part in masks if isinstance(part, np.ndarray)]
    if len(arrays) == len(masks):
        return np.concatenate(arrays)
    return tuple(
        mask
        for dataset, part in zip(datasets, masks, strict=True)
        for mask in ((None,) * len(dataset) if part is None else part)
    )
