"""The main table of a task: scores, cost, and both relative to the reference.

Columns can be added to `COST_COLUMNS` and `RATIO_COLUMNS`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from dapt_jax.formatting import NONE, millions, number, p_value, percent
from dapt_jax.metrics import lookup, lower_is_better
from dapt_jax.records.study_records import Cost, Records
from dapt_jax.records.vocabulary import BASELINE
from dapt_jax.report import selection
from dapt_jax.report.chance import chance_level
from dapt_jax.report.columns import Cell, Column, Table, score
from dapt_jax.report.marks import UNMARKED, Marks, note_of_marks, over_seeds
from dapt_jax.statistics import Comparison, holm, mean_interval, paired_t, welch_t


@dataclasses.dataclass(frozen=True)
class TaskArm:
    """A row of the table: a strategy, or a one-feature baseline, on a task.

    Attributes:
        records: Records of the study.
        task: Name of the task.
        name: Name of the strategy, or `BASELINE`.
        protocol: Primary protocol, or the protocol of the baseline.
    """

    records: Records
    task: str
    name: str
    protocol: str | None

    @functools.cached_property
    def metric(self) -> str:
        """The primary metric."""
        return self.records.metric(self.task)

    @property
    def is_reference(self) -> bool:
        """Whether it is the reference strategy."""
        return self.name == self.records.reference

    def values(self, split: str) -> list[float | None]:
        """Return the primary metric of each seed."""
        return self.records.values(self.name, self.task, split, self.protocol, self.metric)

    def gaps(self) -> list[float | None]:
        """Return the in-domain score minus the external one of each seed."""
        return self.records.generalization_gaps(self.name, self.task, self.protocol, self.metric)

    def mean_cost(self, read: Callable[[Cost], float]) -> float | None:
        """Return a quantity of the standalone cost, mean over seeds."""
        interval = self.records.mean_cost(self.name, self.task, read)
        return None if interval is None else interval.mean

    def ratio(self, read: Callable[[Cost], float]) -> str:
        """Return a quantity of the standalone cost as a percentage of the reference's."""
        own = self.mean_cost(read)
        reference = dataclasses.replace(self, name=self.records.reference or "").mean_cost(read)
        return NONE if own is None or not reference else percent(own / reference)


STANDALONE = "standalone cost of one seed, mean"

COST_COLUMNS: tuple[Column[TaskArm], ...] = (
    Column(
        "adapt TFLOP",
        lambda arm: number(arm.mean_cost(lambda c: (c.flops["dapt"] + c.flops["score"]) / 1e12)),
        STANDALONE,
    ),
    Column(
        "transfer TFLOP", lambda arm: number(arm.mean_cost(lambda c: c.flops["transfer"] / 1e12)), STANDALONE
    ),
    Column("train s", lambda arm: number(arm.mean_cost(lambda c: c.seconds["train"])), STANDALONE),
    Column("wall s", lambda arm: number(arm.mean_cost(lambda c: c.wall_s)), STANDALONE),
    Column("kWh", lambda arm: number(arm.mean_cost(lambda c: c.kwh)), STANDALONE),
    Column("trained parameters", lambda arm: millions(arm.mean_cost(lambda c: c.trainable)), STANDALONE),
)
"""What a strategy costs on its own."""

RATIO_COLUMNS: tuple[Column[TaskArm], ...] = (
    Column("FLOPs", lambda arm: arm.ratio(lambda c: c.total_flops)),
    Column("time", lambda arm: arm.ratio(lambda c: c.wall_s)),
)
"""What a strategy costs against the reference."""


def table(records: Records, task: str) -> Table:
    """Return the scores and costs of a task, and both compared with the reference."""
    arms = [TaskArm(records, task, name, records.protocol(task)) for name in records.strategies]
    rows = arms + [TaskArm(records, task, BASELINE, protocol) for protocol in records.baselines(task)]
    title = Column[TaskArm](
        "strategy", lambda arm: Cell(arm.name, (arm.protocol or "") if arm.name == BASELINE else "")
    )
    against = f"against {records.reference}"
    columns = [title, *_scores(records, task, arms), *COST_COLUMNS]
    columns += [dataclasses.replace(column, group=against) for column in RATIO_COLUMNS]
    columns += [
        _significance(records, task, split, against, name) for split in records.splits(task) for name in TESTS
    ]
    found = Table.of("Scores and cost", columns, rows)
    levels = [chance_level(records, task, split) for split in records.splits(task)]
    if any(level is not None for level in levels):
        of_splits = [Cell(NONE if level is None else f"{level:.3f}") for level in levels]
        rest = [Cell(NONE)] * (len(columns) - len(levels) - 1)
        found.rows.append([Cell("chance"), *of_splits, *rest])
    return dataclasses.replace(found, note=note_of_marks(_note(records, task), found.rows))


