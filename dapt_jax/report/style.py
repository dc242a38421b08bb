"""Colours, markers and fonts of the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, GREY, FAINT = "#22262b", "#8a929b", "#e4e7ea"

# Okabe and Ito's palette for the colour-blind; its yellow is too faint for lines, so a dark brown stands in.
# After eight strategies, colours repeat with other markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5230")
MARKERS = "osD^vPX*"

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "hatch.linewidth": 0.7,
    "text.parse_math": False,  # names of classes and tasks may hold a dollar sign
}


def strategy_styles(strategies: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return colour and marker by strategy, consistent over all figures of a report."""
    return {
        name: (COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)])
        for index, name in enumerate(strategies)
    }


def save(figure: Figure, path: Path, dpi: int = 160) -> Path:
    """Write a PNG, without global `pyplot` state.

    Args:
        figure: The figure.
        path: File to write.
        dpi: Dots per inch.
    """
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=dpi, facecolor="white", metadata={"Software": None})
    return path
