"""Learning curves over the phases of adaptation."""

from __future__ import annotations

import math
from collections.abc import Mapping
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


def _series(
    records: Records, strategy: str
) -> tuple[list[dict[str, dict[int, float]]], list[tuple[int, str]]]:
    """Join each seed's phases end to end.

    Returns:
        Per seed, the values by epoch of each kind of loss; and the start of each phase, as (epochs before,
        name).
    """
    switches: dict[int, str] = {}
    series = []
    for seed in dict.fromkeys([*records.seeds, *(row.seed for row in records.rows)]):
        run: dict[str, dict[int, float]] = {kind: {} for kind in LINES}
        before = 0
        for row in records.rows:
            if (row.strategy, row.seed, row.stage) != (strategy, seed, "dapt") or not row.curve:
                continue
            switches.setdefault(before, row.phase)
            epochs = [_epoch(point, index) for index, point in enumerate(row.curve)]
            for epoch, point in zip(epochs, row.curve, strict=True):
                for kind in LINES:
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
