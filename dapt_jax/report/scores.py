"""The page of `mode=score`: ranking of checkpoints, correlation with downstream scores; without JAX."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from dapt_jax.formatting import NONE, number
from dapt_jax.metrics import display_name
from dapt_jax.records.scores import Correlation, Ranked, Scores
from dapt_jax.report import page
from dapt_jax.report.columns import Cell, Column, Table
from dapt_jax.report.figures import slug
from dapt_jax.report.pictures import picture
from dapt_jax.report.style import COLOURS, GREY, STYLE, save

SHOWN = 12
"""Largest number of variants in a table of values and in a figure; the rest are in the records."""

HOW_TO_READ = (
    "Nothing was trained. A value's 95% interval comes from random halves of the images, drawn by patient and "
    "within classes without replacement, whose spread is that of a bootstrap over patients; robustness keeps "
    "the negatives of the whole set. A rank is 1 for the best checkpoint, and its interval is that of the "
    "ranks on the same halves: overlapping intervals mean that these images cannot tell two checkpoints apart. "
    "Kendall's tau-b and Spearman's rank correlation are positive where the score predicts the downstream "
    "score; the interval of tau covers the sampling of the images, not that of the checkpoints. Selected "
    "minus best: downstream score of the checkpoint with the best score, less that of the best checkpoint."
)


def build(folder: Path, scores: Scores, title: str) -> None:
    """Write report.md, report.html and figures of the scores of a workdir.

    Args:
        folder: Folder of the page.
        scores: The scores.
        title: Title of the study.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for task, split in scores.sets:
            shown = _shown(scores, task, split)
            path = save(_figure(scores, task, split, shown), folder / f"scores_{slug(task)}_{split}.png")
            caption = (
                "Each score by checkpoint, with its 95% interval; filled: the best. The title says which way "
                "is better, and Kendall's tau with downstream scores where they are known."
            )
            tables = [_values(scores, task, split, shown), _ranking(scores, task, split)]
            found = [*tables, *_correlations(scores, task, split)]
            sections.append(
                {
                    "title": f"{task}, {split}",
                    "words": _words(scores, task, split),
                    "figures": [picture(path, folder, caption)],
                    "tables": found,
                }
            )
    undefined = [row for row in scores.rows if row["value"] is None]
    reasons = dict.fromkeys(f"{row['score']}: {row['reason']}" for row in undefined)
    view = {
        "title": f"Scores of checkpoints: {title}",
        "lead": [
            f"{len(scores.checkpoints)} checkpoints, {len(scores.sets)} sets, {len(scores.variants)} variants of "
            "scores. All values are in scores.jsonl."
        ],
        "warnings": [f"{len(undefined)} undefined values. {'; '.join(reasons)}."] if undefined else [],
        "sections": sections,
        "how_to_read": HOW_TO_READ,
    }
    page.render(folder, "page", view)


def _splits(scores: Scores, task: str) -> list[str]:
    return list(dict.fromkeys(each.split for each in scores.downstream if each.task == task))


def _tau(scores: Scores, task: str, split: str, variant: str) -> dict[str, Correlation]:
    found = {on: scores.correlation(task, split, variant, on) for on in _splits(scores, task)}
    return {on: each for on, each in found.items() if each is not None}


def _shown(scores: Scores, task: str, split: str) -> list[str]:
    """Return the variants of the table of values: the first, then those that agree best with downstream."""
    if len(scores.variants) <= SHOWN:
        return scores.variants

    def agreement(variant: str) -> float:
        found = _tau(scores, task, split, variant)
        return max((each.kendall.mean for each in found.values()), default=-math.inf)

    by_agreement = sorted(scores.variants[1:], key=lambda variant: -agreement(variant))
    chosen = {scores.variants[0], *by_agreement[: SHOWN - 1]}
    return [variant for variant in scores.variants if variant in chosen]


def _words(scores: Scores, task: str, split: str) -> str:
    """Return which checkpoint the first variant ranks first, and what it is worth where that is known."""
    variant = scores.variants[0]
    ranking = scores.ranking(task, split, variant)
    if not ranking or ranking[0].rank is None:
        return f"{variant} is undefined for every checkpoint."
    best = ranking[0].row["checkpoint"]
    equal = [each.row["checkpoint"] for each in ranking if each.row["value"] == ranking[0].row["value"]]
    rivals = [
        each.row["checkpoint"]
        for each in ranking[len(equal) :]
        if each.low is not None and ranking[0].high is not None and each.low <= ranking[0].high
    ]
    words = f"By {variant}, {best} is the best of {len(ranking)} checkpoints"
    if len(equal) > 1:
        level = ranking[0].row["variant"].get("level")
        words = (
            f"By {variant}, {', '.join(equal[:6])}{' and others' if len(equal) > 6 else ''} are the best of "
            f"{len(ranking)} checkpoints with the same value to the last digit: it sees nothing in which they differ"
        ) + (f" (scoring.levels={level}; 1 is the encoder's last)" if level else "")
    if rivals:
        words += f"; on these images it cannot be told from {', '.join(rivals[:6])}"
        words += " and others" if len(rivals) > 6 else ""
    for on, found in _tau(scores, task, split, variant).items():
        metric = next(each.metric for each in scores.downstream if (each.task, each.split) == (task, on))
        words += (
            f". Against {on} {metric}: tau {found.kendall.mean:+.2f}, selected minus best {found.loss:+.3f}"
        )
    return words + "."


def _cell(ranked: Ranked) -> Cell:
    if ranked.interval is None:
        return Cell(NONE)
    low, high = ranked.interval.low, ranked.interval.high
    small = "" if low is None or high is None else f"[{number(low)}, {number(high)}]"
    return Cell(number(ranked.interval.mean, 4), small, best=ranked.rank == 1)


