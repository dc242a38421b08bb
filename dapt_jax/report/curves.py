"""Learning curves over the phases of adaptation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dapt_jax.records.study_records import Records
from dapt_jax.report.style import GREY, strategy_styles

LINES = {"loss": "-", "val_loss": "--"}


def learning_curves(records: Records) -> Figure | None:
    """Draw the loss by epoch over the adaptation phases, one panel per strategy, on common axes."""
    strategies = {name: _series(records, name) for name in records.strategies}
    strategies = {name: found for name, found in strategies.items() if found[0]}
    if not strategies:
        return None
    columns = min(4, len(strategies))
    lines = math.ceil(len(strategies) / columns)
    figure = Figure(figsize=(2.6 * columns + 0.4, 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, sharex=True, squeeze=False)
    style = strategy_styles(records.strategies)
    positive: list[float] = []
    for axes, (name, (series, switches)) in zip(panels.flat, strategies.items(), strict=False):
        colour, _ = style[name]
        for kind, line in LINES.items():
            runs = [run[kind] for run in series if run.get(kind)]
            for run in runs:
                axes.plot(run.keys(), run.values(), line, color=colour, alpha=0.25, linewidth=0.9)
                positive += run.values()
            mean = _mean(runs)
            marker = "." if len(mean) == 1 else None
            axes.plot(
                mean.keys(),
                mean.values(),
                line,
                color=colour,
                linewidth=1.9,
                marker=marker,
                label=_NAMES[kind],
            )
        for at, phase in switches:
            if at:
                axes.axvline(at + 0.5, color=GREY, linestyle=":", linewidth=1)
            axes.annotate(
                phase,
                (at + 0.5, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -2),
                textcoords="offset points",
                va="top",
                fontsize=8,
                color=GREY,
            )
        axes.set_title(name, color=colour)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.margins(y=0.12)
    for axes in panels[:, 0]:
        axes.set_ylabel("loss")
    for index, axes in enumerate(panels.flat):
        if index >= len(strategies):
            axes.set_visible(False)
        # The lowest panel of each column carries the axis.
        if index < len(strategies) <= index + columns:
            axes.set_xlabel("epoch")
            axes.tick_params(labelbottom=True)
    if positive and min(positive) > 0 and max(positive) / min(positive) > 30:
        panels.flat[0].set_yscale("log")
    panels.flat[0].legend(loc="lower left", fontsize=8, handlelength=1.8)
    return figure


_NAMES = {"loss": "training", "val_loss": "validation"}

SPECTRUM = {
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "alpha_req": "alpha-ReQ",
    "feature_sd": "standard deviation of a feature",
}
"""Metrics of features without labels, of label-free adaptation."""


def spectrum_curves(records: Records) -> Figure | None:
    """Draw rank and spread of the features by epoch of label-free adaptation, one panel per metric."""
    found = {name: _series(records, name, tuple(SPECTRUM))[0] for name in records.strategies}
    shown = [kind for kind in SPECTRUM if any(run[kind] for runs in found.values() for run in runs)]
    if not shown:
        return None
    figure = Figure(figsize=(3.2 * len(shown) + 0.4, 3.0), layout="constrained")
    style = strategy_styles(records.strategies)
    for axes, kind in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for name, runs in found.items():
            of_kind = [run[kind] for run in runs if run[kind]]
            colour, marker = style[name]
            for run in of_kind:
                axes.plot(run.keys(), run.values(), color=colour, alpha=0.25, linewidth=0.9)
            mean = _mean(of_kind)
            if mean:
                single = marker if len(mean) == 1 else None
                axes.plot(mean.keys(), mean.values(), color=colour, linewidth=1.9, marker=single, label=name)
        axes.set_title(SPECTRUM[kind])
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if kind != "alpha_req":
            axes.set_ylim(bottom=0)
        axes.margins(y=0.12)
    figure.axes[0].legend(loc="lower left", fontsize=8, handlelength=1.8)
    return figure


def _series(
    records: Records, strategy: str, kinds: Iterable[str] = tuple(LINES)
) -> tuple[list[dict[str, dict[int, float]]], list[tuple[int, str]]]:
    """Join each seed's phases end to end.

    Args:
        records: Records of the study.
        strategy: Name of the strategy.
        kinds: Names of the metrics.

    Returns:
        Per seed, the values by epoch of each metric; and the start of each phase, as (epochs before,
        name).
    """
    switches: dict[int, str] = {}
    series = []
    for seed in dict.fromkeys([*records.seeds, *(row.seed for row in records.rows)]):
        run: dict[str, dict[int, float]] = {kind: {} for kind in kinds}
        before = 0
        for row in records.rows:
            if (row.strategy, row.seed, row.stage) != (strategy, seed, "dapt") or not row.curve:
                continue
            switches.setdefault(before, row.phase)
            epochs = [_epoch(point, index) for index, point in enumerate(row.curve)]
            for epoch, point in zip(epochs, row.curve, strict=True):
                for kind in kinds:
                    value = point.get(kind)
                    if isinstance(value, int | float) and math.isfinite(value):
                        run[kind][before + epoch - min(epochs) + 1] = float(value)
            before += max(epochs) - min(epochs) + 1
        if any(run.values()):
            series.append(run)
    return series, sorted(switches.items())


def _epoch(point: Mapping[str, Any], index: int) -> int:
    epoch = point.get("epoch")
    return index if epoch is None else int(epoch)


def _mean(runs: list[dict[int, float]]) -> dict[int, float]:
    """Average over seeds at each epoch, ignoring seeds without a value."""
    epochs = sorted({epoch for run in runs for epoch in run})
    found = {epoch: [run[epoch] for run in runs if epoch in run] for epoch in epochs}
    return {epoch: sum(values) / len(values) for epoch, values in found.items()}
