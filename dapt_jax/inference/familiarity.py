"""Distance of an image's features from those of the training images.

Features are modelled by probabilistic principal components (Tipping and Bishop, 1999): a Gaussian with the
leading directions of the covariance and one variance for all others, so that the Mahalanobis distance needs a
few rows instead of a covariance matrix. The threshold is a quantile of distances of images that the model had
not seen (cross-validation by patient); distances are stated as multiples of it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

DIRECTIONS = 32
"""Largest number of principal directions."""

QUANTILE = 0.99
"""Share of held-out training images whose distance is below the threshold."""

MOST_ROWS = 4096
"""Images that the model is fitted to; of more, an evenly spaced part."""


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureModel:
    """A Gaussian over features.

    Attributes:
        mean: Mean, [d].
        scale: Deviation of each feature, [d], by which it is divided.
        directions: Principal directions of the scaled features, [k, d].
        variances: Variance along each direction, and at the end that along all others, [k + 1].
        threshold: Distance beyond which an image is unlike the training images; 0 where unknown.
    """

    mean: np.ndarray
    scale: np.ndarray
    directions: np.ndarray
    variances: np.ndarray
    threshold: float = 0.0

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return {name: getattr(self, name) for name in ("mean", "scale", "directions", "variances")}

    def distance(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Return Mahalanobis distances, as multiples of the threshold where there is one."""
        x = ((features - self.mean) / self.scale).astype(np.float32)
        along = x @ self.directions.T
        rest = np.maximum((x**2).sum(1) - (along**2).sum(1), 0)
        squared = (along**2 / self.variances[:-1]).sum(1) + rest / self.variances[-1]
        found: np.ndarray = np.sqrt(squared / x.shape[1]) / (self.threshold or 1.0)
        return found


def fit(features: Float[np.ndarray, "n d"], folds: Sequence[np.ndarray]) -> FeatureModel:
    """Return the model of all images, with the threshold from models that leave out one fold at a time.

    Args:
        features: Features of the training images.
        folds: Rows that each fold holds out; with fewer than two of them there is no threshold.
    """
    kept = np.unique(np.linspace(0, len(features) - 1, min(len(features), MOST_ROWS)).astype(int))
    distances = []
    for rows in folds:
        held = np.intersect1d(rows, kept)
        others = np.setdiff1d(kept, held)
        if len(held) and len(others) > 1:
            distances.append(_fit(features[others]).distance(features[held]))
    threshold = float(np.quantile(np.concatenate(distances), QUANTILE)) if distances else 0.0
    return dataclasses.replace(_fit(features[kept]), threshold=threshold)


def _fit(features: np.ndarray) -> FeatureModel:
    mean, deviation = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    # A feature that hardly varies may not outvote all others as soon as it does.
    varying = deviation[deviation > 0]
    scale = np.maximum(deviation, 0.1 * np.median(varying) if len(varying) else 1.0)
    x = ((features - mean) / scale).astype(np.float32)
    number = max(0, min(DIRECTIONS, len(x) // 3, x.shape[1] // 2))
    directions, variances = _leading(x, number)
    rest = (float((x.astype(np.float64) ** 2).sum()) / len(x) - variances.sum()) / max(x.shape[1] - number, 1)
    return FeatureModel(
        mean.astype(np.float32),
        scale.astype(np.float32),
        directions,
        np.maximum(np.append(variances, rest), 1e-6).astype(np.float32),
    )


def _leading(x: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return leading eigenvectors [k, d] and eigenvalues [k] of the covariance, by subspace iteration."""
    if not number:
        return np.zeros((0, x.shape[1]), np.float32), np.zeros(0)
    basis = np.random.default_rng(0).standard_normal((x.shape[1], number), np.float32)
    for _ in range(4):
        basis, _ = np.linalg.qr(x.T @ (x @ basis))
    projected = x @ basis
    values, turn = np.linalg.eigh((projected.T @ projected / len(x)).astype(np.float64))
    return np.ascontiguousarray((basis @ turn).T, np.float32), np.maximum(values, 0)
