"""Ranks of strategies over tasks, and the Pareto front of cost and score."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Strategies ranked over tasks (Demsar, JMLR 7, 2006).

    Attributes:
        by_task: Ranks by task: rank 1 is the best, ties share the mean of their ranks, float64 [tasks,
            strategies].
        mean: Mean rank of each strategy over tasks, float64 [strategies].
        p: The p of Friedman's test that all are equal; None with fewer than three strategies or where all are
            tied everywhere.
        critical_difference: Critical difference of two mean ranks by Nemenyi's test.
    """

    by_task: np.ndarray
    mean: np.ndarray
    p: float | None
    critical_difference: float


def ranks(scores: np.ndarray, lower_is_better: bool = False, level: float = 0.05) -> Ranks:
    """Rank strategies over tasks.

    Args:
        scores: Scores, one row per task, two or more strategies, no NaN, float [tasks, strategies].
        lower_is_better: Whether lower scores are better.
        level: Level of Nemenyi's test.
    """
    tasks, strategies = scores.shape
    by_task = scipy.stats.rankdata(scores if lower_is_better else -scores, axis=1)
    is_tied = bool((by_task == by_task[:, :1]).all())
    p = None if strategies < 3 or is_tied else float(scipy.stats.friedmanchisquare(*by_task.T).pvalue)
    # Of the studentized range with infinite degrees of freedom, over the square root of 2.
    quantile = float(scipy.stats.studentized_range.ppf(1 - level, strategies, np.inf)) / math.sqrt(2)
    critical = quantile * math.sqrt(strategies * (strategies + 1) / (6 * tasks))
    return Ranks(by_task, by_task.mean(0), p, critical)


def pareto(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Return the indices of the Pareto front (lower cost, higher score), by increasing cost."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if not front or scores[index] > scores[front[-1]]:
            front.append(index)
    return front
