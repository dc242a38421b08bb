"""Decoding of image files to uint8 pixels, with one rule per kind of file."""

import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from dapt_jax.data import formats, intensity, limits, pictures, stalls
from dapt_jax.data.framing import Framing
from dapt_jax.data.intensity import Range, Samples
from dapt_jax.data.masks import Mask, read
from dapt_jax.data.pictures import Picture
from dapt_jax.data.plane import Plane, Source, file_of, plane
from dapt_jax.data.tiles import Recent
from dapt_jax.errors import UserError

CACHE_BYTES = 2 << 30


def decode(
    source: Source,
    size: int,
    crop: int | None = None,
    ranges: dict[str, Range] | None = None,
    resize: str = "squash",
) -> np.ndarray:
    """Read one image as square 8-bit RGB.

    Pixel values follow the order of operations of `dapt_jax.data.intensity`; by kind of file:

    * 8-bit colour is used unchanged, palettes are looked up, an alpha channel is dropped (not blended),
      bilevel and grey images are replicated to three channels.
    * Samples of 16 bits, grey or colour, and other integers are shifted down from the depth of the *set*: the
      smallest of `DEPTHS` that holds its values, except stray pixels and markers. Integers that are negative
      or exceed 16 bits, and floats, span the 1st to 99th percentile of the set; floats from 0 to 1 are
      multiplied by 255.
    * DICOM is rescaled and windowed according to its header, see `dapt_jax.data.dicom.samples`; a slice of a
      NIfTI volume spans the 1st to 99th percentile of the volume's foreground, see
      `dapt_jax.data.nifti.samples`.
    * A `Plane` with a window defines black and white itself, for every kind of file.

    The EXIF orientation is applied. Images that are not square become one as `resize` says; resizing is
    bilinear with anti-aliasing. A JPEG at least four times as large as `size`
    is decoded at 1/2, 1/4 or 1/8 of its size (its transform is scaled, which is also anti-aliased) as long as
    the result is at least twice `size`, and is then resized.

    Args:
        source: A PNG, JPEG, BMP, TIFF or any other file that Pillow reads, a DICOM file, or an array, that
            holds one image; or a `Plane` that selects one of several.
        size: Side of the result in pixels.
        crop: Side in pixels of a centre crop of the file's pixels, taken before resizing and limited to the
            image; None or 0 uses the whole image.
        ranges: Ranges of the set that the image belongs to, see `ImageStore.ranges`; without them the image
            is treated as a set of one.
        resize: How an image that is not square becomes one: `squash`, `pad` or `crop`, see `Framing`.

    Returns:
        uint8 [size, size, 3].

    Raises:
        UserError: The file is missing, truncated, not an image, or holds several and none is selected; names
            the path.
    """
    return _decode(source, Framing(size, crop, resize), lambda: ranges or {})[0]


def _decode(
    source: Source,
    framing: Framing,
    ranges: Callable[[], dict[str, Range]],
    recent: Recent[Picture] | None = None,
) -> Picture:
    """Return the pixels of `decode` and their intensity range.

    The ranges of the set are computed only if they are needed. `recent` holds the resized pictures that the
    tiles of the set are cut from.
    """
    found = plane(source)
    if found.tile:
        whole, used = pictures.of_tiles(found, ranges, recent or Recent())
        cut = framing.apply(Image.fromarray(found.tile.of(whole)), Image.Resampling.BILINEAR)
        return pictures.three_channels(np.asarray(cut)), used
    with limits.border(file_of(source), "an image"):
        image, extent, used = pictures.read(found, framing, framing.size, ranges)
        # Grey is replicated last: resizing three equal channels gives three equal channels at three times the
        # cost.
        square = np.asarray(framing.apply(image, Image.Resampling.BILINEAR, extent))
    return pictures.three_channels(square), used