def _scores(records: Records, task: str, arms: list[TaskArm]) -> list[Column[TaskArm]]:
    """Return a column for each split, and one for the generalization gap where it is defined."""
    metric, protocol, splits = records.metric(task), records.protocol(task), records.splits(task)
    lowest, group = (
        lower_is_better(metric),
        f"{records.display_name(task, metric)}, {protocol or 'no protocol'}",
    )

    def of_split(split: str, marks: Marks) -> Column[TaskArm]:
        return Column(split, lambda arm: marks.mark(score(mean_interval(arm.values(split))), arm.name), group)

    columns = [
        of_split(
            split,
            UNMARKED
            if records.unlike(task, split)
            else over_seeds({arm.name: arm.values(split) for arm in arms}, lowest),
        )
        for split in splits
    ]
    if {records.in_domain(task), "external"} <= set(splits):
        is_unlike = any(records.unlike(task, split) for split in splits)
        marks = UNMARKED if is_unlike else over_seeds({arm.name: arm.gaps() for arm in arms}, not lowest)
        columns.append(
            Column(
                "generalization gap",
                lambda arm: marks.mark(score(mean_interval(arm.gaps()), signed=True), arm.name),
                group,
            )
        )
    return columns


TESTS = {"paired": paired_t, "Welch": welch_t}
"""Tests against the reference: over the seeds that two arms share, and of their runs as independent ones."""


def _significance(records: Records, task: str, split: str, group: str, name: str) -> Column[TaskArm]:
    tests = comparisons(records, task, split, name)

    def read(arm: TaskArm) -> str:
        return "reference" if arm.is_reference else p_value(tests[arm.name][1] if arm.name in tests else None)

    return Column(f"p {split}, {name}", read, group)


def comparisons(
    records: Records, task: str, split: str, test: str = "paired"
) -> dict[str, tuple[Comparison, float | None]]:
    """Test every strategy against the reference on one split.

    Args:
        records: Records of the study.
        task: Name of the task.
        split: The split.
        test: One of `TESTS`.

    Returns:
        By strategy, the test over seeds and its p adjusted by Holm's method over the strategies; empty where the
        scores cannot be compared.
    """
    reference, protocol, metric = records.reference, records.protocol(task), records.metric(task)
    if reference is None or records.unlike(task, split):
        return {}
    against = records.values(reference, task, split, protocol, metric)
    compare = TESTS[test]
    found = {
        name: tested
        for name in records.strategies
        if name != reference
        and (tested := compare(records.values(name, task, split, protocol, metric), against)) is not None
    }
    adjusted = holm([tested.p for tested in found.values()])
    return {name: (tested, p) for (name, tested), p in zip(found.items(), adjusted, strict=True)}


def _note(records: Records, task: str) -> str:
    """Return notes about missing values in the table."""
    metric, protocol, splits = records.metric(task), records.protocol(task), records.splits(task)
    values = [
        records.values(name, task, split, protocol, metric) for name in records.strategies for split in splits
    ]
    counts = [sum(value is not None for value in each) for each in values]
    notes = []
    bounds = lookup(metric)
    intervals = [found for each in values if (found := mean_interval(each)) is not None]
    if any(
        each.low is not None
        and each.high is not None
        and (
            (bounds.low is not None and each.low < bounds.low)
            or (bounds.high is not None and each.high > bounds.high)
        )
        for each in intervals
    ):
        notes.append(
            f"An interval beyond the range of {bounds.title} says that there are too few seeds for it."
        )
    if score := selection.score_that_read_labels(records, task):
        notes.append(
            f"Development images have chosen the checkpoints, by {score}, which reads their labels: their scores favour "
            "strategies that adapt. Other splits had no say."
        )
    if line := selection.without_choice(records):
        notes.append(line)
    unlike = {split: records.unlike(task, split) for split in splits}
    notes += [f"On {split}: {why}. Nothing is marked or tested." for split, why in unlike.items() if why]
    if max(counts, default=0) == 1:
        notes.append("One seed: no interval and no test.")
    elif len(set(counts)) > 1:
        notes.append(f"Values per cell: {min(counts)} to {max(counts)} seeds.")
    if "external" not in splits:
        notes.append("No external set: no generalization gap.")
    if not records.rows:
        notes.append("The ledger is empty: no costs.")
    return " ".join(notes)
