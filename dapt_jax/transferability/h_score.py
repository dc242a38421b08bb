"""H-score: how much of the labels the features explain, with and without a shrunk covariance."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Num

from dapt_jax.transferability.inputs import FeatureStatistics, in_double
from dapt_jax.transferability.registry import score


@score("h_score", needs="labels", higher_is_better=True, title="H-score")
def h_score(
    features: Num[Any, "n d"], labels: Int[Any, " n"], *, statistics: FeatureStatistics | None = None
) -> float:
    """Return the trace of pinv(cov F) cov(E[F|y]), 0 to classes - 1 (higher is better).

    Both covariances are divided by n; directions without variance count for nothing. Bao et al., "An
    Information-Theoretic Approach to Transferability in Task Transfer Learning", ICIP 2019.

    Args:
        features: Features of n images.
        labels: Class numbers.
        statistics: Statistics of the same features and labels, where they have been computed.

    Raises:
        UserError: The features cannot be scored (see `FeatureStatistics.of`).
    """
    found = statistics or FeatureStatistics.of(features, labels)
    if not found.spread:
        return 0.0
    values, vectors = found.spectrum
    real = values > values[-1] * len(values) * np.finfo(float).eps
    along = (found.class_means @ vectors[:, real]) ** 2 / values[real]
    return float(found.counts @ along.sum(1))


@score("regularised_h_score", needs="labels", higher_is_better=True, title="regularised H-score")
@in_double
def regularised_h_score(
    features: Num[Any, "n d"], labels: Int[Any, " n"], *, statistics: FeatureStatistics | None = None
) -> float:
    """Return the H-score with a shrunk covariance (higher is better).

    tr(inv(S_a) (1 - a) cov(E[F|y])), S_a = (1 - a) S + a tr(S)/d I.

    a is Ledoit and Wolf's. Ibrahim et al., "Newer is not always better", arXiv 2110.06893.

    Args:
        features: Features of n images.
        labels: Class numbers.
        statistics: Statistics of the same features and labels, where they have been computed.

    Raises:
        UserError: The features cannot be scored (see `FeatureStatistics.of`).
    """
    found = statistics or FeatureStatistics.of(features, labels)
    if not found.spread:
        return 0.0
    rows, size = found.features.shape
    covariance = found.scatter / rows
    level = np.trace(covariance) / size
    squares = np.sum(covariance**2)
    noise = (np.sum(np.sum(found.centred**2, 1) ** 2) / rows - squares) / rows
    a = float(np.clip(noise / (squares - size * level**2), 0.0, 1.0)) if squares > size * level**2 else 0.0
    shrunk = (1 - a) * covariance + a * level * np.eye(size)
    if not a:
        return h_score(features, labels, statistics=found)
    solved = np.asarray(_solve(shrunk, found.class_means.T))
    return float((1 - a) * np.sum(found.counts * np.sum(found.class_means.T * solved, 0)) / rows)


@jax.jit
def _solve(matrix: Float[Array, "d d"], right: Float[Array, "d c"]) -> Float[Array, "d c"]:
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), right)
