"""Tests of one arm against another: difference, non-inferiority, equivalence; and effect sizes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import scipy

from dapt_jax.statistics.intervals import Interval, Summary, defined

Alternative = Literal["two-sided", "greater", "less"]
_SIDES = {"two-sided": "two-sided", "greater": "one-sided (greater)", "less": "one-sided (less)"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of two arms.

    Attributes:
        difference: Mean of the first minus mean of the second, and its interval.
        p: None where it is undefined.
        test: Name of the test, with its sides.
    """

    difference: Interval
    p: float | None
    test: str

    @property
    def is_constant(self) -> bool:
        """Whether the arms differ by the same in every seed, so that seeds test nothing."""
        return self.p is None and self.difference.n > 1


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A difference and its standard error.

    Attributes:
        mean: The difference.
        error: Its standard error; None where there are too few values.
        freedom: Degrees of freedom of the error.
        n: Number of values.
        name: Name of the t-test.
    """

    mean: float
    error: float | None
    freedom: float
    n: int
    name: str

    def interval(self, level: float = 0.95) -> Interval:
        """Return the difference with its t interval; without bounds where there is no spread to measure against."""
        if not self.error:
            return Interval(self.mean, None, None, self.n)
        half = float(scipy.stats.t.ppf((1 + level) / 2, self.freedom)) * self.error
        return Interval(self.mean, self.mean - half, self.mean + half, self.n)

    def p(self, null: float, alternative: Alternative = "two-sided") -> float | None:
        """Return the p of the hypothesis that the difference is `null`; None without variance."""
        if self.error is None or self.error == 0:
            return 1.0 if self.error == 0 and abs(self.mean - null) <= 1e-12 else None
        t = (self.mean - null) / self.error
        tail = {
            "two-sided": 2 * scipy.stats.t.sf(abs(t), self.freedom),
            "greater": scipy.stats.t.sf(t, self.freedom),
        }
        return float(tail.get(alternative, scipy.stats.t.cdf(t, self.freedom)))

    def non_inferiority(
        self, margin: float, lower_is_better: bool = False, level: float = 0.95
    ) -> Comparison:
        """Test that it is on the worse side by less than a margin: see the function of the same name."""
        p = self.p(margin, "less") if lower_is_better else self.p(-margin, "greater")
        return Comparison(self.interval(2 * level - 1), p, f"one-sided {self.name} of non-inferiority")

    def equivalence(self, margin: float, level: float = 0.95) -> Comparison:
        """Test that it is smaller than a margin either way: see the function of the same name."""
        sides = [self.p(-margin, "greater"), self.p(margin, "less")]
        p = None if None in sides else max(side for side in sides if side is not None)
        return Comparison(self.interval(2 * level - 1), p, f"two one-sided {self.name}s of equivalence")


def _paired(first: Sequence[float | None], second: Sequence[float | None]) -> Estimate | None:
    pairs = [defined(pair) for pair in zip(first, second, strict=True)]
    differences = [pair[0] - pair[1] for pair in pairs if len(pair) == 2]
    summary = Summary.of(differences)
    if summary is None:
        return None
    error = None if summary.n < 2 else summary.sd / math.sqrt(summary.n)
    return Estimate(summary.mean, error, summary.n - 1, summary.n, "paired t-test")


def _unpaired(first: Summary, second: Summary, equal_variances: bool) -> Estimate:
    mean, n = first.mean - second.mean, min(first.n, second.n)
    name = "Student's two-sample t-test" if equal_variances else "Welch's t-test"
    if n < 2:
        return Estimate(mean, None, 0, n, name)
    of_each = [each.sd**2 / each.n for each in (first, second)]
    if equal_variances:
        freedom = float(first.n + second.n - 2)
        pooled = sum((each.n - 1) * each.sd**2 for each in (first, second)) / freedom
        return Estimate(mean, math.sqrt(pooled * (1 / first.n + 1 / second.n)), freedom, n, name)
    error = math.sqrt(sum(of_each))
    shares = (
        [(part / error**2) ** 2 / (each.n - 1) for part, each in zip(of_each, (first, second), strict=True)]
        if error
        else [1.0]
    )
    return Estimate(mean, error, 1 / sum(shares), n, name)


def _estimate(first: Sequence[float | None], second: Sequence[float | None], paired: bool) -> Estimate | None:
    if paired:
        return _paired(first, second)
    a, b = Summary.of(first), Summary.of(second)
    return None if a is None or b is None else _unpaired(a, b, equal_variances=False)


def _tested(estimate: Estimate, alternative: Alternative, level: float) -> Comparison:
    name = f"{_SIDES[alternative]} {estimate.name}"
    return Comparison(estimate.interval(level), estimate.p(0.0, alternative), name)


def paired_t(
    first: Sequence[float | None],
    second: Sequence[float | None],
    alternative: Alternative = "two-sided",
    level: float = 0.95,
) -> Comparison | None:
    """Compare two arms over the seeds they share, by Student's paired t-test.

    Args:
        first: Values of the first arm, one per seed.
        second: Values of the second arm for the same seeds, in the same order.
        alternative: `greater` where `first` is expected to be the greater.
        level: Coverage of the interval of `first - second`.

    Returns:
        None when no seed has both values. p is None with one seed, and where every difference is the same but
        not zero, which leaves no spread to measure against; p is 1 where all differences are zero.
    """
    estimate = _paired(first, second)
    return None if estimate is None else _tested(estimate, alternative, level)


def welch_t(
    first: Sequence[float | None],
    second: Sequence[float | None],
    alternative: Alternative = "two-sided",
    level: float = 0.95,
) -> Comparison | None:
    """Compare two sets of independent runs by Welch's t-test, which does not assume equal variances (1947).

    Args:
        first: Values of the first set.
        second: Values of the second set; they need not be as many.
        alternative: `greater` where `first` is expected to be the greater.
        level: Coverage of the interval of the difference of the means.

    Returns:
        None when either has no value. p is None where either has one alone, and where neither has any spread.
    """
    estimate = _estimate(first, second, paired=False)
    return None if estimate is None else _tested(estimate, alternative, level)


def summary_t(
    first: Summary,
    second: Summary,
    equal_variances: bool = False,
    alternative: Alternative = "two-sided",
    level: float = 0.95,
) -> Comparison:
    """Compare two arms by what a table prints: means, standard deviations and numbers of runs.

    Args:
        first: Summary of the first arm.
        second: Summary of the second arm.
        equal_variances: Student's test, with one variance for both, instead of Welch's.
        alternative: `greater` where `first` is expected to be the greater.
        level: Coverage of the interval.
    """
    return _tested(_unpaired(first, second, equal_variances), alternative, level)


def non_inferiority(
    first: Sequence[float | None],
    second: Sequence[float | None],
    margin: float,
    lower_is_better: bool = False,
    paired: bool = True,
    level: float = 0.95,
) -> Comparison | None:
    """Test whether `first` is worse than `second` by less than a margin (non-inferiority).

    A small p is evidence for that claim; a difference that is not significant is none.

    Args:
        first: Values of the first arm, one per seed.
        second: Values of the second arm, of the same seeds where paired.
        margin: Smallest difference that matters, above 0, in the metric's unit.
        lower_is_better: Whether lower values are better.
        paired: Whether to test by the paired t-test over seeds; else by Welch's.
        level: 1 minus twice the level of the interval's two one-sided bounds: at 0.95 the interval of `first
            - second` covers 90%, so that it clears the margin exactly where p < 0.05.

    Returns:
        None when there is nothing to compare. p is None where there is no spread to measure against.
    """
    estimate = _estimate(first, second, paired)
    return None if estimate is None else estimate.non_inferiority(margin, lower_is_better, level)


def equivalence(
    first: Sequence[float | None],
    second: Sequence[float | None],
    margin: float,
    paired: bool = True,
    level: float = 0.95,
) -> Comparison | None:
    """Test equivalence within a margin by two one-sided tests (TOST; Schuirmann, 1987).

    Args:
        first: Values of the first arm, one per seed.
        second: Values of the second arm, of the same seeds where paired.
        margin: Margin above 0, in the metric's unit.
        paired: Whether to test by paired t-tests over seeds; else by Welch's.
        level: Level as in `non_inferiority`: the interval of 90% lies within the margin exactly where p <
            0.05.

    Returns:
        As `non_inferiority`; p is the greater of the two.
    """
    estimate = _estimate(first, second, paired)
    return None if estimate is None else estimate.equivalence(margin, level)


def cohens_d(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Return the difference of the means in pooled standard deviations (Cohen, 1988); None without spread."""
    a, b = Summary.of(first), Summary.of(second)
    if a is None or b is None or min(a.n, b.n) < 2:
        return None
    pooled = math.sqrt(((a.n - 1) * a.sd**2 + (b.n - 1) * b.sd**2) / (a.n + b.n - 2))
    return (a.mean - b.mean) / pooled if pooled else None


def hedges_g(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Return Cohen's d without its upward bias in small samples, by the exact factor (Hedges, 1981)."""
    d = cohens_d(first, second)
    if d is None:
        return None
    freedom = len(defined(first)) + len(defined(second)) - 2
    log_factor = (
        scipy.special.gammaln(freedom / 2)
        - scipy.special.gammaln((freedom - 1) / 2)
        - math.log(freedom / 2) / 2
    )
    return d * math.exp(log_factor)


def paired_dz(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Return the mean paired difference in standard deviations (Cohen's d_z); None without variance."""
    estimate = _paired(first, second)
    if estimate is None or not estimate.error:
        return None
    return estimate.mean / (estimate.error * math.sqrt(estimate.n))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for the number of comparisons by Holm's step-down method (1979).

    Args:
        p_values: The p-values; None for comparisons without a p-value; they do not count as comparisons.

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
