"""Contrastive robustness to small changes of colour, and the views that it compares.

Two views of each image that differ a little in brightness, contrast, saturation and hue should lie closer
together than views of different images. "Enhancing pretraining efficiency for medical image segmentation via
transferability metrics", arXiv 2410.18677.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from dapt_jax.data.colour import grey, saturate, turn_hue
from dapt_jax.errors import UserError, nearest
from dapt_jax.transferability.inputs import in_double
from dapt_jax.transferability.registry import score

ALL = 0
"""Number of negatives that stands for every other image."""


def _cosine(a: Float[Array, "*n d"], b: Float[Array, "*n d"]) -> Float[Array, "*n"]:
    lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return 1 - jnp.sum(a * b, -1) / lengths


def _l2(a: Float[Array, "*n d"], b: Float[Array, "*n d"]) -> Float[Array, "*n"]:
    return jnp.mean((a - b) ** 2, -1)


def _inverse_pearson(a: Float[Array, "*n d"], b: Float[Array, "*n d"]) -> Float[Array, "*n"]:
    return _cosine(a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True))


DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "cosine": _cosine,
    "l2": _l2,
    "inverse_pearson": _inverse_pearson,
}
"""1 - cosine, mean squared difference, 1 - Pearson correlation; each over the last axis."""


@dataclasses.dataclass(frozen=True)
class Jitter:
    """Largest relative changes of brightness, contrast and saturation, and largest turn of the hue (of 1)."""

    brightness: float = 0.1
    contrast: float = 0.05
    saturation: float = 0.1
    hue: float = 0.05


@functools.partial(jax.jit, static_argnames=("limits", "reference_compatible"))
def jitter(
    images: Num[Array, "n h w 3"],
    seed: ArrayLike,
    view: ArrayLike,
    index: Int[Array, " n"],
    *,
    limits: Jitter = Jitter(),
    reference_compatible: bool = False,
) -> Float[Array, "n h w 3"]:
    """Return one view of each image: the four changes in a random order, drawn from (seed, view, row).

    Args:
        images: Images, RGB, values 0 to 255.
        seed: Seed of the study, an integer.
        view: Number of the view.
        index: Row of each image in its data set.
        limits: Largest changes.
        reference_compatible: Whether to make one draw for the whole batch instead of one per image, and
            intensities cut off at 1 whatever their range, as the reference does: images have to come with
            values 0 to 1, and what lies above saturates.
    """
    key = jax.random.fold_in(jax.random.key(seed), view)
    peak = 1.0 if reference_compatible else 255.0
    scaled = jnp.asarray(images, jnp.float32) / peak
    one = functools.partial(_jitter_one, limits=limits)
    if reference_compatible:
        return jax.vmap(one, in_axes=(0, None))(scaled, key)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.asarray(index))
    return jax.vmap(one)(scaled, keys) * peak


def _jitter_one(image: Float[Array, "h w 3"], key: PRNGKeyArray, limits: Jitter) -> Float[Array, "h w 3"]:
    """Change an image with values 0 to 1, after torchvision's definition of the four changes."""
    for_order, for_amount = jax.random.split(key)
    drawn = jax.random.uniform(for_amount, (4,), minval=-1.0, maxval=1.0)
    amounts = drawn * jnp.array([limits.brightness, limits.contrast, limits.saturation, limits.hue])

    def blend(
        x: Float[Array, "h w 3"],
        other: Array | float,
        amount: Float[Array, ""],
    ) -> Float[Array, "h w 3"]:
        return jnp.clip(other + (1 + amount) * (x - other), 0, 1)

    changes = (
        lambda x: blend(x, 0.0, amounts[0]),
        lambda x: blend(x, grey(x).mean(), amounts[1]),
        lambda x: saturate(x, 1 + amounts[2]),
        lambda x: turn_hue(x, amounts[3]),
    )
    for number in jax.random.permutation(for_order, 4):
        image = jax.lax.switch(number, changes, image)
    return image


def pool(features: Float[Any, "n *rest"], *, reference_compatible: bool = False) -> Float[Any, "n d"]:
    """Return the spatial mean of maps [n, h, w, d] or tokens [n, l, d]; [n, d] stays unchanged.

    Args:
        features: Features of n images.
        reference_compatible: Whether tokens are averaged over their channels instead, which leaves one number
            per place.
    """
    if features.ndim == 3:
        return features.mean(2 if reference_compatible else 1)
    return features.mean((1, 2)) if features.ndim == 4 else features


