"""Transferability scores along adaptation: curves, and agreement with downstream scores."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import scipy
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dapt_jax.formatting import NONE
from dapt_jax.metrics import lower_is_better
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import CHECKPOINT_MARK
from dapt_jax.report.columns import Column, Table
from dapt_jax.report.style import GREY, strategy_styles


@dataclasses.dataclass(frozen=True)
class Curve:
    """The scored epochs of one arm.

    Attributes:
        strategy: Strategy of the arm.
        seed: Seed of the arm.
        points: Points of the ledger: `epoch`, `share`, `scores`, `higher_is_better`, and `chosen` where a
            rule has chosen.
    """

    strategy: str
    seed: Any
    points: list[dict[str, Any]]

    def series(self, name: str) -> dict[int, float]:
        """Return a score by number of epochs, where it is defined."""
        values = {point["epoch"] + 1: point["scores"].get(name) for point in self.points}
        return {epochs: value for epochs, value in values.items() if value is not None}

    def higher_is_better(self, name: str) -> bool | None:
        """Return the direction of a score from the ledger; None where missing or inconsistent."""
        found = {
            point.get("higher_is_better", {}).get(name) for point in self.points if name in point["scores"]
        }
        return found.pop() if len(found) == 1 else None

    @property
    def chosen(self) -> int | None:
        """Epochs of the checkpoint that was chosen."""
        return next((point["epoch"] + 1 for point in self.points if point.get("chosen")), None)


def curves(records: Records) -> list[Curve]:
    """Return the curves of all arms that were scored."""
    return [
        Curve(row.strategy, row.seed, points)
        for row in records.rows
        if row.stage == "score" and (points := [point for point in row.curve if "scores" in point])
    ]


def names(found: list[Curve]) -> list[str]:
    """Return the scores of any arm."""
    return list(dict.fromkeys(name for curve in found for point in curve.points for name in point["scores"]))


def downstream_scores(records: Records, curve: Curve, task: str, split: str) -> dict[int, float]:
    """Return the primary metric of the measured checkpoints of an arm, by number of epochs."""
    metric, protocol = records.metric(task), records.protocol(task)
    found = {}
    for row in records.results:
        strategy, at, epochs = row["strategy"].partition(CHECKPOINT_MARK)
        wanted = (curve.strategy, curve.seed, task, split, protocol, metric)
        keys = (strategy, *(row[key] for key in ("seed", "task", "split", "protocol", "metric")))
        if at and epochs.isdecimal() and keys == wanted and row["value"] is not None:
            found[int(epochs)] = row["value"]
    return found


def score_that_read_labels(records: Records, task: str) -> str:
    """Return the score by which labels of a task's development images chose checkpoints; empty where none did."""
    config = records.config
    score = (config.get("checkpoint_selection") or {}).get("score", "")
    of = (config.get("checkpoint_scoring") or {}).get("task") or next(iter(config.get("tasks") or ()), "")
    points = [point for curve in curves(records) for point in curve.points if point.get("chosen")]
    chose = [each for each in points if each["scores"].get(score) is not None]
    return score if of == task and any(each.get("reads_labels", {}).get(score) for each in chose) else ""


def without_choice(records: Records) -> str:
    """Return a sentence on the arms whose last checkpoint counts since no epoch had a score; empty without any."""
    score = (records.config.get("checkpoint_selection") or {}).get("score", "")
    found = dict.fromkeys(
        f"{curve.strategy} seed {curve.seed}"
        for curve in curves(records)
        if curve.chosen is not None and not curve.series(score)
    )
    if not found:
        return ""
    return f"Of {', '.join(found)} the last checkpoint counts: {score} was undefined at every scored epoch."


def lower_is_better_words(records: Records) -> str:
    """Return the names of lower-is-better scores, as part of a sentence; empty without any."""
    found = curves(records)
    lower = [name for name in names(found) if any(curve.higher_is_better(name) is False for curve in found)]
    return f"; lower is better of {', '.join(lower)}" if lower else ""


