"""Random-effects summary of differences over data sets."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy

from dapt_jax.errors import UserError
from dapt_jax.statistics.intervals import Interval


@dataclasses.dataclass(frozen=True)
class RandomEffects:
    """Summary of effects of several studies.

    Attributes:
        effect: Mean effect with its interval by Hartung and Knapp; no bounds of one study.
        p: Two-sided p that the mean effect is 0, by the same t-distribution; None of one study.
        tau: Standard deviation of the true effects between studies.
        i_squared: Share of the variance of the effects that is between studies (Higgins and Thompson, 2002).
        prediction: Interval of the true effect in a new study; None with fewer than three.
    """

    effect: Interval
    p: float | None
    tau: float
    i_squared: float
    prediction: tuple[float, float] | None


def random_effects(effects: Sequence[float], errors: Sequence[float], level: float = 0.95) -> RandomEffects:
    """Summarise effects of studies that may differ in their true effect.

    The variance between studies by Paule and Mandel (1982); the interval by Hartung and Knapp (2001) with the
    t-distribution, never narrower than that of a normal distribution with known variances, as Rover, Knapp
    and Friede (2015) advise. Three studies are few: the interval says so by its width.

    >>> found = random_effects([0.010, 0.012, 0.008], [0.004, 0.004, 0.004])
    >>> round(found.effect.mean, 3), round(found.tau, 3)
    (0.01, 0.0)

    Args:
        effects: Effect of each study, such as the difference of two arms.
        errors: Standard error of each, above 0.
        level: Coverage of the intervals.

    Raises:
        UserError: There is no study, or an effect or error is not finite, or an error is not above 0.
    """
    y, se = np.asarray(effects, float), np.asarray(errors, float)
    if (
        not len(y)
        or y.shape != se.shape
        or not np.isfinite(y).all()
        or not (np.isfinite(se) & (se > 0)).all()
    ):
        raise UserError(
            f"a random-effects summary of {len(y)} effects and {len(se)} errors; expected one finite error above "
            "0 for each of one or more effects"
        )
    k, variances = len(y), se**2
    if k == 1:
        return RandomEffects(Interval(float(y[0]), None, None, 1), None, 0.0, 0.0, None)

    def excess(tau_squared: float) -> float:
        weights = 1 / (variances + tau_squared)
        return float(weights @ (y - weights @ y / weights.sum()) ** 2) - (k - 1)

    q = excess(0.0) + k - 1
    tau_squared = 0.0
    if excess(0.0) > 0:
        high = float(np.ptp(y)) ** 2 + 1e-300
        while excess(high) > 0:
            high *= 2
        tau_squared = float(scipy.optimize.brentq(excess, 0.0, high, xtol=1e-14 * high))
    weights = 1 / (variances + tau_squared)
    mean = float(weights @ y / weights.sum())
    spread = float(weights @ (y - mean) ** 2) / (k - 1)
    error = math.sqrt(max(spread, 1.0) / weights.sum())
    half = float(scipy.stats.t.ppf((1 + level) / 2, k - 1)) * error
    i_squared = max(0.0, 1 - (k - 1) / q) if q > 0 else 0.0
    prediction = None
    if k > 2:
        wide = float(scipy.stats.t.ppf((1 + level) / 2, k - 2)) * math.sqrt(tau_squared + error**2)
        prediction = (mean - wide, mean + wide)
    p = float(2 * scipy.stats.t.sf(abs(mean) / error, k - 1))
    return RandomEffects(
        Interval(mean, mean - half, mean + half, k), p, math.sqrt(tau_squared), i_squared, prediction
    )