@score("robustness", needs="views", higher_is_better=False, title="contrastive robustness")
@in_double
def robustness(
    views: Num[Any, "v n *rest"],
    *,
    distance: str = "cosine",
    margin: float = 0.5,
    negatives: int = 1,
    pooled: bool = True,
    reference_compatible: bool = False,
) -> float:
    """Return the contrastive robustness, a loss: 0 or more, lower is more robust.

    The mean over images and negatives of max(0, d(a_i, b_i) - d(a_i, b_j) + margin), a and b the features of
    two views; with more views, also over all pairs of them. The negatives of image i are i + 1, i + 2, ...
    around the data set, so no image is its own. With a margin of .5 the hinge is nearly always active, and
    the score is E[d+] - E[d-] + margin.

    Args:
        views: Features of v views of n images: pooled [v, n, d], tokens [v, n, l, d] or maps [v, n, h, w, d].
        distance: Distance between features: `cosine`, `l2` or `inverse_pearson`.
        margin: Margin of the hinge.
        negatives: Number of negatives per image: 1 as in the paper, up to n - 1; 0 (`ALL`) for every other
            image.
        pooled: Whether to take the mean over space first; otherwise maps and tokens are compared place by
            place.
        reference_compatible: Whether the one negative of image i is image (n + 1 - i) mod n, as in the
            authors' code, which for odd n makes image (n + 1) / 2 its own; tokens are then pooled over
            channels.

    Returns:
        The score; NaN where a cosine or a correlation is undefined (a feature vector without length or
        variance).

    Raises:
        UserError: An unknown distance, features that are not finite, fewer than two views, or more negatives
            than images.
    """
    losses = image_losses(
        views,
        (margin,),
        distance=distance,
        negatives=negatives,
        pooled=pooled,
        reference_compatible=reference_compatible,
    )
    return float(losses.mean())


@in_double
def image_losses(
    views: Num[Any, "v n *rest"],
    margins: Sequence[float],
    *,
    distance: str,
    negatives: int,
    pooled: bool,
    reference_compatible: bool,
) -> Float[np.ndarray, "margins n"]:
    """Return the loss of each image at each margin; the score is the mean over the images.

    Margins share the distances, which are summed over the negatives as they are computed: memory grows with
    the number of images, not with that of pairs.

    Args:
        views: See `robustness`.
        margins: Margins of the hinge.
        distance: See `robustness`.
        negatives: See `robustness`.
        pooled: See `robustness`.
        reference_compatible: See `robustness`.

    Raises:
        UserError: See `robustness`.
    """
    if distance not in DISTANCES:
        raise UserError(f"unknown distance {distance!r}; {nearest(distance, DISTANCES)}")
    values = np.asarray(views, np.float64)
    if values.ndim < 3 or len(values) < 2:
        raise UserError(f"views have shape {values.shape}; expected two views or more of images' features")
    images = values.shape[1]
    if reference_compatible and negatives != 1:
        raise UserError(f"{negatives} negatives asked of the reference's score, which has one; expected 1")
    if not 0 <= negatives < images:
        expected = f"1 to {images - 1}, or 0 for all" if images > 1 else "two images or more"
        raise UserError(f"{negatives} negatives asked of {images} images; expected {expected}")
    bad = ~np.isfinite(values.swapaxes(0, 1).reshape(images, -1)).all(1)
    if bad.any():
        raise UserError(f"features of image {int(np.flatnonzero(bad)[0])} are not finite; expected numbers")
    if pooled:
        values = np.stack([pool(view, reference_compatible=reference_compatible) for view in values])
    flat = values.reshape(len(values), images, -1)
    first, offsets = np.arange(images), np.arange(1, (negatives or images - 1) + 1)
    if reference_compatible:
        first, offsets = images + 1 - first, np.zeros(1, int)
    limits = np.asarray(margins, np.float64)
    pairs = list(itertools.combinations(range(len(flat)), 2))
    total = sum(np.asarray(_hinges(flat[a], flat[b], first, offsets, limits, distance)) for a, b in pairs)
    return np.asarray(total / (len(pairs) * len(offsets)))


@functools.partial(jax.jit, static_argnames="distance")
def _hinges(
    a: Float[Array, "n d"],
    b: Float[Array, "n d"],
    first: Int[Array, " n"],
    offsets: Int[Array, " negatives"],
    margins: Float[Array, " margins"],
    distance: str,
) -> Float[Array, "margins n"]:
    """Sum the hinge of each image over its negatives, the images `first + offset` modulo n."""
    measure = DISTANCES[distance]
    near = measure(a, b)

    def add(total: Array, offset: Array) -> tuple[Array, None]:
        far = measure(a, b[(first + offset) % len(b)])
        return total + jnp.maximum(0.0, near - far + margins[:, None]), None

    return jax.lax.scan(add, jnp.zeros((len(margins), len(a))), offsets)[0]
