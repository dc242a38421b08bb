"""A mixture of Gaussians with full covariances, fast where components have fewer images than dimensions.

That is the rule for NLEEP: five components a class, hundreds of principal components. A component's
covariance is then of low rank but for a floor on its diagonal, and what costs d^2 a row costs its few images
times d (Woodbury's identity). The result is that of scikit-learn's `GaussianMixture` with the same start, to
rounding.
"""

import dataclasses
import math

import numpy as np
import scipy
from jaxtyping import Float

FLOOR = 1e-6
"""Added to the diagonal of every covariance, as scikit-learn does."""
NEGLIGIBLE = 1e-14
"""Responsibilities below this move nothing that float64 could show."""
AT_ONCE = 25
"""Components whose densities are taken together."""


@dataclasses.dataclass(frozen=True)
class _Component:
    """A Gaussian in a form with fast density evaluation.

    Attributes:
        weight: Weight in the mixture.
        mean: [d].
        factor: Z [m, d]: the inverse covariance is (I - Z'Z) / FLOOR where `is_low_rank`, else Z'Z.
        is_low_rank: Whether `factor` is the low-rank form.
        log_det: Log determinant of the covariance.
    """

    weight: float
    mean: Float[np.ndarray, " d"]
    factor: Float[np.ndarray, "m d"]
    is_low_rank: bool
    log_det: float

    @classmethod
    def of(cls, x: Float[np.ndarray, "n d"], responsibility: Float[np.ndarray, " n"]) -> "_Component":
        """Return the maximum-likelihood Gaussian of rows by their responsibilities."""
        total = responsibility.sum() + 10 * np.finfo(float).eps
        counting = np.flatnonzero(responsibility > NEGLIGIBLE)
        if not len(counting):
            # K-means leaves a component without rows where rows are copies of one another.
            counting = np.atleast_1d(responsibility.argmax())
        mean = responsibility[counting] @ x[counting] / total
        spread = np.sqrt(responsibility[counting] / total)[:, None] * (x[counting] - mean)
        dimensions = x.shape[1]
        if len(counting) < dimensions:
            inner = scipy.linalg.cholesky(spread @ spread.T + FLOOR * np.eye(len(counting)), lower=True)
            log_det = 2 * np.log(np.diag(inner)).sum() + (dimensions - len(counting)) * math.log(FLOOR)
            factor = scipy.linalg.solve_triangular(inner, spread, lower=True)
            return cls(total / len(x), mean, factor, True, float(log_det))
        inner = scipy.linalg.cholesky(spread.T @ spread + FLOOR * np.eye(dimensions), lower=True)
        factor = scipy.linalg.solve_triangular(inner, np.eye(dimensions), lower=True)
        return cls(total / len(x), mean, factor, False, float(2 * np.log(np.diag(inner)).sum()))


def _log_joint(x: Float[np.ndarray, "n d"], mixture: list[_Component]) -> Float[np.ndarray, "n k"]:
    """Return the log of weight times density of each row under each component."""
    squares = np.einsum("nd,nd->n", x, x)
    joint = np.empty((len(x), len(mixture)))
    for first in range(0, len(mixture), AT_ONCE):
        part = mixture[first : first + AT_ONCE]
        # One product for many components: their factors are thin.
        factors = np.concatenate([each.factor for each in part])
        offsets = np.concatenate([each.factor @ each.mean for each in part])
        starts = np.cumsum([0, *(len(each.factor) for each in part[:-1])])
        projected = np.add.reduceat((x @ factors.T - offsets) ** 2, starts, axis=1)
        for place, each in enumerate(part):
            distance = projected[:, place]
            if each.is_low_rank:
                centred = squares - 2 * (x @ each.mean) + each.mean @ each.mean
                distance = (centred - distance) / FLOOR
            constant = math.log(each.weight) - 0.5 * (x.shape[1] * math.log(2 * math.pi) + each.log_det)
            joint[:, first + place] = constant - 0.5 * distance
    return joint


def responsibilities(
    x: Float[np.ndarray, "n d"], components: int, seed: int = 0, most: int = 100, tolerance: float = 1e-3
) -> Float[np.ndarray, "n k"]:
    """Fit a mixture by expectation and maximisation, from k-means, and return the component of each row.

    Args:
        x: Rows, float64.
        components: Number of Gaussians.
        seed: Seed of k-means.
        most: Largest number of iterations.
        tolerance: Change of the mean log-likelihood below which the fit ends.

    Returns:
        Probability of each component given the row.
    """
    from sklearn.cluster import KMeans  # a second to import, which settings do not need

    start = KMeans(components, n_init=1, random_state=seed).fit(x).labels_
    current = np.eye(components)[start]
    before = -math.inf
    for _ in range(most + 1):
        mixture = [_Component.of(x, column) for column in current.T]
        total = sum(each.weight for each in mixture)
        joint = _log_joint(x, mixture) - math.log(total)
        likelihood = scipy.special.logsumexp(joint, 1)
        current = np.exp(joint - likelihood[:, None])
        now = float(likelihood.mean())
        if abs(now - before) < tolerance:
            # The fit ends with the parameters of one more maximisation.
            mixture = [_Component.of(x, column) for column in current.T]
            return scipy.special.softmax(_log_joint(x, mixture), 1)
        before = now
    return current
