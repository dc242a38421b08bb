"""The page of the mode `data`: every set of a study with a contact sheet and intensity histograms."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dapt_jax.report import thumbnails
from dapt_jax.report.page import printable
from dapt_jax.report.style import COLOURS, STYLE
from dapt_jax.runtime import atomic_files

MOST_BYTES = 5_000_000
"""Size that the page stays below."""
_FITS = ((90, 12), (75, 12), (50, 12), (50, 6), (30, 4), (30, 1), (30, 0))
"""Quality of the JPEGs and number of images of each set, tried in turn until the page is small enough."""
_LEAST_SHARE = 1e-5
_BINS = 64


@dataclass(frozen=True)
class Tile:
    """One image of a contact sheet.

    Attributes:
        name: Name of its file.
        label: Names of its classes.
        patient: Its patient; empty where none is named.
        image: The image as decoded, uint8 [h, w, 3].
        regions: Pixels of each segment of its mask, bool [h, w].
        augmented: The augmented image, uint8 [h2, w2, 3]; None without augmentation.
        augmented_regions: Pixels of each segment of its augmented mask, bool [h2, w2].
    """

    name: str
    label: str
    patient: str
    image: np.ndarray
    regions: Mapping[str, np.ndarray] = field(default_factory=dict)
    augmented: np.ndarray | None = None
    augmented_regions: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class SetView:
    """What is shown of a set.

    Attributes:
        title: Name of the set in messages.
        facts: Text by heading.
        warnings: What a study warns of, one line each.
        refusal: Error line of a set that cannot be read; else empty.
        tiles: Images of the contact sheet.
        sampled: Number of images that the histograms count.
        by_class: Counts of grey values by class, int64 [256].
        by_source: Counts of grey values by source, int64 [256]; empty without sources.
        whole: Counts of grey values of all sampled images, int64 [256]; None for a refused set.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    refusal: str = ""
    tiles: Sequence[Tile] = ()
    sampled: int = 0
    by_class: Mapping[str, np.ndarray] = field(default_factory=dict)
    by_source: Mapping[str, np.ndarray] = field(default_factory=dict)
    whole: np.ndarray | None = None


def write(
    path: Path,
    title: str,
    views: Sequence[SetView],
    leaks: str,
    warnings: Sequence[str],
    refusals: Sequence[str],
) -> None:
    """Write the page: one file with embedded images, without scripts or network access, below 5 MB.

    Args:
        path: Path of the page.
        title: Title of the study.
        views: The sets, in the order in which a study reads them.
        leaks: What was found of images and patients in two sets.
        warnings: Warnings about several sets.
        refusals: Error lines, of sets and of the study.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dapt_jax.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=printable,
    )
    figures = [_histograms(view) for view in views]
    together = _together(views)
    for quality, tiles in _FITS:
        text = environment.get_template("data.html.j2").render(
            title=title,
            together=together,
            leaks=leaks,
            warnings=warnings,
            refusals=refusals,
            sets=[_shown(view, figure, quality, tiles) for view, figure in zip(views, figures, strict=True)],
        )
        if len(text.encode()) < MOST_BYTES:
            break
    atomic_files.write_text(path, text)


def _shown(view: SetView, figure: str, quality: int, most: int) -> dict[str, object]:
    """Return the context of a set in the template, with at most a number of its tiles."""
    names = list(next((tile.regions for tile in view.tiles if tile.regions), {}))
    return {
        "title": view.title,
        "facts": [(heading, text.split("\n")) for heading, text in view.facts.items()],
        "warnings": view.warnings,
        "refusal": view.refusal,
        "sampled": view.sampled,
        "histograms": figure,
        "segments": list(zip(names, thumbnails.colours(names).values(), strict=True)),
        "has_views": any(tile.augmented is not None for tile in view.tiles),
        "tiles": [
            {
                "name": tile.name,
                "label": tile.label,
                "patient": tile.patient,
                "image": thumbnails.jpeg(tile.image, tile.regions, quality),
                "augmented": ""
                if tile.augmented is None
                else thumbnails.jpeg(tile.augmented, tile.augmented_regions, quality),
            }
            for tile in view.tiles[:most]
        ],
    }


def _together(views: Sequence[SetView]) -> str:
    """Return the histograms of all sets in one figure, as base64 of a PNG; empty for fewer than two."""
    counts = {view.title: view.whole for view in views if view.whole is not None}
    if len(counts) < 2:
        return ""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        _draw(figure.subplots(), counts, "by set")
        return _png(figure)


def _histograms(view: SetView) -> str:
    """Return the histograms of a set by class and by source, as base64 of a PNG; empty without any."""
    parts = {"by class": view.by_class, "by source": view.by_source}
    parts = {title: counts for title, counts in parts.items() if counts}
    if not parts:
        return ""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(4.6 * len(parts), 3.2), layout="constrained")
        for axes, (title, counts) in zip(
            figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True
        ):
            _draw(axes, counts, title)
        return _png(figure)


def _draw(axes: Axes, counts: Mapping[str, np.ndarray], title: str) -> None:
    for place, (name, each) in enumerate(counts.items()):
        shares = each.reshape(_BINS, -1).sum(1) / max(each.sum(), 1)
        style = ("-", "--", ":", "-.")[place // len(COLOURS) % 4]
        edges = np.linspace(0, 256, _BINS + 1)
        axes.stairs(
            np.maximum(shares, _LEAST_SHARE),
            edges,
            baseline=None,
            label=name,
            color=COLOURS[place % len(COLOURS)],
            linestyle=style,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.set_ylim(_LEAST_SHARE, 1)
    axes.set_xlim(0, 256)
    axes.set_title(title)
    axes.set_xlabel("grey value")
    axes.set_ylabel("share of pixels")
    axes.legend(fontsize=8)


def _png(figure: Figure) -> str:
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, dpi=110, facecolor="white", metadata={"Software": None})
    return base64.b64encode(file.getvalue()).decode()
