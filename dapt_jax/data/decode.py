"""Image files to uint8 pixels: one rule per kind of file, and never a silently grey image."""

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from dapt_jax.data import formats, intensity, limits, pixels, stalls
from dapt_jax.data.intensity import Range, Samples
from dapt_jax.data.masks import Mask, read, resized
from dapt_jax.data.pixels import crop_and_resize
from dapt_jax.data.plane import Source, file_of, plane
from dapt_jax.errors import UserError

CACHE_BYTES = 2 << 30
DRAFT_MARGIN = 2
"""A JPEG may be decoded at a fraction of its size down to this many times the size that is wanted."""


def decode(
    source: Source, size: int, crop: int | None = None, ranges: dict[str, Range] | None = None
) -> np.ndarray:
    """Reads one image as square 8-bit RGB.

    Pixel values follow the one order of `dapt_jax.data.intensity`; by kind of file:

    * 8-bit colour is taken as it is, palettes are looked up, an alpha channel is dropped (not blended),
      bilevel and grey images are replicated to three channels.
    * Samples of 16 bits, grey or colour, and other integers are shifted down from the depth of the *set*: the
    least of
      `DEPTHS` that holds its values, stray pixels and markers apart. Integers that are negative or beyond 16
      bits, and floats, span the 1st to 99th percentile of the set; floats from 0 to 1 are multiplied by 255.
    * DICOM is rescaled and windowed as its header says, see `dapt_jax.data.dicom.samples`; a slice of a NIfTI
    volume spans
      the 1st to 99th percentile of the volume's foreground, see `dapt_jax.data.nifti.samples`.
    * A `Plane` with a window says itself which values are black and white, whatever the file.

    The EXIF orientation is applied. Images that are not square are resized to a square without keeping their
    aspect; resizing is bilinear with anti-aliasing. A JPEG at least four times as large as `size` is decoded
    at 1/2, 1/4 or 1/8 of its size (its transform scaled, so anti-aliased too) as long as that leaves twice
    `size`, and resized from there.

    Args:
        source: a PNG, JPEG, BMP, TIFF or any other file that Pillow reads, a DICOM file, or an array, that
            holds one image; or a `Plane` that says which of several.
        size: side of the result in pixels.
        crop: side in pixels of a centre crop of the file's pixels, taken before resizing and limited to the
            image; None or 0 takes the whole image.
        ranges: ranges of the set that the image belongs to, see `ImageStore.ranges`; without them it is a set
            of one.

    Returns:
        uint8 [size, size, 3].

    Raises:
        UserError: the file is missing, cut short, no image, or holds several and none is named; names the
            path.
    """
    return _decode(source, size, crop, lambda: ranges or {})[0]


def _decode(
    source: Source, size: int, crop: int | None, ranges: Callable[[], dict[str, Range]]
) -> tuple[np.ndarray, Range]:
    """The pixels of `decode`, and the range that they have; the set's ranges are asked for where they are needed."""
    with limits.border(file_of(source), "an image"):
        samples = formats.samples(source, 0 if crop else DRAFT_MARGIN * size)
        shown, used = samples.shown(None if samples.known else ranges())
        image = Image.fromarray(np.ascontiguousarray(shown))
        height, width = shown.shape[:2]
        limits.check(
            file_of(source), (width + height) * pixels.RESIZING, f"an image of {width} x {height} pixels"
        )
        # Grey is replicated last: three equal channels resize to three equal channels, at three times the
        # cost.
        square = np.asarray(crop_and_resize(image, size, crop, Image.Resampling.BILINEAR))
    return (square if square.ndim == 3 else np.repeat(square[..., None], 3, axis=2)), used


def decode_mask(mask: Mask, size: int, crop: int | None = None) -> np.ndarray:
    """Reads one mask as class indices, cropped and resized as `decode` does to its image.

    Resizing takes the nearest pixel, so no class appears that the mask does not hold.

    Args:
        mask: a single-channel image whose values (or palette indices) are classes, or colour with equal
            channels; or any other kind of `dapt_jax.data.masks.Mask`.
        size: side of the result in pixels.
        crop: as in `decode`.

    Returns:
        uint8 [size, size].

    Raises:
        UserError: see `dapt_jax.data.masks.read`.
    """
    return resized(read(mask), size, crop)


