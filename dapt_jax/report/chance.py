"""What a score has to exceed: chance, and one feature per image."""

from __future__ import annotations

import dataclasses

from dapt_jax.metrics import lookup
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import BASELINE
from dapt_jax.statistics import Interval, mean_interval

SYMMETRIC = ("auc", "auc_subset")
"""Metrics of which a feature that works reversed has the mirror image about chance."""


@dataclasses.dataclass(frozen=True)
class BaselineLevel:
    """Score of a one-feature baseline in its better direction.

    Attributes:
        name: Name of the feature.
        value: Mean score over seeds, mirrored about chance where that is better.
        is_reversed: Whether it is mirrored.
        is_at_chance: Whether its interval over seeds holds chance.
    """

    name: str
    value: float
    is_reversed: bool = False
    is_at_chance: bool = False

    def __str__(self) -> str:
        how = ", reversed" if self.is_reversed else ""
        how += ", itself at chance" if self.is_at_chance else ""
        return f"the one-feature baseline {self.name} ({self.value:.3f}{how})"


def chance_level(records: Records, task: str, metric: str | None = None) -> float | None:
    """Return the score of predictions that do not depend on the image; None where it is not known.

    Args:
        records: Records of the study.
        task: Name of the task.
        metric: Name of the metric; None for the primary one.
    """
    metric = metric or records.metric(task)
    if metric != "balanced_accuracy":
        return lookup(metric).chance
    counts = (
        len(row["classes"])
        for row in records.results
        if (row["task"], row["metric"]) == (task, metric) and isinstance(row.get("classes"), list)
    )
    most = max(counts, default=0)
    return 1 / most if most else None


def baseline_levels(records: Records, task: str, split: str) -> list[BaselineLevel]:
    """Return the one-feature baselines of a task on a split, each in its better direction."""
    metric, chance = records.metric(task), chance_level(records, task)
    found = []
    for name in records.baselines(task):
        level = mean_interval(records.values(BASELINE, task, split, name, metric))
        if level is None:
            continue
        is_reversed = metric in SYMMETRIC and chance is not None and level.mean < chance
        value = 2 * chance - level.mean if is_reversed and chance is not None else level.mean
        holds = level.low is not None and level.high is not None and chance is not None
        at_chance = holds and level.low <= chance <= level.high  # type: ignore[operator]
        found.append(BaselineLevel(name, value, is_reversed, at_chance))
    return found


def is_at(mean: Interval, level: float, sign: int) -> bool:
    """Return whether a score is not shown to exceed a level: its interval, or its one value, reaches it.

    Args:
        mean: The score.
        level: Chance, or the score of a baseline.
        sign: 1 where higher is better, else -1.
    """
    if mean.low is None or mean.high is None:
        return sign * (mean.mean - level) <= 0
    return sign * ((mean.low if sign > 0 else mean.high) - level) <= 0
