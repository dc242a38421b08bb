"""RankMe: effective rank of features."""

from typing import Any

import numpy as np
from jaxtyping import Num

from dapt_jax.transferability.inputs import finite
from dapt_jax.transferability.registry import score

EPSILON = 1e-7


@score("rankme", needs="nothing", higher_is_better=True, title="RankMe")
def rankme(features: Num[Any, "n d"]) -> float:
    """Return the exponential of the entropy of the normalised singular values: 1 to min(n, d).

    Garrido et al., arXiv 2210.02885, equation 1. Compare only runs of one method on the same images.

    Args:
        features: Features of n images.

    >>> rankme(np.eye(4))
    4.0
    """
    singular = np.linalg.svd(finite(features, 2), compute_uv=False)
    share = singular / max(singular.sum(), np.finfo(float).tiny) + EPSILON
    return round(float(np.exp(-(share * np.log(share)).sum())), 5)
