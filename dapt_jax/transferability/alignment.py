"""Alignment: distance between views of an image."""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Float, Num

from dapt_jax.errors import UserError
from dapt_jax.transferability.inputs import finite, in_double
from dapt_jax.transferability.registry import score
from dapt_jax.transferability.robustness import pool


@score("alignment", needs="views", higher_is_better=False, title="alignment")
@in_double
def alignment(views: Num[Any, "v n *rest"]) -> float:
    """Return the mean squared distance between two views, on unit features: 0 to 4, lower is better.

    With more views, the mean over all pairs of them. Wang and Isola, arXiv 2005.10242.

    Args:
        views: Features of v views of n images: pooled, tokens or maps, of which the mean over space is taken.

    Raises:
        UserError: Fewer than two views, or a feature vector without length.
    """
    found = [unit_vectors(pool(view)) for view in np.asarray(views)]
    if len(found) < 2:
        raise UserError(f"{len(found)} views; expected two or more")
    pairs = itertools.combinations(found, 2)
    return float(np.mean([np.mean(np.sum((a - b) ** 2, 1)) for a, b in pairs]))


def unit_vectors(features: Num[Any, "n d"]) -> Float[np.ndarray, "n d"]:
    """Return rows scaled to length 1, float64.

    Raises:
        UserError: A row has no length (names the first), or what `finite` refuses.
    """
    rows = finite(features, 2)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    bad = ~(np.isfinite(lengths) & (lengths > 0)).ravel()
    if bad.any():
        raise UserError(
            f"features of image {int(np.flatnonzero(bad)[0])} have no direction; expected finite, not all 0"
        )
    return rows / lengths
