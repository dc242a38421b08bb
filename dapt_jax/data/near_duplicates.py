"""The same picture in two sets, though its files differ: a look at thumbnails."""

import numpy as np
from PIL import Image

from dapt_jax.data.dataset import Dataset
from dapt_jax.data.decode import ImageStore

THUMBNAIL = 16
_BLOCK = 4096


def duplicates(dataset_a: Dataset, dataset_b: Dataset, correlation: float = 0.995) -> list[tuple[int, int]]:
    """Finds images of one set that are, to the eye, also in the other.

    Two images match when their 16-pixel colour thumbnails correlate above `correlation` after the mean colour is taken
    out: copies in another file format, size, brightness or colour depth match; other crops, rotations and mirror images
    do not. Sets of very similar scenes give false matches: look at them before believing the number.

    Args:
        dataset_a: one set.
        dataset_b: the other; the same object to look within one set, each pair then being listed once.
        correlation: the least Pearson correlation of a match.

    Returns:
        Pairs (index in `dataset_a`, index in `dataset_b`), in order.
    """
    a = _thumbnails(dataset_a.images)
    b = a if dataset_b is dataset_a else _thumbnails(dataset_b.images)
    pairs = []
    for start in range(0, len(a), _BLOCK):
        rows, columns = np.nonzero(a[start : start + _BLOCK] @ b.T > correlation)
        pairs += list(zip((rows + start).tolist(), columns.tolist(), strict=True))
    if dataset_b is dataset_a:
        pairs = [(i, j) for i, j in pairs if i < j]
    return pairs


def _thumbnails(images: ImageStore) -> np.ndarray:
    """float32 [n, 768] thumbnails of mean 0 per channel and length 1 (length 0 for an image of one colour)."""
    size = (THUMBNAIL, THUMBNAIL)
    small = [Image.fromarray(images[i]).resize(size, Image.Resampling.BOX) for i in range(len(images))]
    thumbnails = np.stack([np.asarray(image) for image in small]).astype(np.float32)
    thumbnails -= thumbnails.mean(axis=(1, 2), keepdims=True)
    flat = thumbnails.reshape(len(thumbnails), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
