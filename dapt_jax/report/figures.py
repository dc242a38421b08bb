"""The figures of a report, with a colour-blind-safe colour and a marker per strategy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from dapt_jax.metrics import lookup, lower_is_better
from dapt_jax.records.overlays import SegmentationSamples
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import KINDS
from dapt_jax.report import masks, selection
from dapt_jax.report.chance import chance_level
from dapt_jax.report.curves import learning_curves, spectrum_curves
from dapt_jax.report.style import GREY, INK, STYLE, save, strategy_styles
from dapt_jax.statistics import Interval, mean_interval, pareto

# Seconds by kind: train stands out, overheads are quieter.
KIND_COLOURS = {
    "train": "#0072B2",
    "compile": "#E69F00",
    "data": "#009E73",
    "eval": "#56B4E9",
    "checkpoint": "#CC79A7",
    "cache": "#8C6D31",
    "other": "#BBBBBB",
}
REUSED: dict[str, Any] = {"facecolor": "white", "edgecolor": GREY, "hatch": "////", "linewidth": 0.8}


def draw(
    records: Records, samples: Sequence[SegmentationSamples], folder: Path
) -> list[tuple[str, Path, str]]:
    """Draw every figure for which the records have data.

    Args:
        records: Records of the study.
        samples: Images with predicted masks, if any.
        folder: Folder of the PNG files.

    Returns:
        `(task or "", path, caption)` of each, in reading order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made: list[tuple[str, Path, str]] = []

    def keep(task: str, name: str, figure: Figure | None, caption: str) -> None:
        if figure is not None:
            made.append((task, save(figure, folder / f"{name}.png"), caption))

    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for task in records.tasks:
            metric, named = records.display_name(task, records.metric(task)), slug(task)
            keep(
                task,
                f"cost_score_{named}",
                cost_score(records, task),
                f"Standalone model FLOPs of one arm against {metric}. Faint: single seeds. Solid: mean with "
                "95% "
                "t-interval. Line: the strategies that no other beats on both axes.",
            )
            keep(
                task,
                f"seeds_{named}",
                seeds(records, task),
                f"{metric} of each seed on {records.in_domain(task)} and external data; the bold line is "
                "the mean. A steep line means a large generalization gap.",
            )
            keep(
                task,
                f"scores_along_{named}",
                selection.scores_along(records, task),
                f"Above and first, where checkpoints were measured: their {metric}. Then each "
                "transferability score by "
                f"epoch{selection.lower_is_better_words(records)}. Stars: the checkpoint that the rule "
                "chose.",
            )
            for (split, protocol), of_split in masks.by_split(samples, task).items():
                keep(
                    task,
                    f"masks_{named}_{split}_{protocol}",
                    masks.overlays(of_split, records.strategies),
                    "Outlines of the true masks (top row) and of those that each strategy's network drew, "
                    f"{protocol}, "
                    f"{split} images, first seed and fold; below each, the Dice of "
                    f"{' / '.join(of_split[0].segments[1:])}.",
                )
        keep(
            "",
            "learning_curves",
            learning_curves(records),
            "Loss of adaptation by epoch: training solid, validation dashed, single seeds faint. "
            "Dotted lines mark where a phase ends and another begins.",
        )
        keep(
            "",
            "feature_spectrum",
            spectrum_curves(records),
            "Features of the corpus by epoch of label-free adaptation, without labels. A network that collapses "
            "loses rank: below half of RankMe before training the run warns.",
        )
        keep(
            "",
            "time",
            time_bars(records),
            "Where the wall time of one arm goes, mean over seeds. Hatched: what the arm took from "
            "activations that "
            "another arm had computed, and would have spent on its own.",
        )
    return made


