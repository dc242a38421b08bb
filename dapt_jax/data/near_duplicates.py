"""Near-duplicate images in different files, found by properties recorded when images are first decoded."""

import functools
import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of

import numpy as np
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from dapt_jax.data import identity, intensity, splits
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.decode import ImageStore
from dapt_jax.data.plane import Source, plane

THUMBNAIL = 16
CORRELATION = 0.995
"""Minimum Pearson correlation of the thumbnails of near-duplicate images."""
FLAT = 2
"""Largest range of grey levels, out of 256, of an image without content."""
_BLOCK = 1024
_ALL_PAIRS = 1e9
"""Up to this number of pairs, one matrix product is faster than a tree."""
_DIMENSIONS = 12


@dataclass(frozen=True)
class Looks:
    """Recorded properties of the images of a store.

    Attributes:
        thumbnails: uint8 [n, 16, 16, 3].
        digests: uint64 [n], hashes of the decoded pixels: equal pixels have equal digests.
        darkest: uint8 [n], the smallest value of any pixel and channel.
        brightest: uint8 [n], the largest value of any pixel and channel.
        low: uint8 [n], the 1st percentile of the foreground (see `intensity.Statistics.range`).
        high: uint8 [n], the 99th percentile of the foreground.
    """

    thumbnails: np.ndarray
    digests: np.ndarray
    darkest: np.ndarray
    brightest: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def flat(self) -> np.ndarray:
        """Whether an image is (nearly) constant: bool [n]."""
        return self.brightest.astype(int) - self.darkest <= FLAT

    @property
    def black(self) -> np.ndarray:
        """Whether an image is (nearly) black: bool [n]."""
        return self.brightest <= FLAT

    def take(self, indices: np.ndarray) -> "Looks":
        """Return the properties of the images at `indices`."""
        return Looks(*(getattr(self, field.name)[indices] for field in fields_of(self)))

    @classmethod
    def concatenate(cls, parts: Sequence["Looks"]) -> "Looks":
        """Return the properties of the images of several stores, one after the other."""
        fields = [vars(part) for part in parts]
        return cls(
            **{field.name: np.concatenate([each[field.name] for each in fields]) for field in fields_of(cls)}
        )

    @functools.cached_property
    def vectors(self) -> np.ndarray:
        """Return thumbnails of mean 0 per channel and norm 1 (0 if constant): float32 [n, 768]."""
        found = self.thumbnails.astype(np.float32)
        found -= found.mean(axis=(1, 2), keepdims=True)
        found = found.reshape(len(found), -1)
        found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)
        found[self.flat] = 0
        return found