def resize(images: np.ndarray, size: int, crop: int | None = None) -> np.ndarray:
    """Crops and resizes pixels that are in memory, as `decode` does to files.

    Args:
        images: uint8 [n, h, w, 3].
        size: side of the result in pixels.
        crop: as in `decode`.

    Returns:
        uint8 [n, size, size, 3]; `images` itself when there is nothing to do.
    """
    if images.shape[1:3] == (size, size) and (not crop or crop >= size):
        return images
    out = np.empty((len(images), size, size, 3), np.uint8)
    for target, image in zip(out, images, strict=True):
        target[...] = np.asarray(
            crop_and_resize(Image.fromarray(image), size, crop, Image.Resampling.BILINEAR)
        )
    return out


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be read: its index in the store, its name, and the one-line reason."""

    index: int
    name: str
    reason: str


class _Pixels:
    """The pixels that several stores share: files and, if they fit, their decoded images."""

    def __init__(self, sources: tuple[Source, ...], size: int, crop: int | None, cached: bool):
        self.sources, self.size, self.crop = sources, size, crop
        # np.empty costs address space only: memory is used as images are decoded.
        self.cache = np.empty((len(sources), size, size, 3), np.uint8) if cached else None
        self.ready = np.zeros(len(sources), bool)
        self.used: dict[int, Range] = {}
        self.constant = np.zeros(len(sources), bool)
        self._ranges: dict[str, Range] | None = None
        self._lock = threading.Lock()

    def read(self, row: int) -> np.ndarray:
        if self.cache is None:
            return self._decode(row)
        if not self.ready[row]:
            # Two threads may decode the same file at once; both write the same bytes, and the flag comes
            # last.
            self.cache[row] = self._decode(row)
            self.ready[row] = True
        return self.cache[row]

    def _decode(self, row: int) -> np.ndarray:
        with stalls.reading(file_of(self.sources[row])):
            image, used = _decode(self.sources[row], self.size, self.crop, self.ranges)
        self.constant[row] = bool((image == image[:1, :1]).all())
        self.used[row] = used
        return image

    def ranges(self) -> dict[str, Range]:
        """The ranges of the whole set, computed once, from all files and in no order."""
        with self._lock:
            if self._ranges is None:
                self._ranges = intensity.of_set(self.sources, self._samples, _workers(None))
            return self._ranges

    def _samples(self, source: Source) -> Samples | None:
        try:
            with stalls.reading(file_of(source)), limits.border(file_of(source), "an image"):
                return formats.samples(source)
        except UserError:
            return None


def _workers(asked: int | None) -> int:
    return asked or min(os.cpu_count() or 1, 16)


class ImageStore:
    """A sequence of images of one size, safe to read from several threads.

    Indexing gives a uint8 [size, size, 3] array, which must not be written to: it may be the cached image
    itself.

    Attributes:
        names: path (and slice) of each image as it was given, or a made-up name such as "phantom/000012".
        size: side of every image in pixels.
        crop: side of the centre crop taken from each file before resizing; None for the whole image.
    """

    def __init__(self, pixels: _Pixels, rows: np.ndarray, names: tuple[str, ...]):
        """Use `from_files` or `from_arrays`."""
        self._pixels, self._rows = pixels, rows
        self.names = names
        self.size, self.crop = pixels.size, pixels.crop

    @classmethod
    def from_files(
        cls, sources: Sequence[Source], size: int, crop: int | None = None, cache_bytes: int = CACHE_BYTES
    ) -> "ImageStore":
        """Makes a store over image files; nothing is read yet.

        Args:
            sources: one file, or `Plane` of a file, per image.
            size: side of the decoded images in pixels.
            crop: see `decode`.
            cache_bytes: decoded images are kept in memory if all of them fit into this many bytes; if not,
                each access decodes again.
        """
        shared = _Pixels(
            tuple(sources), size, crop or None, cached=len(sources) * size * size * 3 <= cache_bytes
        )
        return cls(shared, np.arange(len(sources)), tuple(map(str, sources)))

    @classmethod
    def from_arrays(
        cls, images: np.ndarray, size: int, names: Sequence[str] = (), crop: int | None = None
    ) -> "ImageStore":
        """Makes a store over images in memory, cropped and resized at once where that is needed.

        Args:
            images: uint8 [n, h, w, 3].
            size: side of the images in the store, in pixels.
            names: one name per image; by default "array/000000" and so on.
            crop: see `decode`.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"expected uint8 [n, h, w, 3], got {images.dtype} {list(images.shape)}")
        shared = _Pixels((), size, crop or None, cached=False)
        shared.cache = resize(images, size, crop)
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

    def source(self, index: int) -> Source | None:
        """Returns where an image lies; None for one that never was a file."""
        return self._pixels.sources[self._rows[index]] if self._pixels.sources else None

    def batch(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the images at `indices` as a new uint8 [k, size, size, 3] array."""
        out = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        for target, index in zip(out, indices, strict=True):
            target[...] = self[index]
        return out

    def take(self, indices: Sequence[int] | np.ndarray) -> "ImageStore":
        """Returns a store of the images at `indices`, in that order; decoded images are shared, not copied."""
        chosen = np.asarray(indices, np.int64)
        return ImageStore(self._pixels, self._rows[chosen], tuple(self.names[index] for index in chosen))

    def verify(
        self, workers: int | None = None, visit: Callable[[int, np.ndarray], None] | None = None
    ) -> list[BadImage]:
        """Decodes every image once, in threads, which also fills the cache.

        Args:
            workers: number of threads; by default one per CPU, at most 16.
            visit: is given the index and the pixels of every image that can be read, from any thread.

        Returns:
            The images that cannot be read, in order; empty when all are good.
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
        """Returns which values of each image are black and white, and how that is known."""
        if not self._pixels.sources:
            return [intensity.EIGHT_BITS] * len(self)
        for row in self._rows:
            if int(row) not in self._pixels.used:
                self._pixels._decode(int(row))
        return [self._pixels.used[int(row)] for row in self._rows]

    def constant(self) -> np.ndarray:
        """Returns bool [n], which images are of one colour throughout."""
        self.ranges()
        if not self._pixels.sources:
            images = (self[index] for index in range(len(self)))
            return np.array([bool((image == image[:1, :1]).all()) for image in images], bool)
        return self._pixels.constant[self._rows]

    def digest(self) -> str:
        """Returns a hash of the pixels, so that files may move; of path, bytes and time where they are not in memory."""
        hashed = hashlib.blake2b(f"{self.size} {self.crop}".encode(), digest_size=16)
        ranges = [] if self._pixels.cache is not None else self.ranges()
        for index, row in enumerate(self._rows):
            if self._pixels.cache is not None:
                hashed.update(self._pixels.read(row).tobytes())
            else:
                source = self._pixels.sources[row]
                path = file_of(source)
                stat = path.stat()
                # Where the pixels are not at hand, the set's ranges tell that it has become another set.
                hashed.update(
                    f"{ranges[index]}"
                    f"{replace(plane(source), path=path.absolute())}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode()
                )
        return hashed.hexdigest()
