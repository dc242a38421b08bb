"""Figures with outlines of true and predicted masks, on the same images for every strategy."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dapt_jax.records.overlays import SegmentationSamples
from dapt_jax.report.style import COLOURS, GREY

MOST_IMAGES = 4


def by_split(
    samples: Sequence[SegmentationSamples], task: str
) -> dict[tuple[str, str], list[SegmentationSamples]]:
    """Return the samples of a task by split and protocol, in display order."""
    found: dict[tuple[str, str], list[SegmentationSamples]] = {}
    for each in samples:
        if each.task == task:
            found.setdefault((each.split, each.protocol), []).append(each)
    return found


def overlays(samples: Sequence[SegmentationSamples], order: Sequence[str]) -> Figure:
    """Draw the true masks in the first row, then one row of predicted masks per strategy.

    Args:
        samples: Samples of one task, split and protocol.
        order: Names of the strategies in display order.
    """
    rows = sorted(
        samples, key=lambda each: order.index(each.strategy) if each.strategy in order else len(order)
    )
    shown = min(MOST_IMAGES, *(len(each.images) for each in rows))
    figure = Figure(figsize=(1.9 * shown + 0.4, 1.95 * (len(rows) + 1) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows) + 1, shown, squeeze=False)
    colours = dict(zip(rows[0].regions, COLOURS[1:], strict=False))
    for column in range(shown):
        _picture(grid[0, column], rows[0], column, colours, is_truth=True)
        grid[0, column].set_title(rows[0].names[column], fontsize=8, fontweight="normal", color=GREY)
        for place, each in enumerate(rows, start=1):
            _picture(grid[place, column], each, column, colours, is_truth=False)
    for axes, label in zip(grid[:, 0], ["truth", *(each.strategy for each in rows)], strict=True):
        axes.set_ylabel(label, fontweight="bold")
    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _picture(
    axes: Axes, samples: SegmentationSamples, number: int, colours: dict[str, str], *, is_truth: bool
) -> None:
    """Draw an image with the outlines of its classes, and the Dice of each predicted class below."""
    axes.imshow(samples.images[number])
    dices = []
    for name, (truth, predicted) in samples.regions.items():
        region = truth[number] if is_truth else predicted[number]
        if region.any():
            axes.contour(region.astype(float), [0.5], colors=[colours[name]], linewidths=1.4)
        both = 2 * (truth[number] & predicted[number]).sum()
        size = truth[number].sum() + predicted[number].sum()
        dices.append(f"{both / size if size else 1.0:.2f}")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if not is_truth:
        axes.set_xlabel("Dice " + " / ".join(dices), fontsize=8, labelpad=2)
