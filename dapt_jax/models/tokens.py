"""Random subsets of a transformer's patch tokens: masked autoencoding and PatchDropout see the visible ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def visible_count(patches: int, share: float) -> int:
    """Return the number of patches that stay when a share of them is masked, rounded down.

    >>> visible_count(196, 0.75), visible_count(10, 0.9), visible_count(4, 0.9)
    (49, 1, 0)
    """
    return int(patches * (1 - share) + 1e-9)


def mask_of(draws: Float[Array, "b n"], visible: int) -> Float[Array, "b n"]:
    """Return a mask of the patches of each image, 1 where masked: those with the largest draws.

    Args:
        draws: Independent uniform draws.
        visible: Patches of each image that are not masked.
    """
    rank = jnp.argsort(jnp.argsort(draws, axis=1), axis=1)
    return (rank >= visible).astype(jnp.float32)


def visible_first(x: Float[Array, "b n c"], mask: Float[Array, "b n"]) -> Float[Array, "b n c"]:
    """Return the patches of each image in the order visible, masked; each part in the order of the grid."""
    return jnp.take_along_axis(x, jnp.argsort(mask, axis=1)[..., None], 1)


def without_masked(
    tokens: Float[Array, "b m c"], mask: Float[Array, "b n"], visible: int
) -> Float[Array, "b k c"]:
    """Return tokens without those of masked patches; the first m - n tokens are no patches, and stay.

    Args:
        tokens: Tokens, those of the n patches last.
        mask: Mask of the patches, 1 where masked.
        visible: Patches of each image that are not masked.
    """
    extra, patches = jnp.split(tokens, [tokens.shape[1] - mask.shape[1]], 1)
    return jnp.concatenate([extra, visible_first(patches, mask)[:, :visible]], 1)


def dropped(
    tokens: Float[Array, "b m c"], patches: int, share: float, key: jax.Array
) -> Float[Array, "b k c"]:
    """Return tokens without a random share of each image's patches (PatchDropout, arXiv 2208.07220).

    Args:
        tokens: Tokens, those of the patches last.
        patches: Number of patches.
        share: Share of the patches that are left out; the rest is rounded down.
        key: PRNG key.
    """
    visible = visible_count(patches, share)
    mask = mask_of(jax.random.uniform(key, (tokens.shape[0], patches)), visible)
    return without_masked(tokens, mask, visible)
