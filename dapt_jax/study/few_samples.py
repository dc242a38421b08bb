"""What rests on few patients, folds or seeds, in lines, and the number that would do."""

from collections.abc import Mapping, Sequence

import numpy as np

from dapt_jax.data import facts, near_duplicates
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.splits import Split
from dapt_jax.statistics import auc_half_width

WIDE, WANTED = 0.15, 0.1
"""Half-width of an AUC's interval that is reported, and the one that would do."""

AREA = 0.8
"""AUC that these half-widths are of."""

FEWEST_HELD = 10
"""Patients that each fold ought to hold out."""


def of_task(datasets: Mapping[str, Dataset], folds: Sequence[Sequence[Split]]) -> list[str]:
    """Return a line for each split with classes of few patients, and one for folds that hold out few.

    Args:
        datasets: Images by split, development first.
        folds: Training and held-out rows of each fold, for each seed.
    """
    lines = [f"{split}: {line}" for split, dataset in datasets.items() if (line := of_classes(dataset))]
    development = next(iter(datasets.values()))
    return [*lines, *of_folds(development, folds), *of_classes_by_fold(development, folds)]


def of_classes(dataset: Dataset) -> str:
    """Return a line on the classes whose AUC a set cannot tell well; empty where it can."""
    if dataset.segments:
        return ""
    groups = near_duplicates.merged(dataset).groups
    few = dict[str, int]()
    worst = 0.0
    for column, name in enumerate(dataset.classes):
        has = facts.has_class(dataset, column)
        count, others = len(np.unique(groups[has])), len(np.unique(groups[~has]))
        half = auc_half_width(AREA, count, max(1, others)) if count else 0.0
        if half > WIDE:
            few[name] = count
            worst = max(worst, half)
    if not few:
        return ""
    wanted = next(n for n in range(2, 1000) if auc_half_width(AREA, n, n) <= WANTED)
    listed = ", ".join(f"{name!r} {count}" for name, count in few.items())
    return (
        f"few patients of a class ({listed}): an AUC of {AREA} is then known to ±{min(worst, 0.5):.2f}; "
        f"{wanted} patients of a class would give ±{WANTED:.2f}"
    )


def of_classes_by_fold(dataset: Dataset, folds: Sequence[Sequence[Split]]) -> list[str]:
    """Return a line if folds hold out no image of a class, so that their means over classes lack it.

    A score is the mean over folds. Where a fold holds out no image of a class, its AUC is the mean over the
    other classes, and a class that is recognised badly counts less than the others.
    """
    if dataset.segments:
        return []
    lacking = {
        name: most
        for column, name in enumerate(dataset.classes)
        if (has := facts.has_class(dataset, column)).any()
        and (most := max(sum(not has[rows].any() for _, rows in splits if len(rows)) for splits in folds))
    }
    if not lacking:
        return []
    listed = ", ".join(f"{name!r} in {count} of {len(folds[0])}" for name, count in lacking.items())
    return [
        f"folds hold out no image of a class ({listed}), and their means over classes leave it out; expected "
        "as many patients of each class as folds: fewer transfer.folds, or drop_classes of the set"
    ]


def of_folds(dataset: Dataset, folds: Sequence[Sequence[Split]]) -> list[str]:
    """Return a line if a fold holds out few patients."""
    groups = near_duplicates.merged(dataset).groups
    held = [rows for splits in folds for _, rows in splits if len(rows)]
    if not held:
        return []
    smallest = min(held, key=lambda rows: len(np.unique(groups[rows])))
    count, number = len(np.unique(groups[smallest])), len(folds[0])
    if count >= FEWEST_HELD:
        return []
    total = len(np.unique(groups))
    fewer = total // FEWEST_HELD
    would = f"transfer.folds={fewer} or " if 2 <= fewer < number else ""
    images = "1 image" if len(smallest) == 1 else f"{len(smallest)} images"
    return [
        f"the smallest of {number} folds holds out {images} of {count} patient{'s' * (count != 1)}; "
        f"{would}{FEWEST_HELD * number} patients in all would give each {FEWEST_HELD}"
    ]
