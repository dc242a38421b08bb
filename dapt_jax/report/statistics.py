"""Means, intervals and tests over a handful of seeds."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; `low` and `high` are None where there are too few values for one."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the interval's width, or None."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclasses.dataclass(frozen=True)
class PairedTest:
    """A paired comparison: the mean difference, its interval and two-sided p; p is None where it is undefined."""

    difference: Interval
    p: float | None


def mean_interval(values: Sequence[float | None], level: float = 0.95) -> Interval | None:
    """Returns the mean and Student's t interval of independent runs.

    Args:
        values: one value per run; None and NaN (undefined) are left out.
        level: coverage.

    Returns:
        None when no value is defined; no bounds when there is only one.
    """
    known = _defined(values)
    if not known:
        return None
    mean = math.fsum(known) / len(known)
    if len(known) < 2:
        return Interval(mean, None, None, len(known))
    error = float(np.std(known, ddof=1)) / math.sqrt(len(known))
    half = float(stats.t.ppf((1 + level) / 2, len(known) - 1)) * error
    return Interval(mean, mean - half, mean + half, len(known))


def bootstrap_interval(
    values: Sequence[float | None], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval | None:
    """Returns the mean and percentile bootstrap interval (Efron 1979), for values far from normal.

    With fewer than about ten values it is too narrow; `mean_interval` is the better choice for seeds.

    Args:
        values: independent values; None and NaN are left out.
        level: coverage.
        resamples: draws with replacement.
        seed: of the draws, so that a report does not change when it is built again.
    """
    known = np.asarray(_defined(values))
    if not known.size:
        return None
    if known.size < 2:
        return Interval(float(known[0]), None, None, 1)
    draws = np.random.default_rng(seed).integers(known.size, size=(resamples, known.size))
    low, high = np.quantile(known[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(known.mean()), float(low), float(high), int(known.size))


def paired_t(first: Sequence[float | None], second: Sequence[float | None], level: float = 0.95) -> PairedTest | None:
    """Compares two arms over the seeds they share, by Student's paired t-test, two-sided.

    Args:
        first: one value per seed.
        second: the values of the same seeds, in the same order.
        level: coverage of the interval of `first - second`.

    Returns:
        None when no seed has both values. p is None with one seed, and where every difference is the same but not
        zero, which leaves no spread to measure against; p is 1 where all differences are zero.
    """
    pairs = [_defined(pair) for pair in zip(first, second, strict=True)]
    differences = [pair[0] - pair[1] for pair in pairs if len(pair) == 2]
    interval = mean_interval(differences, level)
    if interval is None:
        return None
    if interval.n < 2:
        return PairedTest(interval, None)
    spread = float(np.std(differences, ddof=1))
    # Differences of equal decimal numbers differ in the last bits; that is no spread either.
    if spread <= 1e-12 * max(1.0, max(abs(value) for value in differences)):
        return PairedTest(interval, 1.0 if abs(interval.mean) <= 1e-12 else None)
    t = interval.mean / (spread / math.sqrt(interval.n))
    return PairedTest(interval, float(2 * stats.t.sf(abs(t), interval.n - 1)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusts p-values for the number of comparisons by Holm's step-down method (1979).

    Args:
        p_values: None for comparisons without a p-value; they do not count as comparisons.

    Returns:
        Adjusted values in the order given.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = largest
    return adjusted


def pareto(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Returns the indices that nothing beats on both axes (lower cost, higher score), by rising cost."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if not front or scores[index] > scores[front[-1]]:
            front.append(index)
    return front


def _defined(values: Sequence[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None and math.isfinite(value)]
