"""Within-run analysis of predictions: patient-level intervals and DeLong's test."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dapt_jax.errors import UserError
from dapt_jax.formatting import NONE, p_value
from dapt_jax.records import predictions
from dapt_jax.records.predictions import Predictions
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import BASELINE
from dapt_jax.report.columns import Cell, Column, Table, score
from dapt_jax.statistics import delong, patient_draws, patient_interval

RESAMPLES = 1000
_FEWEST = 200
_SECONDS = 30.0
"""Time for the draws of a task; the constants of `resamples_of` are of one CPU core."""


def table(workdir: Path, records: Records, task: str) -> Table | None:
    """Return the AUC of every run with a patient-level interval, and its difference from the reference.

    Returns:
        The table; None without predictions, or with too many to resample (`resamples_of`).
    """
    protocol, splits = records.protocol(task), records.splits(task)
    arms = [(name, seed) for name in records.strategies for seed in records.seeds]
    cells: dict[tuple[str, object, str], list[Cell]] = {}
    resamples = resamples_of(records, task)
    if not resamples:
        return None
    unseen: dict[str, list[str]] = {}
    alone: list[str] = []
    for split in splits:
        found = {}
        for name, seed in arms:
            if (each := of_arm(workdir, name, seed, task, split, protocol)) is not None:
                found[name, seed] = each
        for each in found.values():
            unseen.setdefault(split, []).extend(each.unseen)
        if any(each.drawn == "images" for each in found.values()):
            alone.append(split)
        draws = {arm: patient_draws(each.auc, each.groups, resamples) for arm, each in found.items()}
        for name, seed in found:
            cells[name, seed, split] = _cells(found, draws, name, seed, records.reference or "")
    if not cells:
        return None
    shown = [arm for arm in arms if any((*arm, split) in cells for split in splits)]
    reference = records.reference
    note = (
        f"Intervals of 95% within each run: {resamples} draws of patients with replacement, each with all of "
        "its images; "
        "they tell how sure the score of these networks is on other patients, not how other seeds would "
        "fare. Held-out "
        "predictions of all folds are taken together, so that values differ from means over folds. "
        f"Differences are from {reference}'s run of the same seed on the same draws. p: two-sided DeLong "
        "test, for two "
        "classes where every patient has one image, not adjusted."
    )
    if alone:
        note += f" Of {' and '.join(alone)} each image is drawn by itself, since none names its patient."
    for split, names in unseen.items():
        if names:
            listed = ", ".join(dict.fromkeys(names))
            note += f" On {split}, images whose head had seen no {listed} in training do not count for that class."
    columns: list[Column[tuple[str, object]]] = [
        Column("strategy", lambda arm: arm[0]),
        Column("seed", lambda arm: str(arm[1])),
    ]
    for split in splits:
        for index, title in enumerate(("AUC", "difference", "p DeLong")):
            columns.append(_column(title, split, index, cells))
    return Table.of(f"AUC over the patients of each run, {protocol}", columns, shown, note)


def of_arm(
    workdir: Path,
    name: str,
    seed: object,
    task: str,
    split: str,
    protocol: str | None,
    kind: str = predictions.PROBABILITY,
) -> Predictions | None:
    """Return the predictions of an arm on a split; None where there are none.

    Args:
        workdir: Folder of the study.
        name: Name of the arm.
        seed: Seed of the arm.
        task: The task.
        split: The split.
        protocol: The protocol; None for no protocol, and so no predictions.
        kind: What is read as probabilities: see `records.predictions.read`.
    """
    try:
        path = predictions.path_of(workdir, name, seed, task, split)
    except UserError:  # a name that no study accepts, and so without predictions
        return None
    return predictions.read(path, protocol, kind) if protocol and path.is_file() else None


def resamples_of(records: Records, task: str) -> int:
    """Return the number of draws of patients that a report has time for.

    Args:
        records: Records of the study.
        task: The task.

    Returns:
        `RESAMPLES`; fewer with many images and classes; 0 where too few would be left for an interval.
    """
    largest: dict[tuple[object, ...], float] = {}
    for row in records.results:
        if row["task"] == task and row["strategy"] != BASELINE and "/" not in row["metric"]:
            classes = row.get("classes") or 0
            count = classes if isinstance(classes, int) else len(classes)
            seconds = count * (50e-6 + 40e-9 * (row.get("n") or 0))
            arm = (row["strategy"], row["seed"], row["split"])
            largest[arm] = max(largest.get(arm, 0.0), seconds)
    possible = int(_SECONDS / max(sum(largest.values()), 1e-9))
    return 0 if possible < _FEWEST else min(RESAMPLES, possible)


def _column(
    title: str, split: str, index: int, cells: dict[tuple[str, object, str], list[Cell]]
) -> Column[tuple[str, object]]:
    """Return the column of one cell of each arm on a split."""
    return Column(title, lambda arm: cells[(*arm, split)][index] if (*arm, split) in cells else NONE, split)


def _cells(
    found: dict[tuple[str, object], Predictions],
    draws: dict[tuple[str, object], np.ndarray],
    name: str,
    seed: object,
    reference: str,
) -> list[Cell]:
    each, other = found[name, seed], found.get((reference, seed))
    rows, patients = np.arange(len(each.groups)), len(np.unique(each.groups))
    value = each.auc(rows)
    own = score(patient_interval(value, draws[name, seed], patients)) if np.isfinite(value) else Cell(NONE)
    if name == reference:
        return [own, Cell("reference"), Cell(NONE)]
    if other is None or not each.same_images(other) or not np.isfinite(value):
        return [own, Cell(NONE), Cell(NONE)]
    between = patient_interval(value - other.auc(rows), draws[name, seed] - draws[reference, seed], patients)
    p, positive = None, each.positive
    if positive is not None and 2 <= positive.sum() <= len(positive) - 2:
        p = (
            delong(positive, np.stack([each.probabilities[:, 1], other.probabilities[:, 1]]))
            .difference(0, 1)
            .p
        )
    return [own, score(between, signed=True), Cell(p_value(p))]