def _values(scores: Scores, task: str, split: str, shown: list[str]) -> Table:
    """Return the values by checkpoint and variant, beside the downstream scores."""
    by_variant = {
        variant: {each.row["checkpoint"]: each for each in scores.ranking(task, split, variant)}
        for variant in shown
    }
    columns = [Column[str]("checkpoint", lambda name: name)]
    for on in _splits(scores, task):
        known = {e.checkpoint: e for e in scores.downstream if (e.task, e.split) == (task, on)}
        first = next(iter(known.values()))
        protocol, _, metric = first.metric.rpartition(" ")
        heading = f"{on} {display_name(metric) if protocol else metric}"

        def read(name: str, known: dict[str, Any] = known) -> str:
            return f"{known[name].value:.3f}" if name in known else NONE

        columns.append(Column(heading, read, "downstream"))
    for variant in shown:
        found = by_variant[variant]
        row = next(iter(found.values())).row
        way = "higher is better" if row["higher_is_better"] else "lower is better"

        def value(name: str, found: dict[str, Ranked] = found) -> Cell:
            return _cell(found[name])

        columns.append(Column(f"{variant.replace('_', ' ')}, {way}", value, "scores"))
    left = len(scores.variants) - len(shown)
    note = ""
    if left:
        note = (
            f"{left} further variants are in scores.jsonl; shown are the first and those that agree best with "
            "the downstream scores here, which says nothing of other checkpoints."
        )
    return Table.of("Values", columns, scores.checkpoints, f"Bold: the best of each score. {note}".strip())


def _ranking(scores: Scores, task: str, split: str) -> Table:
    """Return the ranking by the first variant, and the mean rank over all."""
    rankings = {variant: scores.ranking(task, split, variant) for variant in scores.variants}
    all_ranks: dict[str, list[float]] = {name: [] for name in scores.checkpoints}
    for ranking in rankings.values():
        for each in ranking:
            if each.rank is not None:
                all_ranks[each.row["checkpoint"]].append(each.rank)
    first = scores.variants[0]

    def rank(each: Ranked) -> Cell:
        if each.rank is None:
            return Cell(NONE)
        small = "" if each.low is None else f"[{each.low:g}, {each.high:g}]"
        return Cell(f"{each.rank:g}", small, best=each.rank == 1)

    def mean(each: Ranked) -> str:
        found = all_ranks[each.row["checkpoint"]]
        return f"{np.mean(found):.1f}" if found else NONE

    columns = [
        Column[Ranked]("checkpoint", lambda each: each.row["checkpoint"]),
        Column("rank", rank, first.replace("_", " ")),
        Column("value", _cell, first.replace("_", " ")),
        Column("mean rank", mean, f"all {len(scores.variants)} variants"),
    ]
    note = "Rank with its 95% interval over halves of the images."
    return Table.of(f"Ranking by {first.replace('_', ' ')}", columns, rankings[first], note)


def _correlations(scores: Scores, task: str, split: str) -> list[Table]:
    """Return the agreement of each variant with downstream scores; none where fewer than three are known."""
    by_variant = {variant: _tau(scores, task, split, variant) for variant in scores.variants}
    splits = [on for on in _splits(scores, task) if any(on in found for found in by_variant.values())]
    if not splits:
        return []

    def on(name: str, read: Any) -> Any:
        return lambda variant: read(by_variant[variant][name]) if name in by_variant[variant] else NONE

    def tau(found: Correlation) -> Cell:
        low, high = found.kendall.low, found.kendall.high
        return Cell(f"{found.kendall.mean:+.2f}", "" if low is None else f"[{low:+.2f}, {high:+.2f}]")

    columns = [Column[str]("score", lambda variant: variant.replace("_", " "))]
    for name in splits:
        metric = next(each.metric for each in scores.downstream if (each.task, each.split) == (task, name))
        group = f"{name} {metric}"
        columns += [
            Column("Kendall", on(name, tau), group),
            Column("Spearman", on(name, lambda found: f"{found.spearman:+.2f}"), group),
            Column("selected - best", on(name, lambda found: f"{found.loss:+.3f}"), group),
        ]
    count = max(found.n for each in by_variant.values() for found in each.values())
    note = f"Over {count} checkpoints with known downstream scores."
    return [Table.of("Rank correlation with downstream scores", columns, scores.variants, note)]


def _figure(scores: Scores, task: str, split: str, shown: list[str]) -> Figure:
    """Draw each shown variant by checkpoint, one panel each."""
    columns = min(4, len(shown))
    lines = math.ceil(len(shown) / columns)
    names = scores.checkpoints
    figure = Figure(figsize=(3.1 * columns + 1.2, (0.24 * len(names) + 1.1) * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    places = {name: len(names) - 1 - place for place, name in enumerate(names)}
    for axes, variant in zip(panels, shown, strict=False):
        ranking = scores.ranking(task, split, variant)
        for each in ranking:
            if each.interval is None:
                continue
            y, found = places[each.row["checkpoint"]], each.interval
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [y, y], color=GREY, linewidth=1.2, zorder=1)
            face = COLOURS[0] if each.rank == 1 else "white"
            axes.plot(found.mean, y, "o", color=COLOURS[0], markerfacecolor=face, markersize=5)
        arrow = "→" if ranking[0].row["higher_is_better"] else "←"
        taus = [f"τ {c.kendall.mean:+.2f} {on}" for on, c in _tau(scores, task, split, variant).items()]
        axes.set_title("\n".join([f"{variant.replace('_', ' ')} {arrow}", *taus]), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.locator_params(axis="x", nbins=4)
    panels[0].set_yticks(list(places.values()), list(places))
    panels[0].set_ylim(-0.6, len(names) - 0.4)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    return figure
