"""Means with their intervals: over runs, and over the patients of one run."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import scipy

from dapt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    `low` and `high` are None where the values tell no spread: there is one, or all are the same.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the interval's width, or None."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclasses.dataclass(frozen=True)
class Summary:
    """Summary of several runs, as printed in tables.

    Attributes:
        mean: Mean of the values.
        sd: Their standard deviation, divisor n - 1; NaN of one value.
        n: Number of values.
    """

    mean: float
    sd: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Summary | None":
        """Return the summary of values, None and NaN left out; None where no value is defined."""
        known = defined(values)
        if not known:
            return None
        sd = float(np.std(known, ddof=1)) if len(known) > 1 else math.nan
        # Equal decimal numbers, and differences of such, differ in the last bits, which is no spread.
        if sd <= 1e-12 * max(1.0, max(map(abs, known))):
            sd = 0.0
        return cls(math.fsum(known) / len(known), sd, len(known))


def mean_interval(values: Sequence[float | None], level: float = 0.95) -> Interval | None:
    """Return the mean and Student's t interval of independent runs.

    Args:
        values: Values, one per run; None and NaN (undefined) are left out.
        level: Coverage of the interval.

    Returns:
        None when no value is defined; no bounds when there is only one, or when all are the same: runs that do not
        vary tell nothing of how much others would.
    """
    summary = Summary.of(values)
    if summary is None:
        return None
    if summary.n < 2 or not summary.sd:
        return Interval(summary.mean, None, None, summary.n)
    half = float(scipy.stats.t.ppf((1 + level) / 2, summary.n - 1)) * summary.sd / math.sqrt(summary.n)
    return Interval(summary.mean, summary.mean - half, summary.mean + half, summary.n)


def bootstrap_interval(
    values: Sequence[float | None], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval | None:
    """Return the mean and its bootstrap interval, bias-corrected and accelerated (BCa; Efron, 1987).

    For values far from normal. With fewer than about ten it is too narrow; `mean_interval` is the better
    choice for seeds.

    Args:
        values: Independent values; None and NaN are left out.
        level: Coverage of the interval.
        resamples: Number of draws with replacement.
        seed: Seed of the draws, so that a report does not change when it is built again.

    Returns:
        As `mean_interval`.
    """
    known = np.asarray(defined(values))
    if not known.size:
        return None
    mean = float(known.mean())
    if known.size < 2:
        return Interval(mean, None, None, 1)
    if np.ptp(known) == 0:
        return Interval(mean, None, None, int(known.size))
    found = scipy.stats.bootstrap(
        (known,),
        np.mean,
        confidence_level=level,
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), int(known.size))


def patient_draws(
    measure: Callable[[np.ndarray], float],
    groups: Sequence[object] | np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Bootstrap over the patients of one run, drawn with replacement with all of their images.

    Drawing images instead would take those of one patient for independent, and give intervals that are too
    narrow (cluster bootstrap; Field and Welsh, 2007). Networks measured on the same groups, in the same
    order, with the same seed are measured on the same draws, so that their differences are paired.

    Args:
        measure: Function that returns a score of the images at some rows, int64 [m]; a row can come several
            times. NaN where it is undefined.
        groups: The patient of each image, [n].
        resamples: Number of draws.
        seed: Seed of the draws.

    Returns:
        The score of each draw, float64 [resamples].

    Raises:
        UserError: There is no image.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if not len(names):
        raise UserError("no image to draw patients from; expected one or more")
    rows_of = np.split(np.argsort(member), np.cumsum(np.bincount(member))[:-1])
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(names), size=len(names)) for _ in range(resamples))
    return np.array([measure(np.concatenate([rows_of[each] for each in draw])) for draw in draws])


def drawn_by(groups: np.ndarray, images: np.ndarray | None = None) -> str:
    """Return what a draw of groups draws: "patients", or "images" where each is a group of its own by its own name.

    >>> drawn_by(np.array(["a", "a", "b"])), drawn_by(np.array(["a.png", "b.png"]), np.array(["a.png", "b.png"]))
    ('patients', 'images')

    Args:
        groups: The patient of each image, [n]; an image without one is a patient of its own, named as its file.
        images: File name of each image, [n]; None where they are not known.
    """
    if len(np.unique(groups)) < len(groups):
        return "patients"
    names = groups if images is None else images
    known = set(map(str, names))
    return "images" if all(Path(str(group)).name in known for group in groups) else "patients"


def patient_interval(value: float, draws: np.ndarray, patients: int, level: float = 0.95) -> Interval:
    """Return a score with the percentile interval of its draws of patients.

    Args:
        value: The score of all images, or the difference of two networks' scores.
        draws: Draws, see `patient_draws`; of a difference, the difference of the draws.
        patients: Number of patients.
        level: Coverage of the interval.

    Returns:
        `n` counts patients. Draws with an undefined score (such as the AUC of draws without positives) are
        left out; no bounds where more than half are, where there is one patient, or where all draws have one
        score, such as the AUC of classes that few images tell apart without a fault: others might not.
    """
    known = draws[np.isfinite(draws)]
    if patients < 2 or 2 * len(known) <= len(draws) or not np.ptp(known):
        return Interval(value, None, None, patients)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), patients)


def defined(values: Sequence[float | None]) -> list[float]:
    """Return the values that are neither None nor NaN nor infinite."""
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Return the mean along the first axis of the values that are finite; NaN where none is.

    >>> mean_of_defined(np.array([[1.0, np.nan], [2.0, np.nan]])).tolist()
    [1.5, nan]
    """
    known = np.isfinite(values)
    count = known.sum(0)
    return np.divide(
        np.where(known, values, 0).sum(0), count, out=np.full(count.shape, np.nan), where=count > 0
    )


def too_few_seeds(seeds: int) -> str:
    """Return a line on what one or two seeds cannot show, and on what would; empty for more.

    Args:
        seeds: Number of seeds.
    """

    def half(number: int) -> float:
        # Student's quantile as in `scipy.stats.t`, which takes most of a second to import.
        return float(scipy.special.stdtrit(number - 1, 0.975)) / math.sqrt(number)

    enough = f"5 seeds would give ±{half(5):.1f} standard deviations"
    if seeds == 1:
        return f"One seed: no interval, no test; {enough}."
    if seeds == 2:
        return f"Two seeds: the 95% interval of a mean is ±{half(2):.1f} standard deviations; {enough}."
    return ""
