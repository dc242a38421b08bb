"""CC-FV: class consistency with feature variety, for segmentation."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from dapt_jax.errors import UserError
from dapt_jax.transferability.inputs import in_double, maps_with_masks
from dapt_jax.transferability.registry import score


@score("ccfv", needs="masks", higher_is_better=True, title="CC-FV")
@in_double
def ccfv(
    levels: Sequence[Num[Any, "n h w d"]],
    masks: Sequence[Int[Any, "n h w"]],
    *,
    samples: Sequence[int] = (100, 200, 400),
    seed: int = 0,
) -> float:
    """Return the class consistency with feature variety, for segmentation (higher is better).

    Sum over decoder levels of ln(V / W). W, class consistency: the mean over foreground classes and pairs of
    images of the 2-Wasserstein distance between Gaussians fitted to a class's features in either image,
    sqrt(|dmu|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))). V, feature variety: the mean over pairs of images of 1 /
    sqrt(|v_i - v_j|^2 + 1e-3), v_i the mean over classes of an image's sampled features (a hyperspherical
    energy). Yang et al., "Pick the Best Pre-trained Model: Towards Transferability Estimation for Medical
    Image Segmentation", MICCAI 2023. The authors' code adds each class's running total to itself; here W is
    the mean.

    Args:
        levels: Feature maps of the decoder, coarse to fine.
        masks: Class of each position at each level, 0 for background.
        samples: Number of positions drawn of each class, by level; the last number stands for the levels
            beyond.
        seed: Seed of the draw.

    Raises:
        UserError: Masks that do not fit, or no class that two images share.
    """
    total = 0.0
    for number, (features, classes) in enumerate(zip(levels, masks, strict=True)):
        maps, names = maps_with_masks(features, classes)
        most = samples[min(number, len(samples) - 1)]
        drawn = [
            _drawn(maps[image], names[image], most, np.random.default_rng([seed, image]))
            for image in range(len(maps))
        ]
        by_class = [
            _consistency([by[name] for by in drawn if name in by]) for name in np.unique(names) if name
        ]
        defined = [value for value in by_class if value is not None]
        if not defined:
            raise UserError(
                "no foreground class is in two images with two positions or more; expected masks that share "
                "one"
            )
        means = np.stack([np.mean(np.concatenate(list(by.values())), 0) for by in drawn])
        if not np.mean(defined):
            raise UserError("features of a class are the same in every image; expected some variance")
        total += float(np.log(_energy(means) / np.mean(defined)))
    return total


def _drawn(
    features: Float[np.ndarray, "h w d"], names: Int[np.ndarray, "h w"], most: int, rng: np.random.Generator
) -> dict[int, Float[np.ndarray, "m d"]]:
    """Return sampled features of an image by class."""
    flat, labels = features.reshape(-1, features.shape[-1]), names.ravel()
    return {
        int(name): flat[rng.permutation(np.flatnonzero(labels == name))[:most]]
        for name in np.unique(labels).tolist()
    }


def _consistency(of_images: list[Float[np.ndarray, "m d"]]) -> float | None:
    """Return the mean distance of a class's Gaussians over images with two or more positions of it."""
    kept = [rows for rows in of_images if len(rows) > 1]
    if len(kept) < 2:
        return None
    means = np.stack([rows.mean(0) for rows in kept])
    covariances = np.stack([np.atleast_2d(np.cov(rows.T)) for rows in kept])
    first, second = np.asarray(list(itertools.combinations(range(len(kept)), 2))).T
    return float(jnp.mean(_wasserstein(means, covariances, first, second)))


@jax.jit
def _wasserstein(
    means: Float[Array, "c d"],
    covariances: Float[Array, "c d d"],
    first: Int[Array, " pairs"],
    second: Int[Array, " pairs"],
) -> Float[Array, " pairs"]:
    values, vectors = jnp.linalg.eigh(covariances)
    roots = (vectors * jnp.sqrt(jnp.maximum(values, 0.0))[:, None]) @ vectors.mT

    def pair(indices: tuple[Array, Array]) -> Float[Array, ""]:
        a, b = indices
        # The eigenvalues of S1 S2 are those of the symmetric R1 S2 R1, which has a square root without
        # complex numbers.
        inner = jnp.linalg.eigvalsh(roots[a] @ covariances[b] @ roots[a])
        traces = jnp.trace(covariances[a]) + jnp.trace(covariances[b])
        squared = (
            jnp.sum((means[a] - means[b]) ** 2) + traces - 2 * jnp.sum(jnp.sqrt(jnp.maximum(inner, 0.0)))
        )
        return jnp.sqrt(jnp.maximum(squared, 0.0))

    return jax.lax.map(pair, (first, second))


def _energy(vectors: Float[np.ndarray, "n d"]) -> float:
    """Return the mean over pairs of 1 / sqrt(squared distance + 1e-3)."""
    first, second = np.triu_indices(len(vectors), 1)
    return float(np.mean(1 / np.sqrt(np.sum((vectors[first] - vectors[second]) ** 2, 1) + 1e-3)))
