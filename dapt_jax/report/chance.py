"""What a score has to exceed: chance, and one feature per image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dapt_jax.metrics import lookup
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import BASELINE
from dapt_jax.report.marks import LEVEL
from dapt_jax.statistics import Interval, mean_interval, paired_t

SYMMETRIC = ("auc", "auc_subset")
"""Metrics of which a feature that works reversed has the mirror image about chance."""


@dataclasses.dataclass(frozen=True)
class BaselineLevel:
    """Score of a one-feature baseline in its better direction.

    Attributes:
        name: Name of the feature.
        value: Mean score over seeds, mirrored about chance where that is better.
        values: The score of each seed of the study, mirrored likewise; None where a seed has none.
        is_reversed: Whether it is mirrored.
        is_at_chance: Whether its interval over seeds holds chance.
    """

    name: str
    value: float
    values: tuple[float | None, ...]
    is_reversed: bool = False
    is_at_chance: bool = False

    def __str__(self) -> str:
        how = ", reversed" if self.is_reversed else ""
        how += ", itself at chance" if self.is_at_chance else ""
        return f"the one-feature baseline {self.name} ({self.value:.3f}{how})"


def chance_level(records: Records, task: str, split: str, metric: str | None = None) -> float | None:
    """Return the best score of predictions that do not depend on the image; None where it is not known.

    It is that of the split: where a set lacks some of the classes, always the same one of the others has a balanced
    accuracy of 1 over the number of those that are there.

    Args:
        records: Records of the study.
        task: Name of the task.
        split: The split.
        metric: Name of the metric; None for the primary one.
    """
    metric = metric or records.metric(task)
    if metric != "balanced_accuracy":
        return lookup(metric).chance
    counts = (
        len(row["classes"])
        for row in records.results
        if (row["task"], row["split"], row["metric"]) == (task, split, metric)
        and isinstance(row.get("classes"), list)
    )
    most = max(counts, default=0)
    return 1 / most if most else None


def baseline_levels(records: Records, task: str, split: str) -> list[BaselineLevel]:
    """Return the one-feature baselines of a task on a split, each in its better direction."""
    metric, chance = records.metric(task), chance_level(records, task, split)
    found = []
    for name in records.baselines(task):
        values = records.values(BASELINE, task, split, name, metric)
        level = mean_interval(values)
        if level is None:
            continue
        is_reversed = metric in SYMMETRIC and chance is not None and level.mean < chance
        value = level.mean
        if is_reversed and chance is not None:
            value = 2 * chance - value
            values = [None if each is None else 2 * chance - each for each in values]
        holds = level.low is not None and level.high is not None and chance is not None
        at_chance = holds and level.low <= chance <= level.high  # type: ignore[operator]
        found.append(BaselineLevel(name, value, tuple(values), is_reversed, at_chance))
    return found


def is_above(values: Sequence[float | None], against: Sequence[float | None], sign: int) -> bool:
    """Return whether scores are shown to be better than others of the same seeds.

    By a two-sided paired t-test at `LEVEL`; by the mean alone where there is one seed, or the difference is the
    same in all of them.

    Args:
        values: Score of each seed.
        against: The other scores, of the same seeds in the same order.
        sign: 1 where higher is better, else -1.
    """
    test = paired_t(values, against)
    if test is None or sign * test.difference.mean <= 0:
        return False
    return test.p is None or test.p < LEVEL


def is_at(mean: Interval, level: float, sign: int) -> bool:
    """Return whether a score is not shown to be better than chance: its interval, or its one value, reaches it.

    Args:
        mean: The score.
        level: Chance.
        sign: 1 where higher is better, else -1.
    """
    if mean.low is None or mean.high is None:
        return sign * (mean.mean - level) <= 0
    return sign * ((mean.low if sign > 0 else mean.high) - level) <= 0
