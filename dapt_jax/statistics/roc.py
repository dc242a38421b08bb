"""Areas under ROC curves of the same images, with DeLong's covariance, intervals and tests."""

import dataclasses
import math

import numpy as np
import scipy

from dapt_jax.errors import UserError
from dapt_jax.statistics.comparisons import Comparison
from dapt_jax.statistics.intervals import Interval


def auc(positive: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the ROC curve, ties counted half.

    Args:
        positive: Whether an image is positive, bool [n].
        scores: Scores of the images, float [n].

    Returns:
        The area; NaN without positives, without negatives, or with a score that is NaN.
    """
    above, below = scores[positive], np.sort(scores[~positive])
    pairs = len(above) * len(below)
    if not pairs or np.isnan(scores).any():
        return math.nan
    # Scores below a positive one, and of equal ones half: whole numbers and halves, exact in any order.
    beaten = below.searchsorted(above, "left") + below.searchsorted(above, "right")
    return float(beaten.sum() / 2 / pairs)


@dataclasses.dataclass(frozen=True)
class Areas:
    """Areas under several ROC curves of the same images.

    Attributes:
        values: The areas, float64 [k].
        covariance: Covariance of the areas, float64 [k, k].
        n: Number of images.
    """

    values: np.ndarray
    covariance: np.ndarray
    n: int

    def interval(self, which: int, level: float = 0.95) -> Interval:
        """Return the area of one curve, and its interval from the normal distribution, cut off at 0 and 1.

        Areas of 0 and 1 have no bounds: their variance is 0 however few the images.
        """
        value, error = float(self.values[which]), math.sqrt(self.covariance[which, which])
        if not error:
            return Interval(value, None, None, self.n)
        half = float(scipy.stats.norm.ppf((1 + level) / 2)) * error
        return Interval(value, max(0.0, value - half), min(1.0, value + half), self.n)

    def difference(self, first: int, second: int, level: float = 0.95) -> Comparison:
        """Compare two areas, two-sided.

        Returns:
            p is 1 where both are the same, and None where they differ without variance (both curves are
            perfect or at 0). Without variance the difference has no bounds.
        """
        value = float(self.values[first] - self.values[second])
        variance = (
            self.covariance[first, first]
            + self.covariance[second, second]
            - 2 * self.covariance[first, second]
        )
        error = math.sqrt(max(0.0, variance))
        name = "two-sided DeLong test"
        if error <= 1e-12:
            return Comparison(Interval(value, None, None, self.n), 1.0 if abs(value) <= 1e-12 else None, name)
        half = float(scipy.stats.norm.ppf((1 + level) / 2)) * error
        p = float(2 * scipy.stats.norm.sf(abs(value) / error))
        return Comparison(Interval(value, value - half, value + half, self.n), p, name)


def delong(positive: np.ndarray, scores: np.ndarray) -> Areas:
    """Return areas under ROC curves with DeLong's covariance (1988), by midranks (Sun and Xu, 2014).

    Images count as independent: with several per patient the variance is too small, and `patient_draws` is
    the choice.

    Args:
        positive: Whether an image is positive, bool [n].
        scores: Scores of k networks for the same images, float [k, n].

    Raises:
        UserError: Fewer than two positives or two negatives, which have no variance.
    """
    m = int(np.count_nonzero(positive))
    n = len(positive) - m
    if min(m, n) < 2:
        raise UserError(
            f"{m} positives and {n} negatives; expected two or more of each for the variance of an AUC"
        )
    ranks = scipy.stats.rankdata(scores, axis=1)
    above = (ranks[:, positive] - scipy.stats.rankdata(scores[:, positive], axis=1)) / n
    below = 1 - (ranks[:, ~positive] - scipy.stats.rankdata(scores[:, ~positive], axis=1)) / m
    covariance = np.atleast_2d(np.cov(above)) / m + np.atleast_2d(np.cov(below)) / n
    return Areas(above.mean(1), covariance, m + n)


def auc_half_width(area: float, positives: int, negatives: int) -> float:
    """Return half the width of the 95% interval of an AUC by its value (Hanley and McNeil, 1982, equation 2).

    >>> round(auc_half_width(0.8, 40, 40), 3), round(auc_half_width(0.8, 3, 94), 3)
    (0.098, 0.313)

    Args:
        area: The AUC.
        positives: Number of positives that count as independent: patients.
        negatives: Number of negatives.
    """
    of_positives, of_negatives = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (positives - 1) * (of_positives - area**2)
    variance += (negatives - 1) * (of_negatives - area**2)
    return float(1.96 * np.sqrt(variance / (positives * negatives)))
