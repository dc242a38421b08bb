"""Uniformity: how evenly features are spread over the sphere."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from dapt_jax.errors import UserError
from dapt_jax.transferability.alignment import unit_vectors
from dapt_jax.transferability.inputs import in_double
from dapt_jax.transferability.registry import score


@score("uniformity", needs="nothing", higher_is_better=False, title="uniformity")
@in_double
def uniformity(features: Num[Any, "n d"]) -> float:
    """Return the log mean of exp(-2 |x_i - x_j|^2) over pairs, on unit features: -8 to 0, lower is better.

    Wang and Isola, arXiv 2005.10242.

    Args:
        features: Features of n images.

    Raises:
        UserError: Fewer than two images, or a feature vector without length.
    """
    rows = unit_vectors(features)
    if len(rows) < 2:
        raise UserError(f"{len(rows)} image; expected two or more")
    return float(_uniformity(rows))


@jax.jit
def _uniformity(rows: Float[Array, "n d"]) -> Float[Array, ""]:
    kernel = jnp.exp(-2 * jnp.maximum(2 - 2 * rows @ rows.T, 0.0))
    pairs = len(rows) * (len(rows) - 1)
    return jnp.log((kernel.sum() - jnp.trace(kernel)) / pairs)
