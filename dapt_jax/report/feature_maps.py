"""Maps of features: the first two principal components by class, and by set or source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dapt_jax.records import samples
from dapt_jax.records.samples import FeatureMap
from dapt_jax.records.study_records import Records
from dapt_jax.report.prediction_figures import Picture
from dapt_jax.report.recommendation import UNADAPTED, arms_shown
from dapt_jax.report.style import COLOURS, MARKERS

MOST_NAMES = 10
"""Names up to which points are told apart; the rarer ones are "other"."""
OTHER = "other"


def pictures(workdir: Path, records: Records, task: str) -> list[Picture]:
    """Return the maps of the unadapted and of the best arm, as far as they were stored."""
    shown = arms_shown(records, task)
    names = list(dict.fromkeys([*(name for name in shown if name == UNADAPTED), *shown[:1]]))
    found = []
    for name in names:
        for seed in records.seeds[:1]:
            if (each := samples.read_feature_map(workdir, name, seed, task)) is not None:
                found += _of_arm(each, name, seed, task)
    return found


def _of_arm(found: FeatureMap, name: str, seed: object, task: str) -> list[Picture]:
    has_sources = len(set(found.sources.tolist())) > 1
    by_set = np.array(
        [
            f"{split}, {source}" if source else split
            for split, source in zip(found.splits, found.sources, strict=True)
        ]
    )
    parts = [("class", found.labels), ("set and source" if has_sources else "set", by_set)]
    made = []
    for by, values in parts:
        if len(set(values.tolist())) < 2:
            continue
        words = f"Features of {name}, seed {seed}, by {by}"
        caption = f"{words}. {len(values)} images; principal components with {found.explained.sum():.0%} of the variance."
        alt = f"{words}, task {task}: a scatter plot of the first two principal components."
        slug = "class" if by == "class" else "set"
        made.append(Picture(f"features_{name}_by_{slug}", _scatter(found, values, name), caption, alt))
    return made


def _scatter(found: FeatureMap, values: np.ndarray, title: str) -> Figure:
    figure = Figure(figsize=(3.9, 4.3), layout="constrained")
    axes = figure.subplots()
    names, counts = np.unique(values, return_counts=True)
    if len(names) > MOST_NAMES:
        common = names[np.argsort(-counts, kind="stable")[: MOST_NAMES - 1]]
        values = np.where(np.isin(values, common), values, OTHER)
        names = np.append(np.sort(common), OTHER)
    for place, name in enumerate(names):
        rows = values == name
        axes.scatter(
            found.points[rows, 0],
            found.points[rows, 1],
            s=13,
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            alpha=0.65,
            linewidths=0,
            label=str(name) if len(str(name)) <= 24 else f"{str(name)[:21]}...",
        )
    for axis, share in zip("xy", found.explained, strict=True):
        axes.set(**{f"{axis}label": f"component {1 + (axis == 'y')} ({share:.0%})"})
    axes.set_xticklabels([])
    axes.set_yticklabels([])
    axes.set_title(title)
    longest = max(len(str(name)) for name in names)
    figure.legend(loc="outside lower center", ncols=1 if longest > 16 else 2, fontsize=8, markerscale=1.6)
    return figure