def cost_score(records: Records, task: str) -> Figure | None:
    """Draw cost against score, one panel per split (in-domain, external)."""
    splits = [split for split in (records.in_domain(task), "external") if split in records.splits(task)]
    metric, protocol = records.metric(task), records.protocol(task)
    style = strategy_styles(records.strategies)
    points: dict[str, dict[str, tuple[float, list[tuple[float, float]]]]] = {split: {} for split in splits}
    for split in splits:
        for name in records.strategies:
            costs = records.costs(name, task)
            values = dict(
                zip(records.seeds, records.values(name, task, split, protocol, metric), strict=True)
            )
            pairs = [
                (cost.total_flops / 1e12, value)
                for seed, cost in costs.items()
                if (value := values.get(seed)) is not None and math.isfinite(value)
            ]
            if pairs:
                points[split][name] = (sum(cost for cost, _ in pairs) / len(pairs), pairs)
    if not any(points.values()):
        return None
    figure = Figure(figsize=(4.9 * len(splits), 4.2), layout="constrained")
    every = [cost for by_name in points.values() for cost, _ in by_name.values()]
    log = min(every) > 0 and max(every) / min(every) > 8
    for axes, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits, strict=True):
        labels = []
        for name, (cost, pairs) in points[split].items():
            colour, marker = style[name]
            interval = mean_interval([value for _, value in pairs])
            assert interval is not None
            axes.scatter(
                *zip(*pairs, strict=True), s=20, color=colour, marker=marker, alpha=0.45, linewidths=0
            )
            if interval.half is not None:
                axes.errorbar(
                    cost, interval.mean, yerr=interval.half, color=colour, linewidth=1.3, capsize=2.5
                )
            axes.plot(
                cost,
                interval.mean,
                marker=marker,
                color=colour,
                markersize=8,
                markeredgecolor="white",
                zorder=5,
            )
            labels.append((cost, interval, name, colour))
        sign = -1 if lower_is_better(metric) else 1
        front = pareto([label[0] for label in labels], [sign * label[1].mean for label in labels])
        axes.plot(
            [labels[i][0] for i in front],
            [labels[i][1].mean for i in front],
            color=GREY,
            linewidth=1,
            zorder=1,
        )
        if log:
            axes.set_xscale("log")
        axes.margins(x=0.14, y=0.1)
        axes.set_title(split)
        axes.set_xlabel("TFLOP per arm, standalone" + (" (log scale)" if log else ""))
        axes.set_ylabel(f"{records.display_name(task, metric)} ({protocol})")
        if (
            lookup(metric).high == 1 and axes.get_ylim()[1] > 1
        ):  # an interval can exceed the bound of the metric
            axes.set_ylim(top=1.003)
        _mark_chance([axes], chance_level(records, task, split))
        _label(figure, axes, labels)
    return figure


def seeds(records: Records, task: str) -> Figure | None:
    """Draw in-domain and external score of each seed, joined, one panel per strategy."""
    metric, protocol, own = records.metric(task), records.protocol(task), records.in_domain(task)
    pairs = {}
    for name in records.strategies:
        both = [records.values(name, task, split, protocol, metric) for split in (own, "external")]
        known = [(a, b) for a, b in zip(*both, strict=True) if a is not None and b is not None]
        if known:
            pairs[name] = known
    if not pairs:
        return None
    style = strategy_styles(records.strategies)
    figure = Figure(figsize=(max(4.0, 1.55 * len(pairs) + 0.9), 3.1), layout="constrained")
    panels = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    for axes, (name, known) in zip(panels, pairs.items(), strict=True):
        colour, marker = style[name]
        for pair in known:
            axes.plot([0, 1], pair, color=colour, alpha=0.45, linewidth=1, marker=marker, markersize=4)
        means = [sum(side) / len(known) for side in zip(*known, strict=True)]
        axes.plot([0, 1], means, color=colour, linewidth=2.6, solid_capstyle="round")
        axes.set_xticks([0, 1], [{"development": "dev."}.get(own, own), "ext."])
        axes.set_xlim(-0.3, 1.3)
        axes.set_title(name, color=colour)
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel(records.display_name(task, metric))
    levels = {chance_level(records, task, split) for split in (own, "external")}
    _mark_chance(panels, levels.pop() if len(levels) == 1 else None)
    return figure


def _mark_chance(panels: Sequence[Axes], chance: float | None) -> None:
    """Draw and name the level of chance; where it is outside the panels, name it at their edge."""
    if chance is None:
        return
    low, high = panels[0].get_ylim()
    for axes in panels:
        axes.set_ylim(low, high)
        if low <= chance <= high:
            axes.axhline(chance, color=GREY, linewidth=1, linestyle=(0, (1, 2)), zorder=0)
    where = "" if low <= chance <= high else " (below)" if chance < low else " (above)"
    height = min(max((chance - low) / (high - low), 0.0), 0.94)
    panels[0].text(
        0.02,
        height,
        f"chance {chance:.3g}{where}",
        transform=panels[0].transAxes,
        color=GREY,
        fontsize="x-small",
        verticalalignment="bottom",
    )


