"""Seeds that a margin of non-inferiority needs, and the margin that a number of seeds can show."""

import math

import scipy

from dapt_jax.errors import UserError

LEVEL, POWER = 0.05, 0.8
"""Level of one-sided tests, and the probability with which a true difference is to be found."""
MOST_SEEDS = 1000


def power_of_non_inferiority(
    margin: float, sd: float, seeds: int, difference: float = 0.0, level: float = LEVEL
) -> float:
    """Return the power of the paired t-test of non-inferiority over seeds, by the noncentral t-distribution.

    >>> round(power_of_non_inferiority(margin=0.01, sd=0.01, seeds=8), 3)
    0.815

    Args:
        margin: Margin above 0, in the metric's unit.
        sd: Standard deviation of the paired differences, above 0.
        seeds: Number of seeds, 2 or more.
        difference: True difference from the reference; negative where worse.
        level: Level of the one-sided test.
    """
    freedom = seeds - 1
    # Beyond this SciPy returns NaN, and the power has long been 1.
    shift = min((difference + margin) / sd * math.sqrt(seeds), 1e8)
    return float(scipy.stats.nct.sf(scipy.stats.t.ppf(1 - level, freedom), freedom, shift))


def seeds_for_margin(
    margin: float, sd: float, difference: float = 0.0, level: float = LEVEL, power: float = POWER
) -> int | None:
    """Return the fewest seeds that show a margin of non-inferiority; None beyond `MOST_SEEDS`.

    >>> seeds_for_margin(margin=0.01, sd=0.01)
    8

    Args:
        margin: See `power_of_non_inferiority`, as are the others.
        sd: Standard deviation of the paired differences, 0 or more.
        difference: True difference.
        level: Level of the one-sided test.
        power: Power to reach.
    """
    if difference + margin <= 0:
        return None
    if not sd:
        return 2
    low, high = 2, MOST_SEEDS
    if power_of_non_inferiority(margin, sd, high, difference, level) < power:
        return None
    while low < high:
        middle = (low + high) // 2
        if power_of_non_inferiority(margin, sd, middle, difference, level) >= power:
            high = middle
        else:
            low = middle + 1
    return low


def margin_for_seeds(sd: float, seeds: int, level: float = LEVEL, power: float = POWER) -> float | None:
    """Return the smallest margin that a number of seeds shows where there is no difference; None of one seed.

    >>> round(margin_for_seeds(sd=0.01, seeds=8), 5)
    0.00978

    Args:
        sd: Standard deviation of the paired differences.
        seeds: Number of seeds.
        level: Level of the one-sided test.
        power: Power to reach.
    """
    if seeds < 2:
        return None
    freedom = seeds - 1
    quantile = scipy.stats.t.ppf(1 - level, freedom)
    shift = scipy.optimize.brentq(
        lambda nc: scipy.stats.nct.sf(quantile, freedom, nc) - power, 0.0, 10.0 + 10 * quantile
    )
    return float(shift) * sd / math.sqrt(seeds)


def upper_sd(sd: float, freedom: int, level: float = 0.8) -> float:
    """Return the upper confidence limit of a standard deviation (Browne, Statistics in Medicine 14, 1995).

    A sample size from the deviation of a small pilot itself is too small more often than not.

    >>> round(upper_sd(1.0, freedom=2), 2), round(upper_sd(1.0, freedom=11), 2)
    (2.12, 1.25)

    Args:
        sd: Standard deviation that was seen.
        freedom: Its degrees of freedom, 1 or more.
        level: Confidence, one-sided.

    Raises:
        UserError: There is no degree of freedom.
    """
    if freedom < 1:
        raise UserError(f"a standard deviation of {freedom} degrees of freedom; expected 1 or more")
    return sd * math.sqrt(freedom / float(scipy.stats.chi2.ppf(1 - level, freedom)))
