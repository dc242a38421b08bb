"""LiDAR: effective rank of what tells images apart, relative to what tells their views apart."""

from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Num

from dapt_jax.errors import UserError
from dapt_jax.transferability.inputs import finite
from dapt_jax.transferability.registry import score
from dapt_jax.transferability.robustness import pool

RIDGE = 1e-4
"""Variance that is added to that within images in every direction; more where rounding alone is more."""

EPSILON = 1e-7


@score("lidar", needs="views", higher_is_better=True, title="LiDAR")
def lidar(views: Num[Any, "v n *rest"]) -> float:
    """Return the exponential of the entropy of the eigenvalues of linear discriminant analysis by image.

    Thilak et al., arXiv 2312.04000: the classes are the images, their members the views, and the matrix is
    W^-1/2 B W^-1/2 with the covariance B of the images' means and W that within images, plus a ridge. Unlike
    RankMe it does not count directions that only augmentation fills. 1 to min(n - 1, d).

    Args:
        views: Features of v views of n images: pooled, tokens or maps, of which the mean over space is taken.

    Raises:
        UserError: Fewer than two views or images, or a feature that is not finite.

    >>> images, noise = np.repeat(np.eye(5)[:, :3], 2, 0).reshape(5, 2, 3), np.array([1e-3, -1e-3])
    >>> 1 < lidar((images + noise[:, None]).swapaxes(0, 1)) <= 3
    True
    """
    found = np.stack([finite(pool(view), 2) for view in np.asarray(views, np.float64)])
    if min(found.shape[:2]) < 2:
        raise UserError(f"{found.shape[0]} views of {found.shape[1]} images; expected two or more of each")
    means = found.mean(0)
    inside = (found - means).reshape(-1, found.shape[2])
    within = inside.T @ inside / len(inside)
    rounding = np.finfo(float).eps * len(within) * float(np.trace(within))
    within += max(RIDGE, rounding) * np.eye(len(within))
    between = (means - means.mean(0)) / np.sqrt(len(means))
    # Eigenvalues of W^-1/2 B W^-1/2 are those of L^-1 B L^-T, where W = L L^T, of which B has the square root.
    whitened = scipy.linalg.solve_triangular(np.linalg.cholesky(within), between.T, lower=True)
    eigenvalues = np.linalg.svd(whitened, compute_uv=False) ** 2
    share = eigenvalues / max(eigenvalues.sum(), np.finfo(float).tiny) + EPSILON
    return float(np.exp(-(share * np.log(share)).sum()))
