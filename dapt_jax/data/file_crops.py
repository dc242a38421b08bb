"""Random resized crops that are cut from image files, not from images that were shrunk before.

Draws depend on (seed, view, row) alone, like those of `dapt_jax.data.augment`: neither the order of examples,
nor the number of devices or threads, nor a restart changes a pixel.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dapt_jax.data import pictures
from dapt_jax.data.augment import Augment
from dapt_jax.data.decode import ImageStore
from dapt_jax.errors import UserError

RATIO = 3 / 4, 4 / 3
"""Aspect ratios, width by height, between which a crop is drawn."""

_ATTEMPTS, _FOR_CROPS, _SAMPLED = 10, 49, 8


def check(images: ImageStore, has_masks: bool, name: str) -> None:
    """Refuse images that crops of files cannot be cut from.

    Args:
        images: Images of a run whose `augment.crop_from` is not 0.
        has_masks: Whether the run learns masks.
        name: Name of the set, for errors.

    Raises:
        UserError: The images are arrays, or have masks.
    """
    if has_masks:
        raise UserError(
            f"{name}: augment.crop_from cuts images, not their masks; expected augment.crop_from=0"
        )
    if not images.is_of_files:
        raise UserError(
            f"{name}: augment.crop_from cuts crops from image files, and these images are in one array; expected "
            "augment.crop_from=0"
        )


def drawn_box(extent: tuple[int, int], least: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return a random rectangle of a picture: top, left, bottom, right (Szegedy et al., arXiv 1409.4842).

    Its area is uniform between `least` and 1 of the picture's, the logarithm of its aspect ratio between those
    of `RATIO`, its place uniform; after ten draws that do not fit into the picture it is the largest central
    rectangle of an allowed ratio. This is the rule of torchvision's RandomResizedCrop.

    Args:
        extent: Height and width of the picture in pixels.
        least: Smallest share of the area.
        rng: Source of random numbers.
    """
    height, width = extent
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(least, 1)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            top, left = (int(rng.integers(room + 1)) for room in (height - down, width - across))
            return top, left, top + down, left + across
    down, across = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    top, left = (height - down) // 2, (width - across) // 2
    return top, left, top + down, left + across


def batch(
    images: ImageStore, augment: Augment, rows: Sequence[int] | np.ndarray, seed: int, view: int
) -> np.ndarray:
    """Return the images that an augmentation is applied to: stored ones, or crops of their files.

    Args:
        images: All images.
        augment: The augmentation; `crop_from` selects crops of files.
        rows: Rows of the batch.
        seed: Seed of the run.
        view: Number of the view.

    Returns:
        uint8 [k, side, side, 3]; crops of files have the side of the augmented images.
    """
    if not augment.crop_from:
        return images.batch(rows)
    side = augment.size(images.size)
    out = np.empty((len(rows), side, side, 3), np.uint8)
    for target, row in zip(out, rows, strict=True):
        picture = images.for_crop(int(row), augment.crop_from)
        rng = np.random.default_rng([seed, view, int(row), _FOR_CROPS])
        top, left, bottom, right = drawn_box((picture.shape[0], picture.shape[1]), augment.crop, rng)
        crop = Image.fromarray(picture[top:bottom, left:right]).resize(
            (side, side), Image.Resampling.BILINEAR
        )
        target[...] = pictures.three_channels(np.asarray(crop))
    return out


def estimated_bytes(images: ImageStore, most: int) -> int:
    """Return about how many bytes the pictures of all images take, from some of them, evenly spaced.

    Args:
        images: All images, of files.
        most: Largest short side in pixels.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, min(len(images), _SAMPLED)).astype(int)).tolist()
    return round(sum(images.for_crop(row, most).nbytes for row in rows) / len(rows) * len(images))
