"""How many seeds a study's margin needs, from the records of an earlier study of the same task."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from dapt_jax.metrics import METRICS
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import CHECKPOINT_MARK
from dapt_jax.runtime import home
from dapt_jax.statistics import Summary, margin_for_seeds, seeds_for_margin, upper_sd
from dapt_jax.statistics.power import MOST_SEEDS, POWER

BOUND = 0.8
"""Confidence of the upper limit of a deviation: see `statistics.upper_sd`."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """How much differences from the reference scatter between seeds, pooled over strategies.

    Attributes:
        sd: Standard deviation of the paired differences, the root of the mean variance.
        seeds: Seeds that it rests on.
        strategies: Strategies that were compared.
        reference: The strategy that they were compared with.
        title: Split and metric, for people.
    """

    sd: float
    seeds: int
    strategies: tuple[str, ...]
    reference: str
    title: str


def spread(records: Records, task: str, metric: str) -> Spread | None:
    """Return the spread of a task's differences; None with fewer than two seeds or strategies.

    Args:
        records: Records of a study.
        task: Task of it.
        metric: Primary metric.
    """
    reference = records.reference
    if reference is None:
        return None
    split = records.deciding_split(task)
    protocol = records.protocol(task)
    against = records.values(reference, task, split, protocol, metric)
    found: dict[str, Summary] = {}
    for name in records.strategies:
        own = records.values(name, task, split, protocol, metric)
        pairs = [a - b for a, b in zip(own, against, strict=True) if a is not None and b is not None]
        summary = Summary.of(pairs) if name != reference and CHECKPOINT_MARK not in name else None
        if summary is not None and summary.n > 1:
            found[name] = summary
    if not found:
        return None
    pooled = math.sqrt(math.fsum(each.sd**2 for each in found.values()) / len(found))
    seeds = min(each.n for each in found.values())
    title = f"{split} {records.display_name(task, metric)}"
    return Spread(pooled, seeds, tuple(found), reference, title)


def line(found: Spread, task: str, margin: float, planned: int, source: str) -> str:
    """Return a line on the seeds that a margin needs and the margin that the planned seeds show.

    Args:
        found: Spread of an earlier study.
        task: Name of the task.
        margin: Margin of non-inferiority; 0 for none.
        planned: Number of seeds of the study.
        source: Where the records are.
    """
    high = upper_sd(found.sd, found.seeds - 1, BOUND)
    parts = []
    if margin:
        needed, most = (seeds_for_margin(margin, sd) for sd in (found.sd, high))
        parts.append(f"{_count(needed)} to show {margin:g} ({_count(most)} if the deviation is {high:.3g})")
    shown, worst = (margin_for_seeds(sd, planned) for sd in (found.sd, high))
    planning = f"{planned} seed{'s' * (planned != 1)}"
    if shown is None or worst is None:
        parts.append(f"the planned {planning} can show no margin")
    else:
        parts.append(f"the planned {planning} can show {shown:.3g} ({worst:.3g})")
    return (
        f"power, {task}: {'; '.join(parts)}. Non-inferiority to {found.reference} in {found.title}, one-sided "
        f"paired t-test over seeds at 0.05, power {POWER:.0%}, no true difference. Differences deviate by "
        f"{found.sd:.3g} from seed to seed ({len(found.strategies)} strategies, {found.seeds} seeds of {source}); "
        f"in brackets by the upper {BOUND:.0%} limit of that."
    )


def _count(seeds: int | None) -> str:
    return f"more than {MOST_SEEDS} seeds" if seeds is None else f"{seeds} seeds"


def lines(
    named: str,
    workdir: Path | None,
    tasks: Sequence[tuple[str, bool]],
    margin: float,
    metric: str,
    planned: int,
) -> list[str]:
    """Return a line on power for every task that an earlier study has records of.

    Args:
        named: Folder of its records, the setting `plan.records`; empty for those in the workdir, if any.
        workdir: Workdir of the study.
        tasks: Names of the tasks that are planned, and whether they are of masks.
        margin: Margin of non-inferiority.
        metric: Primary metric where the records have it.
        planned: Number of planned seeds.

    Raises:
        UserError: The named folder holds no study.
    """
    folder = home.expanded(named) if named else workdir
    if folder is None or not (named or (folder / "results.jsonl").exists()):
        return []
    records = Records.read(folder)
    found = []
    for task, is_of_masks in tasks:
        if task not in records.tasks:
            continue
        present = records.metrics(task)
        own = metric if metric in present else records.metric(task)
        if METRICS[own.partition("/")[0]].of_masks != is_of_masks:
            continue
        if (each := spread(records, task, own)) is not None:
            found.append(line(each, task, margin, planned, str(folder)))
    if named and not found:
        names = ", ".join(task for task, _ in tasks)
        found.append(
            f"power: {named} has {', '.join(records.tasks) or 'no task'}, and no results of {names} with two seeds of a "
            "strategy and of its reference; so nothing is known of the seeds that the margin needs"
        )
    return found
