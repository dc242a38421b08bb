"""What holds beyond one table: strategies that are no worse than the reference, and their ranks over tasks."""

from __future__ import annotations

import dataclasses

import numpy as np

from dapt_jax.records.study_records import Records, lower_is_better, nice
from dapt_jax.report.marks import LEVEL
from dapt_jax.report.tables import NONE, Cell, Table, p_value, score
from dapt_jax.statistics import Interval, equivalent, holm, mean_interval, no_worse, paired_dz, ranks


@dataclasses.dataclass(frozen=True)
class Claim:
    """A strategy against the reference, with a margin.

    Attributes:
        difference: from the reference, with the interval of 90% that goes with two one-sided tests at 0.05.
        no_worse: p of being worse by less than the margin, adjusted by Holm's method over the strategies.
        equivalent: p of differing by less than the margin, adjusted likewise.
        dz: the difference in standard deviations of the paired differences.
        says: the verdict in words.
    """

    difference: Interval
    no_worse: float | None
    equivalent: float | None
    dz: float | None
    says: str


def claims(records: Records, task: str, split: str) -> dict[str, Claim]:
    """Tests every strategy's claim of being no worse than the reference; none where the margin is 0."""
    reference, metric, margin = records.reference, records.metric(task), records.margin
    if reference is None or not margin:
        return {}
    lowest = lower_is_better(metric)
    values = {n: records.values(n, task, split, records.protocol(task), metric) for n in records.strategies}
    against = values.pop(reference)
    held = {n: test for n, each in values.items() if (test := no_worse(each, against, margin, lowest)) is not None}
    both = {n: equivalent(values[n], against, margin) for n in held}
    p_held = holm([test.p for test in held.values()])
    p_both = holm([None if test is None else test.p for test in both.values()])
    return {
        name: Claim(
            test.difference, p, q, paired_dz(values[name], against), _verdict(test.difference, p, q, margin, lowest)
        )
        for (name, test), p, q in zip(held.items(), p_held, p_both, strict=True)
    }


def _verdict(difference: Interval, p_held: float | None, p_both: float | None, margin: float, lowest: bool) -> str:
    if p_both is not None and p_both < LEVEL:
        return "equivalent"
    if p_held is not None and p_held < LEVEL:
        return "no worse"
    if difference.low is None or difference.high is None:
        return NONE
    is_worse = difference.low > margin if lowest else difference.high < -margin
    return "worse" if is_worse else "not shown"


def table(records: Records, task: str) -> Table | None:
    """The claims of a task on development and external data; None where there are no two seeds or no margin."""
    found = {split: claims(records, task, split) for split in records.splits(task) if split != "test"}
    tested = [claim for of_split in found.values() for claim in of_split.values() if claim.no_worse is not None]
    if not tested:
        return None
    metric, margin = nice(records.metric(task)), records.margin
    names = [name for name in records.strategies if any(name in of_split for of_split in found.values())]
    rows = []
    for name in names:
        row = [Cell(name)]
        for of_split in found.values():
            claim = of_split.get(name)
            if claim is None:
                row += [Cell(NONE)] * 5
                continue
            row += [score(claim.difference, signed=True), Cell(NONE if claim.dz is None else f"{claim.dz:+.2f}")]
            row += [Cell(p_value(claim.no_worse)), Cell(p_value(claim.equivalent)), Cell(claim.says)]
        rows.append(row)
    columns = ["strategy", *["difference", "dz", "p no worse", "p equivalent", "says"] * len(found)]
    groups = [("", 1), *((f"{split} {metric}", 5) for split in found)]
    note = (
        f"Margin: {margin:g} {metric}. No worse: the difference from {records.reference}, on the worse side, is less than "
        "the margin (one-sided paired t-test over seeds of non-inferiority). Equivalent: it is less than the margin either "
        "way (two one-sided paired t-tests, TOST). p adjusted by Holm's method over the strategies, each split on its "
        "own; intervals are of 90%, as befits one-sided tests at 0.05, and not adjusted. Worse: the whole interval is beyond "
        "the margin; not shown does not mean worse. dz: the mean difference in standard deviations of the paired differences."
    )
    return Table(f"No worse than {records.reference}?", columns, rows, groups, note)


def over_tasks(records: Records) -> list[Table]:
    """Ranks of the strategies over the tasks, a table per split that several tasks have."""
    tables = []
    splits = list(dict.fromkeys(split for task in records.tasks for split in records.splits(task)))
    for split in splits:
        tasks = [task for task in records.tasks if split in records.splits(task)]
        means = {name: [_good(records, name, task, split) for task in tasks] for name in records.strategies}
        known = {name: [v for v in row if v is not None] for name, row in means.items() if None not in row}
        if len(tasks) < 2 or len(known) < 2:
            continue
        found = ranks(np.array(list(known.values())).T)
        least, critical = found.mean.min(), found.critical_difference
        can_tell = critical < len(known) - 1
        rows = [
            [
                Cell(name),
                *(Cell(f"{rank:g}") for rank in of_tasks),
                Cell(f"{mean:.2f}", best=bool(mean == least), held=can_tell and bool(least < mean <= least + critical)),
            ]
            for name, of_tasks, mean in zip(known, found.by_task.T, found.mean, strict=True)
        ]
        friedman = "" if found.p is None else f" Friedman's test that all are alike: p {_is(found.p)}."
        note = (
            "Rank 1 is the best mean; ties share. Bold: the best mean rank. "
            + (
                f"†: within Nemenyi's critical difference of it at 0.05, {critical:.2f}."
                if can_tell
                else f"Nemenyi's critical difference at 0.05 is {critical:.2f}, more than any two can differ by on "
                f"{len(tasks)} tasks: nothing can be told apart."
            )
            + friedman
        )
        columns = ["strategy", *tasks, "mean rank"]
        tables.append(Table(f"Ranks over the tasks, {split}", columns, rows, note=note))
    return tables


def _is(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _good(records: Records, name: str, task: str, split: str) -> float | None:
    """Mean of the primary metric, turned so that more is better."""
    metric = records.metric(task)
    mean = mean_interval(records.values(name, task, split, records.protocol(task), metric))
    return None if mean is None else (-1 if lower_is_better(metric) else 1) * mean.mean
