"""ROC and precision-recall curves at fixed abscissae, for all draws of a bootstrap at once."""

import numpy as np
from jaxtyping import Bool, Float, Shaped

FALSE_POSITIVE_RATES = np.linspace(0, 1, 101)
"""Where ROC curves are evaluated."""

RECALLS = np.linspace(0.01, 1, 100)
"""Where precision-recall curves are evaluated; precision at a recall of 0 is undefined."""


def roc_curves(
    positive: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"], weights: Shaped[np.ndarray, "draws n"]
) -> Float[np.ndarray, "draws 101"]:
    """Return the true positive rate at `FALSE_POSITIVE_RATES`, linear between thresholds.

    scikit-learn has one curve a call, which is too slow for hundreds of draws; with weights of 1 this is
    `sklearn.metrics.roc_curve`.

    >>> roc_curves(np.array([True, False]), np.array([0.9, 0.1]), np.ones((1, 2)))[0, [0, 100]]
    array([1., 1.])

    Args:
        positive: Whether an image is positive.
        scores: Scores of the images.
        weights: How often each image counts in each draw.

    Returns:
        One curve a draw; NaN where a draw lacks positives or negatives.
    """
    true, false = _counts(positive, scores, weights)
    curves = np.full((len(weights), len(FALSE_POSITIVE_RATES)), np.nan)
    for row, (hits, alarms) in enumerate(zip(true, false, strict=True)):
        if hits[-1] and alarms[-1]:
            rates = np.append(0, alarms / alarms[-1]), np.append(0, hits / hits[-1])
            curves[row] = np.interp(FALSE_POSITIVE_RATES, *rates)
    return curves


def precision_curves(
    positive: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"], weights: Shaped[np.ndarray, "draws n"]
) -> Float[np.ndarray, "draws 100"]:
    """Return the precision at the highest threshold that reaches each of `RECALLS`.

    Precision is not interpolated between thresholds, which would be too favourable (Davis and Goadrich,
    2006); the points are those of `sklearn.metrics.precision_recall_curve`.

    Args:
        positive: Whether an image is positive.
        scores: Scores of the images.
        weights: How often each image counts in each draw.

    Returns:
        One curve a draw; NaN where a draw lacks positives.
    """
    true, false = _counts(positive, scores, weights)
    curves = np.full((len(weights), len(RECALLS)), np.nan)
    for row, (hits, alarms) in enumerate(zip(true, false, strict=True)):
        if hits[-1]:
            at = np.searchsorted(hits, RECALLS * hits[-1] - 1e-9)
            curves[row] = hits[at] / (hits[at] + alarms[at])
    return curves


def weighted_aucs(
    positive: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"], weights: Shaped[np.ndarray, "draws n"]
) -> Float[np.ndarray, " draws"]:
    """Return the area under the ROC curve of each draw, ties counted half; NaN as in `roc_curves`.

    >>> weighted_aucs(np.array([True, False]), np.array([0.5, 0.5]), np.ones((1, 2))).tolist()
    [0.5]

    Args:
        positive: Whether an image is positive.
        scores: Scores of the images.
        weights: How often each image counts in each draw.
    """
    true, false = (np.pad(each, ((0, 0), (1, 0))) for each in _counts(positive, scores, weights))
    areas: np.ndarray = (np.diff(false) * (true[:, 1:] + true[:, :-1]) / 2).sum(1)
    pairs = true[:, -1] * false[:, -1]
    return np.divide(areas, pairs, out=np.full(len(areas), np.nan), where=pairs > 0)


def patient_weights(groups: Shaped[np.ndarray, " n"], draws: int, seed: int = 0) -> np.ndarray:
    """Return how often each image counts in draws of patients with replacement, int64 [draws, n].

    Args:
        groups: The patient of each image.
        draws: Number of draws.
        seed: Seed of the draws.
    """
    names, member = np.unique(groups, return_inverse=True)
    shares = np.full(len(names), 1 / len(names))
    weights: np.ndarray = np.random.default_rng(seed).multinomial(len(names), shares, size=draws)[:, member]
    return weights


def _counts(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return true and false positives at each distinct threshold from the highest, [draws, thresholds]."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    ordered, hit = weights[:, order].astype(float), positive[order]
    return (ordered * hit).cumsum(1)[:, last], (ordered * ~hit).cumsum(1)[:, last]
