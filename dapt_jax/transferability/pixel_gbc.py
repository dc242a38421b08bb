"""The Bhattacharyya coefficient between classes of pixels, for segmentation."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

from dapt_jax.transferability.gbc import gbc
from dapt_jax.transferability.inputs import FeatureStatistics, maps_with_masks
from dapt_jax.transferability.registry import score


@score(
    "pixel_gbc",
    needs="masks",
    higher_is_better=True,
    title="pixel GBC",
    arguments=lambda sample: ((sample.maps or ())[-1], (sample.masks or ())[-1]),
)
def pixel_gbc(
    features: Num[Any, "n h w d"],
    masks: Int[Any, "n h w"],
    *,
    components: int = 64,
    images: int = 150,
    pixels: int = 1000,
    seed: int = 0,
) -> float:
    """Return the Bhattacharyya coefficient between pixel classes, at most 0 (higher is better).

    Of at most 150 images, 1,000 pixels each, as many of each class present as there are; 64 principal
    components; diagonal covariance. Pandy et al., arXiv 2111.12780, section on segmentation.

    Args:
        features: A map for each image.
        masks: Class of each position of the map.
        components: Number of principal components that are kept.
        images: Largest number of images, of which the first are taken.
        pixels: Number of pixels drawn from each image.
        seed: Seed of the draw.

    Raises:
        UserError: The masks do not fit the maps, or hold one class alone.
    """
    rows, labels = _balanced_pixels(features, masks, images=images, pixels=pixels, seed=seed)
    found = FeatureStatistics.of(rows, labels)
    return gbc(found.projected(components), found.labels)


def _balanced_pixels(
    features: Num[Any, "n h w d"], masks: Int[Any, "n h w"], *, images: int, pixels: int, seed: int
) -> tuple[Float[np.ndarray, "m d"], Int[np.ndarray, " m"]]:
    """Return pixels of each image, drawn so that its classes have equal shares as far as they reach."""
    maps, classes = maps_with_masks(features, masks)
    rows, labels = [], []
    for number in range(min(images, len(maps))):
        rng = np.random.default_rng([seed, number])
        flat, names = maps[number].reshape(-1, maps.shape[-1]), classes[number].ravel()
        present = np.unique(names)
        for name in present:
            where = np.flatnonzero(names == name)
            chosen = rng.permutation(where)[: max(1, pixels // len(present))]
            rows.append(flat[chosen])
            labels.append(names[chosen])
    return np.concatenate(rows).astype(np.float64), np.concatenate(labels)
