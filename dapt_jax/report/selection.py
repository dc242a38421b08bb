"""Scores along adaptation: their curves, and how they go with what the checkpoints are worth."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dapt_jax.records.study_records import Records, nice
from dapt_jax.report.style import GREY, looks
from dapt_jax.report.tables import NONE, Cell, Table

AT = "@"
"""Between a strategy and an epoch, in the name of an arm that is one of its checkpoints."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """The scored epochs of one arm.

    Attributes:
        strategy: of the arm.
        seed: of the arm.
        points: as the ledger has them: `epoch`, `share`, `scores`, `chosen` where a rule chose.
    """

    strategy: str
    seed: Any
    points: list[dict[str, Any]]

    def series(self, name: str) -> dict[int, float]:
        """A score by number of epochs, where it is defined."""
        values = {point["epoch"] + 1: point["scores"].get(name) for point in self.points}
        return {epochs: value for epochs, value in values.items() if value is not None}

    @property
    def chosen(self) -> int | None:
        """Epochs of the checkpoint that was chosen."""
        return next((point["epoch"] + 1 for point in self.points if point.get("chosen")), None)


def curves(records: Records) -> list[Curve]:
    """All arms that were scored."""
    return [
        Curve(row.strategy, row.seed, row.curve)
        for row in records.rows
        if row.stage == "score" and any("scores" in point for point in row.curve)
    ]


def names(found: list[Curve]) -> list[str]:
    """The scores that some arm has."""
    return list(dict.fromkeys(name for curve in found for point in curve.points for name in point["scores"]))


def worth(records: Records, curve: Curve, task: str, split: str) -> dict[int, float]:
    """The primary metric of the measured checkpoints of an arm, by number of epochs; empty where none was measured."""
    metric, protocol = records.metric(task), records.protocol(task)
    found = {}
    for row in records.results:
        strategy, at, epochs = row["strategy"].partition(AT)
        wanted = (curve.strategy, curve.seed, task, split, protocol, metric)
        keys = (strategy, *(row[key] for key in ("seed", "task", "split", "protocol", "metric")))
        if at and keys == wanted and row["value"] is not None:
            found[int(epochs)] = row["value"]
    return found


def scores_along(records: Records, task: str) -> Figure | None:
    """Each score by epoch, a panel each, under what the checkpoints are worth on the task; stars are chosen checkpoints."""
    found = curves(records)
    if not found:
        return None
    splits = [split for split in records.splits(task) if any(worth(records, curve, task, split) for curve in found)]
    titles = [*(f"{split} {nice(records.metric(task))}" for split in splits), *names(found)]
    columns = min(4, len(titles))
    lines = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(2.7 * columns + 0.3, 2.2 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, squeeze=False).flat)
    style = looks([name for name in records.strategies if AT not in name])
    for number, (axes, title) in enumerate(zip(panels, titles, strict=False)):
        for curve in found:
            is_worth = number < len(splits)
            values = worth(records, curve, task, splits[number]) if is_worth else curve.series(title)
            colour, _ = style[curve.strategy]
            axes.plot(values.keys(), values.values(), ".-", color=colour, linewidth=1.2, markersize=4)
            if curve.chosen in values:
                axes.plot(curve.chosen, values[curve.chosen], "*", color=colour, markersize=12, markeredgecolor="white")
        axes.set_title(title.replace("_", " "), fontsize=9, fontweight="bold" if number < len(splits) else "normal")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.tick_params(labelsize=7, labelbottom=True)
        axes.ticklabel_format(useOffset=False)
        axes.margins(y=0.15)
        shown = [value for line in axes.get_lines() for value in line.get_ydata()]
        if shown and np.ptp(shown) < 1e-9 * np.abs(shown).max():  # a constant, but for rounding
            axes.set_ylim(shown[0] - 0.5, shown[0] + 0.5)
    for axes in panels[len(titles) :]:
        axes.set_visible(False)
    figure.supxlabel("epochs", fontsize=9, color=GREY)
    return figure


def agreement(records: Records, task: str) -> Table | None:
    """How each score goes with the worth of the checkpoints; None where no checkpoint was measured."""
    found = curves(records)
    splits = [split for split in records.splits(task) if any(worth(records, curve, task, split) for curve in found)]
    if not splits:
        return None
    rows = [
        [
            Cell(name.replace("_", " ")),
            *(cell for split in splits for cell in _agreement(records, found, task, split, name)),
        ]
        for name in names(found)
    ]
    note = (
        "Over the checkpoints of an arm, signs turned so that a score that predicts is positive; mean over seeds. Picked "
        "minus best: what the checkpoint with the best score lost against the best one."
    )
    groups = [("", 1), *((f"{split} {nice(records.metric(task))}", 4) for split in splits)]
    columns = ["score", *["Pearson", "Kendall", "weighted tau", "picked - best"] * len(splits)]
    return Table("Scores against what the checkpoints are worth", columns, rows, groups, note)


def _agreement(records: Records, found: list[Curve], task: str, split: str, name: str) -> list[Cell]:
    # The names of scores for which lower is better; the report reads files alone and knows no code of theirs.
    sign = -1 if name in ("robustness", "alignment", "uniformity") else 1
    values = []
    for curve in found:
        of_score, of_task = curve.series(name), worth(records, curve, task, split)
        shared = sorted(of_score.keys() & of_task.keys())
        score = sign * np.asarray([of_score[epochs] for epochs in shared])
        result = np.asarray([of_task[epochs] for epochs in shared])
        if len(shared) > 2 and all(np.ptp(each) > 1e-9 * np.abs(each).max() for each in (score, result)):
            pearson, kendall, weighted = (
                measure(score, result)[0]
                for measure in (scipy.stats.pearsonr, scipy.stats.kendalltau, scipy.stats.weightedtau)
            )
            values.append((pearson, kendall, weighted, result[score.argmax()] - result.max()))
    if not values:
        return [Cell(NONE)] * 4
    means = np.mean(values, 0)
    return [Cell(f"{value:+.2f}") for value in means[:3]] + [Cell(f"{means[3]:+.3f}")]