def scores_along(records: Records, task: str) -> Figure | None:
    """Draw the downstream scores and each transferability score by epoch, one panel each.

    Stars mark the chosen checkpoints.
    """
    found = curves(records)
    if not found:
        return None
    splits = [
        split
        for split in records.splits(task)
        if any(downstream_scores(records, curve, task, split) for curve in found)
    ]
    titles = [
        *(f"{split} {records.display_name(task, records.metric(task))}" for split in splits),
        *names(found),
    ]
    columns = min(4, len(titles))
    lines = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(2.7 * columns + 0.3, 2.2 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, squeeze=False).flat)
    style = strategy_styles([name for name in records.strategies if CHECKPOINT_MARK not in name])
    for number, (axes, title) in enumerate(zip(panels, titles, strict=False)):
        for curve in found:
            is_downstream = number < len(splits)
            values = (
                downstream_scores(records, curve, task, splits[number])
                if is_downstream
                else curve.series(title)
            )
            colour, _ = style[curve.strategy]
            axes.plot(values.keys(), values.values(), ".-", color=colour, linewidth=1.2, markersize=4)
            if curve.chosen in values:
                axes.plot(
                    curve.chosen,
                    values[curve.chosen],
                    "*",
                    color=colour,
                    markersize=12,
                    markeredgecolor="white",
                )
        axes.set_title(
            title.replace("_", " "), fontsize=9, fontweight="bold" if number < len(splits) else "normal"
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.tick_params(labelsize=7, labelbottom=True)
        axes.ticklabel_format(useOffset=False)
        axes.margins(y=0.15)
        shown = [value for line in axes.get_lines() for value in line.get_ydata()]
        if shown and np.ptp(shown) < 1e-9 * np.abs(shown).max():  # constant up to rounding
            axes.set_ylim(shown[0] - 0.5, shown[0] + 0.5)
    for axes in panels[len(titles) :]:
        axes.set_visible(False)
    figure.supxlabel("epochs", fontsize=9, color=GREY)
    return figure


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of a transferability score with downstream scores over the checkpoints of an arm, by seed.

    Attributes:
        pearson: Pearson's correlation, positive where the score predicts.
        kendall: Kendall's tau, with the same sign.
        weighted: Weighted tau, with the same sign.
        selected: Downstream score of the checkpoint with the best transferability score, minus the best
            downstream score: 0 where the score finds the best, otherwise on the worse side.
    """

    pearson: tuple[float, ...]
    kendall: tuple[float, ...]
    weighted: tuple[float, ...]
    selected: tuple[float, ...]


def _over_seeds(values: tuple[float, ...], digits: int) -> str:
    """Return the mean, and of several values the least and the greatest.

    >>> _over_seeds((0.5,), 2), _over_seeds((0.5, -0.25), 2)
    ('+0.50', '+0.12 (-0.25 to +0.50)')
    """
    mean, least, greatest = (f"{of(values):+.{digits}f}" for of in (np.mean, min, max))
    return f"{mean} ({least} to {greatest})" if len(values) > 1 else mean


AGREEMENT_COLUMNS: tuple[Column[Agreement], ...] = (
    Column("Pearson", lambda each: _over_seeds(each.pearson, 2)),
    Column("Kendall", lambda each: _over_seeds(each.kendall, 2)),
    Column("weighted tau", lambda each: _over_seeds(each.weighted, 2)),
    Column("selected - best", lambda each: _over_seeds(each.selected, 3)),
)
"""What the table of agreement shows of a score, on each split."""


def agreement(records: Records, task: str) -> Table | None:
    """Return the agreement of each score with downstream scores; None without measured checkpoints."""
    found = curves(records)
    splits = [
        split
        for split in records.splits(task)
        if any(downstream_scores(records, curve, task, split) for curve in found)
    ]
    if not splits:
        return None
    metric = records.display_name(task, records.metric(task))

    def on(split: str, column: Column[Agreement]) -> Column[str]:
        by_score = {name: _agreement(records, found, task, split, name) for name in names(found)}
        return Column(
            column.title,
            lambda name: NONE if (each := by_score[name]) is None else column.read(each),
            f"{split} {metric}",
        )

    columns = [Column[str]("score", lambda name: name.replace("_", " "))]
    columns += [on(split, column) for split in splits for column in AGREEMENT_COLUMNS]
    note = (
        "Over the checkpoints of an arm, signs turned so that a score that predicts is positive; mean over "
        "seeds, and the least and the greatest of a seed. Selected minus best: "
        "what the checkpoint with the best transferability score lost against the best one."
    )
    if any(curve.higher_is_better(name) is None for curve in found for name in curve.points[-1]["scores"]):
        note += " Scores whose direction the ledger does not record, as of earlier versions, are left out."
    return Table.of("Transferability scores against downstream scores", columns, names(found), note)


def _agreement(records: Records, found: list[Curve], task: str, split: str, name: str) -> Agreement | None:
    """Return the agreement of a score in each arm with its direction known and three or more checkpoints."""
    values = []
    for curve in found:
        of_score, of_task = curve.series(name), downstream_scores(records, curve, task, split)
        shared = sorted(of_score.keys() & of_task.keys())
        higher_is_better = curve.higher_is_better(name)
        if len(shared) < 3 or higher_is_better is None:
            continue
        score = np.asarray([of_score[epochs] for epochs in shared]) * (1 if higher_is_better else -1)
        measured = np.asarray([of_task[epochs] for epochs in shared])
        result = -measured if lower_is_better(records.metric(task)) else measured
        if all(np.ptp(each) > 1e-9 * np.abs(each).max() for each in (score, result)):
            pearson, kendall, weighted = (
                measure(score, result)[0]
                for measure in (scipy.stats.pearsonr, scipy.stats.kendalltau, scipy.stats.weightedtau)
            )
            selected = measured[score.argmax()] - measured[result.argmax()]
            values.append((pearson, kendall, weighted, float(selected)))
    return Agreement(*zip(*values, strict=True)) if values else None