def decode_mask(mask: Mask, size: int, crop: int | None = None, resize: str = "squash") -> np.ndarray:
    """Read one mask as class indices, cropped and resized as `decode` does to its image.

    Resizing takes the nearest pixel, so no class appears that the mask does not contain.

    Args:
        mask: A single-channel image whose values (or palette indices) are classes, or a colour image with
            equal channels; or any other kind of `dapt_jax.data.masks.Mask`.
        size: Side of the result in pixels.
        crop: As in `decode`.
        resize: As in `decode`.

    Returns:
        uint8 [size, size].

    Raises:
        UserError: See `dapt_jax.data.masks.read`.
    """
    return Framing(size, crop, resize).mask(read(mask))


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be read: its index in the store, its name, and the reason in one line."""

    index: int
    name: str
    reason: str


_stores: "weakref.WeakSet[_Pixels]" = weakref.WeakSet()


def cached_bytes() -> int:
    """Return the bytes of decoded images that the stores of this process hold, or have reserved."""
    reserved = sum(store.cache.nbytes for store in _stores if store.cache is not None)
    return reserved + sum(store.for_crops_bytes for store in _stores)


class _Pixels:
    """Pixels shared by several stores: files and, if they fit into memory, their decoded images."""

    def __init__(self, sources: tuple[Source, ...], framing: Framing, cached: bool, cache_bytes: int = 0):
        self.sources, self.framing, size = sources, framing, framing.size
        self.sized: dict[int, _Pixels] = {}
        self.most_bytes = cached_bytes() + cache_bytes
        self.for_crops: dict[tuple[int, int], np.ndarray] = {}
        self.for_crops_bytes = 0
        self.extents: dict[int, tuple[int, int]] = {}
        # np.empty only reserves address space: memory is used as images are decoded.
        self.cache = np.empty((len(sources), size, size, 3), np.uint8) if cached else None
        _stores.add(self)
        self.ready = np.zeros(len(sources), bool)
        self.used: dict[int, Range] = {}
        self.constant = np.zeros(len(sources), bool)
        self.set_ranges: dict[str, Range] | None = None
        self._lock = threading.Lock()
        self.recent: Recent[Picture] = Recent()

    def at_size(self, size: int) -> "_Pixels":
        """Return the same images at another size, the same object each time: see `ImageStore.at_size`."""
        if size not in self.sized:
            framing = replace(self.framing, size=size)
            if self.sources:
                room = max(0, self.most_bytes - cached_bytes())
                fits = len(self.sources) * size * size * 3 <= room
                made = _Pixels(self.sources, framing, cached=fits, cache_bytes=room)
                made.ranges = self.ranges  # type: ignore[method-assign]  # computed once, or given
            else:
                assert self.cache is not None
                own = self.framing.size
                if size > own:
                    raise UserError(
                        f"images in one array of {own} px are not enlarged; expected at most {own}"
                    )
                made = _Pixels((), framing, cached=False)
                made.cache, made.extents = Framing(size).images(self.cache), self.extents
                made.ready = self.ready
            self.sized[size] = made
        return self.sized[size]

    def read(self, row: int) -> np.ndarray:
        if self.cache is None:
            return self._decode(row)
        if not self.ready[row]:
            # Two threads may decode the same file at once; both write the same bytes, and set the flag last.
            self.cache[row] = self._decode(row)
            self.ready[row] = True
        return self.cache[row]

    def _decode(self, row: int) -> np.ndarray:
        with stalls.reading(file_of(self.sources[row])):
            image, used = _decode(self.sources[row], self.framing, self.ranges, self.recent)
        self.constant[row] = bool((image == image[:1, :1]).all())
        self.used[row] = used
        return image

    def picture(self, source: Plane) -> np.ndarray:
        return pictures.three_channels(pictures.of_tiles(source, self.ranges, self.recent)[0])

    def for_crop(self, row: int, most: int) -> np.ndarray:
        held = self.for_crops.get((row, most))
        if held is not None:
            return held
        source = self.sources[row]
        with stalls.reading(file_of(source)):
            made = pictures.at_most(plane(source), self.framing, most, self.ranges, self.recent)
        # What is held first stays: each epoch reads every picture once, so that a newer one is worth no more.
        with self._lock:
            if (row, most) not in self.for_crops and cached_bytes() + made.nbytes <= self.most_bytes:
                self.for_crops[row, most] = made
                self.for_crops_bytes += made.nbytes
        return made

    def inside(self, row: int) -> tuple[int, int, int, int]:
        if self.framing.resize != "pad":
            return 0, 0, self.framing.size, self.framing.size
        if row not in self.extents:
            self.extents[row] = formats.extent(self.sources[row])
        return self.framing.inside(self.extents[row])

    def ranges(self) -> dict[str, Range]:
        """Return the ranges of the whole set, computed once from all files, independent of their order."""
        with self._lock:
            if self.set_ranges is None:
                wholes = dict.fromkeys(plane(source).whole for source in self.sources)
                self.set_ranges = intensity.of_set(wholes, self._samples, _workers(None))
            return self.set_ranges

    def _samples(self, source: Source) -> Samples | None:
        try:
            with stalls.reading(file_of(source)), limits.border(file_of(source), "an image"):
                return formats.samples(source)
        except UserError:
            return None


def _workers(asked: int | None) -> int:
    return asked or min(os.cpu_count() or 1, 16)


class ImageStore:
    """A sequence of images of one size that several threads can read safely.

    Indexing gives a uint8 [size, size, 3] array, which must not be modified: it may be the cached image
    itself.

    Attributes:
        names: Path (and slice) of each image as given, or a generated name such as "phantom/000012".
        framing: How each picture became a square; its `size` is the side of every image in pixels.
    """

    def __init__(self, pixels: _Pixels, rows: np.ndarray, names: tuple[str, ...]):
        """Use `from_files` or `from_arrays`."""
        self._pixels, self._rows = pixels, rows
        self.names = names
        self.framing = pixels.framing

    @property
    def size(self) -> int:
        """Side of every image in pixels."""
        return self.framing.size

    @classmethod
    def from_files(
        cls,
        sources: Sequence[Source],
        size: int,
        crop: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        resize: str = "squash",
        ranges: Mapping[str, Range] | None = None,
    ) -> "ImageStore":
        """Make a store of image files, without reading any of them yet.

        Args:
            sources: One file, or `Plane` of a file, per image.
            size: Side of the decoded images in pixels.
            crop: See `decode`.
            cache_bytes: Decoded images are cached in memory if all of them fit into this many bytes;
                otherwise each access decodes the image again. Pictures that random crops are cut from, see
                `for_crop`, take what is left.
            resize: See `decode`.
            ranges: Ranges of another set (see `known_ranges`) that apply to these images; None to compute
                those of this set.
        """
        shared = _Pixels(
            tuple(sources),
            Framing(size, crop or None, resize),
            cached=len(sources) * size * size * 3 <= cache_bytes,
            cache_bytes=cache_bytes,
        )
        shared.set_ranges = None if ranges is None else dict(ranges)
        return cls(shared, np.arange(len(sources)), tuple(map(str, sources)))

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray,
        size: int,
        names: Sequence[str] = (),
        crop: int | None = None,
        resize: str = "squash",
    ) -> "ImageStore":
        """Make a store of images in memory, cropped and resized immediately if needed.

        Args:
            images: uint8 [n, h, w, 3].
            size: Side of the images in the store, in pixels.
            names: One name per image; by default "array/000000" and so on.
            crop: See `decode`.
            resize: See `decode`.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"expected uint8 [n, h, w, 3], got {images.dtype} {list(images.shape)}")
        shared = _Pixels((), Framing(size, crop or None, resize), cached=False)
        shared.cache = shared.framing.images(images)
        shared.extents = dict.fromkeys(range(len(images)), (images.shape[1], images.shape[2]))
        shared.ready = np.ones(len(images), bool)
        return cls(
            shared,
            np.arange(len(images)),
            tuple(names) or tuple(f"array/{i:06d}" for i in range(len(images))),
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._pixels.read(int(self._rows[index]))

    def inside(self, index: int) -> tuple[int, int, int, int]:
        """Return the part of an image that is not padding: top, left, bottom, right in its pixels."""
        return self._pixels.inside(int(self._rows[index]))

    def source(self, index: int) -> Source | None:
        """Return the location of an image; None for one that was never a file."""
        return self._pixels.sources[self._rows[index]] if self._pixels.sources else None

    def picture(self, index: int) -> np.ndarray:
        """Return the resized picture that a tile is cut from, uint8 [h, w, 3]; an image that is no tile."""
        row = int(self._rows[index])
        source = plane(self._pixels.sources[row]) if self._pixels.sources else None
        return self[index] if source is None or source.tile is None else self._pixels.picture(source)

    @property
    def is_of_files(self) -> bool:
        """Whether the images are files, which `for_crop` can read."""
        return bool(self._pixels.sources)

    def for_crop(self, index: int, most: int) -> np.ndarray:
        """Return the picture of a file that random crops are cut from, uint8 [h, w] or [h, w, 3].

        It is what the square shows, with its own aspect ratio, and shrunk where its short side is longer than
        `most`. Pictures stay in memory as far as the bytes of the cache reach; others are decoded each time.

        Args:
            index: Index of the image, of a store of files.
            most: Largest short side in pixels.
        """
        return self._pixels.for_crop(int(self._rows[index]), most)

    def batch(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the images at `indices` as a new uint8 [k, size, size, 3] array."""
        out = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        for target, index in zip(out, indices, strict=True):
            target[...] = self[index]
        return out

    def take(self, indices: Sequence[int] | np.ndarray) -> "ImageStore":
        """Return a store of the images at `indices`, in that order; decoded images are shared, not copied."""
        chosen = np.asarray(indices, np.int64)
        return ImageStore(self._pixels, self._rows[chosen], tuple(self.names[index] for index in chosen))

    def at_size(self, size: int) -> "ImageStore":
        """Return a store of the same images with another side, which all callers share.

        Files are decoded and resampled from their own pixels at this size, by the rule of `decode`: nothing
        is enlarged that the file has in detail. Images of an array are reduced from the stored ones.

        Args:
            size: Side in pixels.

        Raises:
            UserError: The images are of an array, and smaller.
        """
        return ImageStore(self._pixels.at_size(size), self._rows, self.names)

    def verify(
        self, workers: int | None = None, visit: Callable[[int, np.ndarray], None] | None = None
    ) -> list[BadImage]:
        """Decode every image once, in several threads, which also fills the cache.

        Args:
            workers: Number of threads; by default one per CPU, at most 16.
            visit: Called with the index and the pixels of every readable image, from any thread.

        Returns:
            The images that cannot be read, in order; empty if all can be read.
        """

        def attempt(index: int) -> BadImage | None:
            try:
                pixels = self[index]
            except UserError as error:
                return BadImage(index, self.names[index], str(error))
            if visit:
                visit(index, pixels)
            return None

        with ThreadPoolExecutor(_workers(workers)) as pool:
            return [bad for bad in pool.map(attempt, range(len(self))) if bad is not None]

    def ranges(self) -> list[Range]:
        """Return the black and white values of each image, and their origin."""
        if not self._pixels.sources:
            return [intensity.EIGHT_BITS] * len(self)
        for row in self._rows:
            if int(row) not in self._pixels.used:
                self._pixels._decode(int(row))
        return [self._pixels.used[int(row)] for row in self._rows]

    def known_ranges(self) -> list[dict[str, Range]]:
        """Return the ranges by kind of image of each set here, empty where no image needed them."""
        return [dict(self._pixels.set_ranges or {})]

    def constant(self) -> np.ndarray:
        """Return which images are constant, bool [n]."""
        self.ranges()
        if not self._pixels.sources:
            images = (self[index] for index in range(len(self)))
            return np.array([bool((image == image[:1, :1]).all()) for image in images], bool)
        return self._pixels.constant[self._rows]

    def digest(self) -> str:
        """Return a hash of the pixels.

        It does not depend on where files are; for images not in memory, it is a hash of path, size and
        modification time.
        """
        hashed = hashlib.blake2b(str(self.framing).encode(), digest_size=16)
        ranges = [] if self._pixels.cache is not None else self.ranges()
        for index, row in enumerate(self._rows):
            if self._pixels.cache is not None:
                hashed.update(self._pixels.read(row).tobytes())
            else:
                source = plane(self._pixels.sources[row])
                path = source.path
                stat = path.stat()
                # Without the pixels in memory, the ranges of the set show whether the set has changed.
                hashed.update(
                    f"{ranges[index]}"
                    f"{replace(source, path=path.absolute())}{source.tile!r}\0"
                    f"{stat.st_size}\0{stat.st_mtime_ns}\n".encode()
                )
        return hashed.hexdigest()
