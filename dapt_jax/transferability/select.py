"""Checkpoint selection from scores along a run: best, best with patience, or best with length prior."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num

from dapt_jax.errors import UserError, nearest

RULES = ("best", "patience", "length_prior")
PRIOR_WEIGHT = 1.0
"""Standard deviations of the score that the whole planned length is worth."""


@dataclasses.dataclass(frozen=True)
class CheckpointRule:
    """Rule for checkpoint selection and for the end of training.

    Attributes:
        name: Name of the rule: `best` runs to the end and keeps the best score; `patience` stops when the
            smoothed score has not improved for a while and keeps its best; `length_prior` does as `best`,
            with a bonus for length (see `length_prior`).
        patience: Scores without improvement before `patience` stops.
        window: Number of scores that are averaged for `patience`.
        weight: Weight of the length for `length_prior`.
    """

    name: str = "best"
    patience: int = 3
    window: int = 1
    weight: float = PRIOR_WEIGHT

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise UserError(f"unknown selection rule {self.name!r}; {nearest(self.name, RULES)}")
        for name in ("patience", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"selection {name} is {getattr(self, name)}; expected 1 or more")
        if not self.weight >= 0:
            raise UserError(f"selection weight is {self.weight}; expected 0 or more")

    def choose(
        self, scores: Sequence[float], shares: Sequence[float], higher_is_better: bool
    ) -> tuple[int, bool]:
        """Return the checkpoint to keep so far, and whether to stop here.

        Args:
            scores: Scores in the order of training; NaN where one is undefined.
            shares: Shares of the planned training that was done at each, 0 to 1.
            higher_is_better: Whether higher scores are better.

        Returns:
            Index into `scores` (the last one where none is defined), and whether training may stop.
        """
        good = np.asarray(scores, float) if higher_is_better else -np.asarray(scores, float)
        if self.name == "patience":
            return patience(good, self.patience, self.window)
        if self.name == "length_prior":
            return length_prior(good, shares, self.weight), False
        return best(good), False


def best(scores: Num[np.ndarray, " k"]) -> int:
    """Return the first index of the highest score; the last index if all are NaN."""
    return len(scores) - 1 if np.isnan(scores).all() else int(np.nanargmax(scores))


def patience(scores: Num[np.ndarray, " k"], wait: int, window: int = 1) -> tuple[int, bool]:
    """Return the best moving average of scores, with a stop after `wait` scores without improvement.

    Args:
        scores: Scores, higher is better; NaN counts as no improvement.
        wait: Number of scores without improvement before it ends.
        window: Number of scores that are averaged.

    Returns:
        Index of the best, and whether patience ran out.
    """
    top, index = -math.inf, None
    for now in range(len(scores)):
        value = float(np.mean(scores[max(0, now - window + 1) : now + 1]))
        if value > top:
            top, index = value, now
        elif index is not None and now - index >= wait:
            return index, True
    return len(scores) - 1 if index is None else index, False


def length_prior(
    scores: Float[np.ndarray, " k"], shares: Sequence[float], weight: float = PRIOR_WEIGHT
) -> int:
    """Return the index of the best sum of score and length, a prior in favour of longer training.

    Scores are put in units of their own standard deviation over the checkpoints; then `weight` times the
    share of the planned training is added. On the released results of arXiv 2410.18677 this is the rule that,
    chosen out of sample, saves a third of the epochs at the smallest loss (docs/checkpoint_selection.md).

    Args:
        scores: Scores, higher is better; NaN is never chosen unless all are.
        shares: Shares of the planned training at each score, 0 to 1.
        weight: Standard deviations of the score that the whole length adds.
    """
    if np.isnan(scores).all():
        return len(scores) - 1
    spread = float(np.nanstd(scores))
    units = (scores - np.nanmean(scores)) / spread if spread > 0 else np.where(np.isnan(scores), np.nan, 0.0)
    return best(units + weight * np.asarray(shares, float))
