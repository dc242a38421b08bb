"""Tables of all metrics, protocols and classes of a task, and of the total cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from dapt_jax.cost.hardware import utilisation
from dapt_jax.formatting import NONE, number, percent
from dapt_jax.metrics import lookup, lower_is_better
from dapt_jax.records.ledger import Row
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import BASELINE, KINDS, STAGES
from dapt_jax.report.chance import chance_level
from dapt_jax.report.columns import Cell, Column, Table, compact
from dapt_jax.report.marks import UNMARKED, note_of_marks, over_seeds
from dapt_jax.statistics import mean_interval

MOST_CLASSES = 50
"""Classes that the table of classes shows; of more, it shows the weakest."""


def everything(records: Records, task: str) -> Table:
    """Return every protocol and metric of a task, by strategy and split."""
    return _by_protocol(
        records,
        task,
        "Every protocol and metric",
        {records.display_name(task, name): name for name in records.metrics(task)},
    )


def per_class(records: Records, task: str) -> Table | None:
    """Return a score of each class, by protocol, strategy and split.

    The metric is the primary one if it has scores by class, else the first such metric.

    Returns:
        The table; None without scores by class.
    """
    metric = records.metric_by_class(task)
    if metric is None:
        return None
    labels = {label: f"{metric}/{label}" for label in records.classes(task, metric)}
    what = "One class against the rest; mean" if metric in ("auc", "ap") else "Mean"
    if (count := len(labels)) > MOST_CLASSES:
        labels = _weakest(records, task, labels, lower_is_better(metric))
        what = (
            f"The {MOST_CLASSES} of {count:,} classes with the weakest means; results.jsonl holds all. {what}"
        )
    kind = "class of pixels" if lookup(metric).of_masks else "class"
    return _by_protocol(records, task, f"{records.display_name(task, metric)} by {kind}", labels, what)


def _weakest(records: Records, task: str, labels: dict[str, str], lowest_is_best: bool) -> dict[str, str]:
    """Return the classes with the weakest means over strategies, seeds and splits, in their order."""
    protocol, splits = records.protocol(task), records.splits(task)

    def mean(metric: str) -> float:
        found = [
            records.values(n, task, split, protocol, metric) for n in records.strategies for split in splits
        ]
        known = [value for values in found for value in values if value is not None]
        return float(np.mean(known)) if known else math.inf

    signed = {label: (-1 if lowest_is_best else 1) * mean(metric) for label, metric in labels.items()}
    chosen = set(sorted(signed, key=lambda label: signed[label])[:MOST_CLASSES])
    return {label: metric for label, metric in labels.items() if label in chosen}


def _by_protocol(
    records: Records, task: str, title: str, metrics: dict[str, str], what: str = "Mean"
) -> Table:
    """Return metrics by heading on every split.

    Rows are grouped by protocol; within a protocol, strategies precede baselines.
    """
    pairs = [(metric, split) for metric in metrics.values() for split in records.splits(task)]
    names, rows = records.strategies, []
    unmarked: list[str] = []
    for protocol in records.protocols(task):
        values = {
            (metric, split): {n: records.values(n, task, split, protocol, metric) for n in names}
            for metric, split in pairs
        }
        unlike = {pair: records.unlike(task, pair[1], pair[0], protocol) for pair in pairs}
        unmarked += [f"{protocol}, {split}: {why}" for (_, split), why in unlike.items() if why]
        marks = {
            pair: UNMARKED if unlike[pair] else over_seeds(values[pair], lower_is_better(pair[0]))
            for pair in pairs
        }
        for name in names:
            cells = [marks[pair].mark(compact(mean_interval(values[pair][name])), name) for pair in pairs]
            if any(cell.text != NONE for cell in cells):
                rows.append([Cell(protocol), Cell(name), *cells])
    for protocol in records.every_baseline(task):
        means = [
            mean_interval(records.values(BASELINE, task, split, protocol, metric)) for metric, split in pairs
        ]
        if any(means):
            rows.append([Cell(protocol), Cell(BASELINE), *map(compact, means)])
    chance = [chance_level(records, task, split, metric) for metric, split in pairs]
    if any(level is not None for level in chance):
        rows.append(
            [Cell(""), Cell("chance"), *[Cell(NONE if each is None else f"{each:.3f}") for each in chance]]
        )
    columns: list[Column[list[Cell]]] = [_at(0, "protocol"), _at(1, "strategy")]
    for heading in metrics:
        columns += [_at(len(columns) + k, split, heading) for k, split in enumerate(records.splits(task))]
    note = note_of_marks(f"{what} over seeds ± half the 95% t-interval.", rows)
    if unmarked:
        note += f" Not marked: {unmarked[0]}"
        note += f"; and {len(unmarked) - 1} more columns likewise." if len(unmarked) > 1 else "."
    return Table.of(title, columns, rows, note)


def _at(index: int, title: str, group: str = "") -> Column[list[Cell]]:
    """Return a column of existing cells."""
    return Column(title, lambda row: row[index], group)


INTENSITY_COLUMNS: tuple[Column[tuple[str, Mapping[str, Any]]], ...] = (
    Column("set", lambda each: each[0]),
    Column("range by", lambda each: str(each[1]["origin"])),
    Column("images", lambda each: f"{each[1]['images']:,}"),
    Column("black", lambda each: _ends(each[1]["low"])),
    Column("white", lambda each: _ends(each[1]["high"])),
    Column("first image", lambda each: PurePath(each[1]["example"]).name),
)
"""How the images of each set got their intensity range."""


def _ends(pair: Sequence[float]) -> str:
    return f"{pair[0]:g}" if pair[0] == pair[1] else f"{pair[0]:g} to {pair[1]:g}"


def intensity_ranges(by_set: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table | None:
    """Return which values are black and white in the images of each set, and why; None without records.

    Args:
        by_set: Rows of `dapt_jax.records.intensities` by the name of the set.
    """
    rows = [(name, row) for name, of_set in by_set.items() for row in of_set]
    note = (
        "Values of the files that are shown as black and white; where files differ, the least and the most."
    )
    return Table.of("How intensities were read", INTENSITY_COLUMNS, rows, note) if rows else None


@dataclasses.dataclass(frozen=True)
class StageTotal:
    """A row of the table of total cost.

    Attributes:
        name: Name of the stage; "all".
        rows: Ledger rows of the stage.
    """

    name: str
    rows: Sequence[Row]

    def sum(self, name: str) -> float:
        """Return the sum of a field of the ledger."""
        return sum(getattr(row, name) for row in self.rows)

    @property
    def other_s(self) -> float:
        """Seconds that belong to no kind."""
        return max(0.0, self.sum("wall_s") - sum(self.sum(f"{kind}_s") for kind in KINDS))


def _seconds(kind: str) -> Column[StageTotal]:
    return Column(kind, lambda total: number(total.sum(f"{kind}_s")), "seconds")


TOTAL_COLUMNS: tuple[Column[StageTotal], ...] = (
    Column("stage", lambda total: total.name),
    *map(_seconds, KINDS),
    Column("other", lambda total: number(total.other_s), "seconds"),
    _seconds("wall"),
    _seconds("reused"),
    Column("model", lambda total: number(total.sum("model_flops") / 1e12), "TFLOP"),
    Column(
        "recomputed, padding",
        lambda total: number(max(0.0, (total.sum("hardware_flops") - total.sum("model_flops")) / 1e12)),
        "TFLOP",
    ),
    Column("reused", lambda total: number(total.sum("reused_flops") / 1e12), "TFLOP"),
    Column("kWh", lambda total: number(total.sum("energy_kwh"))),
    Column("MFU", lambda total: percent(utilised(total.rows, "model_flops")), "of peak"),
    Column("HFU", lambda total: percent(utilised(total.rows, "hardware_flops")), "of peak"),
)
"""What a study has cost, by stage."""


def totals(records: Records) -> Table:
    """Return the total cost by stage: work that was run, and work reused from a cache."""
    stages = [stage for stage in STAGES if any(row.stage == stage for row in records.rows)]
    rows = [StageTotal(stage, [row for row in records.rows if row.stage == stage]) for stage in stages]
    note = (
        "Sums over all arms of what was run; reused is what arms took from activations another arm had "
        "computed. "
        "Recomputed, padding: what ran beyond the model's FLOPs, such as the filling of last batches. "
        "MFU and HFU: model and hardware FLOPs per second of training and cache filling, over the devices' "
        "peak."
    )
    if not any(row.peak_flops for row in records.rows):
        note += " The devices' peak is not known here."
    return Table.of("Total cost", TOTAL_COLUMNS, [*rows, StageTotal("all", records.rows)], note)


def utilised(rows: Sequence[Row], kind: str) -> float | None:
    """Return model or hardware FLOPs utilisation over rows with known peak FLOP/s; None without any."""
    known = [row for row in rows if row.peak_flops]
    most = sum((row.train_s + row.cache_s) * row.peak_flops for row in known)
    return utilisation(sum(getattr(row, kind) for row in known), most, 1.0)