def time_bars(records: Records) -> Figure | None:
    """Draw stacked bars of the seconds of one arm by kind, mean over seeds."""
    costs = {name: list(records.costs(name).values()) for name in records.strategies}
    costs = {name: each for name, each in costs.items() if each}
    if not costs:
        return None
    kinds = ("train", *(kind for kind in KINDS if kind != "train"), "other")
    longest = max(sum(cost.wall_s for cost in each) / len(each) for each in costs.values())
    scale, unit = (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 300 else (1, "seconds")
    figure = Figure(figsize=(8.6, 0.42 * len(costs) + 1.4), layout="constrained")
    axes = figure.subplots()
    for row, each in enumerate(costs.values()):
        left = 0.0
        for kind in kinds:
            width = sum(cost.seconds[kind] for cost in each) / len(each) / scale
            if width:
                axes.barh(row, width, left=left, height=0.62, color=KIND_COLOURS[kind])
            left += width
        reused = sum(cost.reused_s for cost in each) / len(each) / scale
        if reused:
            axes.barh(row, reused, left=left, height=0.62, **REUSED)
        axes.annotate(
            f"{left + reused:,.3g}",
            (left + reused, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
    axes.set_yticks(range(len(costs)), list(costs))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{unit} per arm")
    axes.margins(x=0.09)
    used = [kind for kind in kinds if any(cost.seconds[kind] for each in costs.values() for cost in each)]
    handles: list[Any] = [mpl.patches.Patch(color=KIND_COLOURS[kind], label=kind) for kind in used]
    if any(cost.reused_s for each in costs.values() for cost in each):
        handles.append(mpl.patches.Patch(label="reused", **REUSED))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), handlelength=1.1, columnspacing=1.2
    )
    return figure


def _label(figure: Figure, axes: Axes, labels: Sequence[tuple[float, Interval, str, str]]) -> None:
    """Label each point to its right or left, shifted where the label would cover another element."""
    figure.draw_without_rendering()
    to_pixels = axes.transData.transform
    low, high = axes.get_window_extent().intervalx
    line = 12 * figure.dpi / 72
    taken: list[tuple[float, ...]] = []
    for cost, score, _, _ in labels:
        x, y = to_pixels((cost, score.mean))
        reach = to_pixels((cost, score.mean + (score.half or 0)))[1] - y
        taken += [
            (x - line / 2, x + line / 2, y - line / 3, y + line / 3),
            (x - 2, x + 2, y - reach, y + reach),
        ]
    for cost, score, name, colour in labels:
        x, y = to_pixels((cost, score.mean))
        width = 6.5 * len(name) * figure.dpi / 72
        sides = (True, False) if x > (low + high) / 2 else (False, True)

        def box(
            left: bool, shift: float, x: float = x, y: float = y, width: float = width
        ) -> tuple[float, ...]:
            start = x - 0.7 * line - width if left else x + 0.7 * line
            return start, start + width, y + shift - line / 2, y + shift + line / 2

        spots = [(left, step * line / 2) for step in (0, -1, 1, -2, 2, -3, 3, -4, 4) for left in sides]
        inside = [spot for spot in spots if low <= box(*spot)[0] and box(*spot)[1] <= high]
        free = [spot for spot in inside if not any(_overlap(box(*spot), other) for other in taken)]
        left, shift = free[0] if free else spots[0]
        taken.append(box(left, shift))
        axes.annotate(
            name,
            (cost, score.mean),
            xytext=(-9 if left else 9, shift * 72 / figure.dpi),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=colour,
            fontweight="bold",
            zorder=6,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def _overlap(first: Sequence[float], second: Sequence[float]) -> bool:
    return first[0] < second[1] and second[0] < first[1] and first[2] < second[3] and second[2] < first[3]


def slug(task: str) -> str:
    """Return a task's name as part of a file name."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in task)
