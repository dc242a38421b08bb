"""Non-inferiority to the reference, and the ranks of the strategies over tasks."""

from __future__ import annotations

import dataclasses

import numpy as np

from dapt_jax.formatting import NONE, p_value
from dapt_jax.metrics import lower_is_better
from dapt_jax.records.study_records import Records
from dapt_jax.report.columns import Cell, Column, Table, score
from dapt_jax.report.marks import LEVEL
from dapt_jax.statistics import Interval, equivalence, holm, mean_interval, non_inferiority, paired_dz, ranks


@dataclasses.dataclass(frozen=True)
class Claim:
    """Non-inferiority test of one strategy against the reference.

    Attributes:
        difference: Difference from the reference, with its 90% interval, which corresponds to two one-sided
            tests at 0.05.
        non_inferiority: The p of the test of being worse by less than the margin, adjusted by Holm's method
            over strategies.
        equivalence: The p of the tests of differing by less than the margin, adjusted likewise.
        dz: Cohen's d_z: the mean difference in standard deviations of the paired differences.
        verdict: Result of the tests: "equivalent", "non-inferior", "inferior", "inconclusive", or `NONE`.
    """

    difference: Interval
    non_inferiority: float | None
    equivalence: float | None
    dz: float | None
    verdict: str


def claims(records: Records, task: str, split: str) -> dict[str, Claim]:
    """Test the non-inferiority of every strategy to the reference; empty where the margin is 0 or scores are unlike."""
    reference, metric, margin = records.reference, records.metric(task), records.margin
    if reference is None or not margin or records.unlike(task, split):
        return {}
    lowest = lower_is_better(metric)
    values = {n: records.values(n, task, split, records.protocol(task), metric) for n in records.strategies}
    against = values.pop(reference)
    tests = {
        n: t
        for n, each in values.items()
        if (t := non_inferiority(each, against, margin, lowest)) is not None
    }
    both = {n: equivalence(values[n], against, margin) for n in tests}
    p_one_sided = holm([test.p for test in tests.values()])
    p_both = holm([None if test is None else test.p for test in both.values()])
    return {
        name: Claim(
            test.difference,
            p,
            q,
            paired_dz(values[name], against),
            _verdict(test.difference, p, q, margin, lowest),
        )
        for (name, test), p, q in zip(tests.items(), p_one_sided, p_both, strict=True)
    }


def _verdict(
    difference: Interval, p_one_sided: float | None, p_both: float | None, margin: float, lowest: bool
) -> str:
    if p_both is not None and p_both < LEVEL:
        return "equivalent"
    if p_one_sided is not None and p_one_sided < LEVEL:
        return "non-inferior"
    if difference.low is None or difference.high is None:
        return NONE
    is_inferior = difference.low > margin if lowest else difference.high < -margin
    return "inferior" if is_inferior else "inconclusive"


CLAIM_COLUMNS: tuple[Column[Claim], ...] = (
    Column("difference", lambda claim: score(claim.difference, signed=True)),
    Column("Cohen's dz", lambda claim: NONE if claim.dz is None else f"{claim.dz:+.2f}"),
    Column("p non-inferiority", lambda claim: p_value(claim.non_inferiority)),
    Column("p equivalence", lambda claim: p_value(claim.equivalence)),
    Column("verdict", lambda claim: claim.verdict),
)
"""What the table of non-inferiority shows of a strategy, on each split."""


def table(records: Records, task: str) -> Table | None:
    """Return the non-inferiority table of a task; None with fewer than two seeds or without a margin."""
    found = {split: claims(records, task, split) for split in records.splits(task)}
    tested = [
        claim
        for of_split in found.values()
        for claim in of_split.values()
        if claim.non_inferiority is not None
    ]
    if not tested:
        return None
    metric, margin = records.display_name(task, records.metric(task)), records.margin
    names = [name for name in records.strategies if any(name in of_split for of_split in found.values())]

    def on(split: str, column: Column[Claim]) -> Column[str]:
        of_split = found[split]
        return Column(
            column.title,
            lambda name: column.read(of_split[name]) if name in of_split else NONE,
            f"{split} {metric}",
        )

    columns = [Column[str]("strategy", lambda name: name)]
    columns += [on(split, column) for split in found for column in CLAIM_COLUMNS]
    note = (
        f"Margin: {margin:g} {metric}. Non-inferior: the difference from {records.reference}, on the worse "
        "side, is "
        "less than the margin (one-sided paired t-test over seeds of non-inferiority). Equivalent: it is "
        "less than the "
        "margin either way (two one-sided paired t-tests, TOST). p adjusted by Holm's method over the "
        "strategies, "
        "each split on its own; intervals are of 90%, as befits one-sided tests at 0.05, and not adjusted. "
        "Inferior: "
        "the whole interval is beyond the margin; inconclusive does not mean inferior. Cohen's dz: the mean "
        "difference "
        "in standard deviations of the paired differences."
    )
    return Table.of(f"Non-inferiority to {records.reference}", columns, names, note)


def over_tasks(records: Records) -> list[Table]:
    """Return the ranks of the strategies over tasks, one table per split shared by several tasks.

    A task whose scores cannot be compared (`Records.unlike`) has no ranks.
    """
    tables = []
    splits = list(dict.fromkeys(split for task in records.tasks for split in records.splits(task)))
    for split in splits:
        tasks = [
            task
            for task in records.tasks
            if split in records.splits(task) and not records.unlike(task, split)
        ]
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
                Cell(
                    f"{mean:.2f}",
                    best=bool(mean == least),
                    not_significantly_worse=can_tell and bool(least < mean <= least + critical),
                ),
            ]
            for name, of_tasks, mean in zip(known, found.by_task.T, found.mean, strict=True)
        ]
        friedman = (
            "" if found.p is None else f" Friedman's test that all strategies are equal: p {_is(found.p)}."
        )
        note = (
            "Rank 1 is the best mean; ties share. Bold: the best mean rank. "
            + (
                f"†: within Nemenyi's critical difference of it at 0.05, {critical:.2f}."
                if can_tell
                else f"Nemenyi's critical difference at 0.05 is {critical:.2f}, more than any two can "
                f"differ by on {len(tasks)} tasks: no two strategies can be told apart."
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
    """Return the mean of the primary metric, negated where lower is better."""
    metric = records.metric(task)
    mean = mean_interval(records.values(name, task, split, records.protocol(task), metric))
    return None if mean is None else (-1 if lower_is_better(metric) else 1) * mean.mean