class Collector:
    """Recording of image properties as images are decoded, from any thread."""

    def __init__(self, count: int):
        """Allocate arrays for this number of images."""
        self._looks = Looks(
            np.zeros((count, THUMBNAIL, THUMBNAIL, 3), np.uint8),
            np.zeros(count, np.uint64),
            *(np.zeros(count, np.uint8) for _ in range(4)),
        )

    def add(self, index: int, pixels: np.ndarray) -> None:
        """Record the properties of one image, uint8 [size, size, 3]."""
        image = Image.fromarray(pixels)
        small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        seen = self._looks
        seen.thumbnails[index] = np.asarray(small)
        digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=8).digest()
        seen.digests[index] = int.from_bytes(digest, "little")
        counts = np.array(image.histogram()).reshape(-1, 256).sum(0)
        seen.darkest[index], seen.brightest[index] = np.flatnonzero(counts)[[0, -1]]
        seen.low[index], seen.high[index] = intensity.foreground_levels(counts)

    def of_pictures(self, images: ImageStore, indices: np.ndarray) -> None:
        """Give tiles the look of their whole pictures, by which they are compared.

        Tiles of different pictures often look alike where they hold little, such as a healthy retina; and
        where two pictures are the same, all of their tiles are in question.

        Args:
            images: The store.
            indices: The tiles in it that are in use.
        """
        found: dict[int, np.ndarray] = {}
        for index, picture in zip(indices.tolist(), _pictures(images)[indices].tolist(), strict=True):
            if picture not in found:
                whole = Image.fromarray(images.picture(index))
                found[picture] = np.asarray(whole.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
            self._looks.thumbnails[index] = found[picture]

    def looks(self, indices: np.ndarray) -> Looks:
        """Return the properties of the images at `indices`."""
        return self._looks.take(indices)


def _pictures(images: ImageStore) -> np.ndarray:
    """Return a number for each image, the same for tiles of one picture: int64 [n]."""
    numbers: dict[Source, int] = {}
    sources = (images.source(index) for index in range(len(images)))
    return np.array(
        [
            -1 - index
            if source is None or plane(source).tile is None
            else numbers.setdefault(plane(source).whole, len(numbers))
            for index, source in enumerate(sources)
        ],
        np.int64,
    )


_seen: "weakref.WeakKeyDictionary[ImageStore, Looks]" = weakref.WeakKeyDictionary()


def remember(images: ImageStore, seen: Looks) -> None:
    """Cache the properties of a store's images for as long as the store exists."""
    _seen[images] = seen


def looks(images: ImageStore) -> Looks:
    """Return the properties of a store's images; images without recorded properties are read."""
    if images not in _seen:
        collector = Collector(len(images))
        for index in range(len(images)):
            collector.add(index, images[index])
        remember(images, collector.looks(np.arange(len(images))))
    return _seen[images]


def duplicates(
    dataset_a: Dataset, dataset_b: Dataset, correlation: float = CORRELATION
) -> list[tuple[int, int]]:
    """Find images of one set that are also in the other, exactly or as near-duplicates.

    Two images match if their 16-pixel colour thumbnails correlate above `correlation` after subtraction of
    the mean colour: copies in another file format, size, brightness or colour depth match; other crops,
    rotations and mirror images do not. Sets of very similar scenes give false matches: inspect them before
    relying on the number. Constant images match nothing.

    Args:
        dataset_a: The first set.
        dataset_b: The second set; the same object searches within one set and lists each pair once.
        correlation: Minimum Pearson correlation of a match.

    Returns:
        Pairs (index in `dataset_a`, index in `dataset_b`), in order.
    """
    if looks(dataset_a.images).flat.all() or looks(dataset_b.images).flat.all():
        return []
    a = looks(dataset_a.images).vectors
    if dataset_b is dataset_a:
        pairs = _alike(a, a, correlation)
        pairs = pairs[pairs[:, 0] < pairs[:, 1]]
        pictures = _pictures(dataset_a.images)
        pairs = pairs[pictures[pairs[:, 0]] != pictures[pairs[:, 1]]]
    else:
        pairs = _alike(a, looks(dataset_b.images).vectors, correlation)
    return [(int(i), int(j)) for i, j in pairs]


def _alike(a: np.ndarray, b: np.ndarray, correlation: float) -> np.ndarray:
    """Return int64 [k, 2], rows of two sets of unit vectors with a product above `correlation`, in order.

    If there are too many pairs to compare all, only those with close projections are compared: unit vectors
    with correlation r are sqrt(2 - 2 r) apart, and a projection never increases the distance of two points,
    so no pair is missed.
    """
    if not len(a) or not len(b):
        return np.zeros((0, 2), np.int64)
    if len(a) * len(b) <= _ALL_PAIRS:
        step = max(1, 20_000_000 // len(b))
        starts = range(0, len(a), step)
        return np.concatenate(
            [
                np.argwhere(a[start : start + step] @ b.T > correlation) + np.array([start, 0])
                for start in starts
            ]
        )
    sample = np.concatenate([a[:: -(-len(a) // 1000)], b[:: -(-len(b) // 1000)]])
    axes = np.linalg.svd(sample - sample.mean(axis=0), full_matrices=False)[2][:_DIMENSIONS].T
    near = cKDTree(b @ axes)
    radius = np.sqrt(2 - 2 * correlation) + 1e-4
    found = []
    for start in range(0, len(a), _BLOCK):
        block = a[start : start + _BLOCK]
        candidates = near.query_ball_point(block @ axes, radius, return_sorted=True)
        rows = np.repeat(np.arange(len(block)), [len(each) for each in candidates])
        columns = np.concatenate([np.asarray(each, np.int64) for each in candidates])
        for part in np.array_split(np.arange(len(rows)), -(-len(rows) // 50_000) or 1):
            kept = np.einsum("ij,ij->i", block[rows[part]], b[columns[part]]) > correlation
            found.append(np.column_stack([rows[part][kept] + start, columns[part][kept]]))
    return np.concatenate(found)


@dataclass(frozen=True)
class Merged:
    """Groups that splits must not divide, and the reasons why they are larger than the patients.

    Attributes:
        groups: str [n].
        pairs: Indices of near-duplicate images of different patients.
        spellings: Names of patients that differ only in case, separators or zeros.
    """

    groups: np.ndarray
    pairs: list[tuple[int, int]]
    spellings: list[tuple[str, ...]]


_merged: dict[str, Merged] = {}


def merged(dataset: Dataset) -> Merged:
    """Return the groups of a set, joined if they share a near-duplicate or nearly the same name.

    `Dataset.merge_look_alikes` switches off only the former.
    """
    key = f"{dataset.fingerprint()} {dataset.merge_look_alikes}"
    if key in _merged:
        return _merged[key]
    names, member = splits.in_order(dataset.groups)
    own = set(dataset.images.names)
    spellings = identity.near_spellings(name for name in names.tolist() if name not in own)
    links = [(name, group[0]) for group in spellings for name in group[1:]]
    places = {name: place for place, name in enumerate(names.tolist())}
    edges = [(places[name], places[other]) for name, other in links]
    pairs = []
    if dataset.merge_look_alikes:
        pairs = [(a, b) for a, b in duplicates(dataset, dataset) if member[a] != member[b]]
        edges += [(member[a], member[b]) for a, b in pairs]
    if edges:
        rows, columns = np.array(edges).T
        graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(names), len(names)))
        component = connected_components(graph, directed=False)[1]
        first = np.unique(component, return_index=True)[1]
        groups = names[first[component[member]]]
    else:
        groups = dataset.groups
    _merged[key] = Merged(groups, pairs, spellings)
    return _merged[key]
