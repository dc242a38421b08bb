"""Alpha-ReQ: decay of the eigenvalue spectrum of features."""

from typing import Any

import numpy as np
from jaxtyping import Num

from dapt_jax.errors import UserError
from dapt_jax.transferability.inputs import finite
from dapt_jax.transferability.registry import score


@score("alpha_req", needs="nothing", higher_is_better=False, title="alpha-ReQ")
def alpha_req(features: Num[Any, "n d"]) -> float:
    """Return the exponent a of the power law k^-a that the eigenvalues of the covariance follow.

    The slope of a least-squares line through the logarithms of eigenvalue and index (Agrawal et al., arXiv
    2202.05808). Near 1 is best; a collapsed network has a steep spectrum, so lower is taken for better.

    Args:
        features: Features of n images.

    Raises:
        UserError: Fewer than three eigenvalues are above rounding: constant features, or too few images.
    """
    values = finite(features, 2)
    singular = np.linalg.svd(values - values.mean(0), compute_uv=False)
    eigenvalues = singular**2
    eigenvalues = eigenvalues[eigenvalues > 1e-12 * max(float((values**2).sum()), np.finfo(float).tiny)]
    if len(eigenvalues) < 3:
        raise UserError(f"{len(eigenvalues)} eigenvalues above rounding; expected three or more")
    index = np.log(np.arange(1, len(eigenvalues) + 1))
    return float(-np.polyfit(index, np.log(eigenvalues), 1)[0])
