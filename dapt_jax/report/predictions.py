"""What single predictions add to a report: intervals over patients, and DeLong's test, within each run.

Reads `predictions/<strategy>-seed<seed>/<task>-<split>.npz` in a study's folder, where a study left them: arrays `label`
([n] class numbers, or [n, classes] of 0, 1 and NaN), `group` (str [n], the patient) and, for each protocol,
`probability/<protocol>` (float [n, classes]).
"""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import numpy as np

from dapt_jax.errors import UserError
from dapt_jax.records.study_records import Records
from dapt_jax.report.tables import NONE, Cell, Table, p_value, score
from dapt_jax.statistics import auc, delong, patient_draws, patient_interval

FOLDER = "predictions"
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a run said of the images of a split.

    Attributes:
        targets: of each class, 0 or 1, NaN where it is not known, float [n, classes].
        groups: the patient of each image, [n].
        probabilities: float [n, classes].
    """

    targets: np.ndarray
    groups: np.ndarray
    probabilities: np.ndarray

    def auc(self, rows: np.ndarray) -> float:
        """Mean one-versus-rest AUC over the classes that have both positives and negatives among the rows; NaN without."""
        targets, chances = self.targets[rows], self.probabilities[rows]
        known = ~np.isnan(targets)
        areas = [auc(t[k] == 1, c[k]) for t, c, k in zip(targets.T, chances.T, known.T, strict=True)]
        found = [area for area in areas if np.isfinite(area)]
        return float(np.mean(found)) if found else float("nan")

    @property
    def positive(self) -> np.ndarray | None:
        """Bool [n] where there are two classes, one of which each image has, and no patient has two images; else None."""
        is_binary = self.targets.shape[1] == 2 and bool((self.targets.sum(1) == 1).all())
        return self.targets[:, 1] == 1 if is_binary and len(np.unique(self.groups)) == len(self.groups) else None

    def same_images(self, other: Predictions) -> bool:
        """Whether both are of the same images in the same order, as far as labels and patients tell."""
        return np.array_equal(self.groups, other.groups) and np.array_equal(self.targets, other.targets, equal_nan=True)


def read(path: Path, protocol: str) -> Predictions | None:
    """Reads one file; None where it has nothing of a protocol.

    Raises:
        UserError: the file cannot be read, lacks an array, or its arrays do not go together.
    """
    try:
        # NumPy leaves a file that it cannot read open, one that it was given open aside.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            missing = [name for name in ("label", "group") if name not in file]
            if missing:
                raise UserError(f"{path}: no array {missing[0]!r}; expected label, group and probability/<protocol>")
            if f"probability/{protocol}" not in file:
                return None
            labels, groups, probabilities = (file[name] for name in ("label", "group", f"probability/{protocol}"))
    except UserError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an .npz of predictions ({error})") from error
    n = len(groups)
    if probabilities.ndim != 2 or len(probabilities) != n or len(labels) != n:
        raise UserError(
            f"{path}: label is {labels.shape}, group {groups.shape}, probability/{protocol} {probabilities.shape}; "
            "expected one row for each image in all"
        )
    classes = probabilities.shape[1]
    if labels.ndim == 1 and (labels.min(initial=0) < 0 or labels.max(initial=0) >= classes):
        raise UserError(f"{path}: labels {labels.min()} to {labels.max()}; expected classes from 0 to {classes - 1}")
    return Predictions(np.eye(classes)[labels] if labels.ndim == 1 else labels, groups, probabilities)


def table(workdir: Path, records: Records, task: str) -> Table | None:
    """AUC of every run with its interval over patients, and its difference from the reference's run of the same seed.

    Returns:
        None where no predictions were kept.
    """
    protocol, splits = records.protocol(task), records.splits(task)
    arms = [(name, seed) for name in records.strategies for seed in records.seeds]
    cells: dict[tuple[str, object, str], list[Cell]] = {}
    for split in splits:
        found = {}
        for name, seed in arms:
            path = workdir / FOLDER / f"{name}-seed{seed}" / f"{task}-{split}.npz"
            if path.is_file() and protocol and (each := read(path, protocol)) is not None:
                found[name, seed] = each
        draws = {arm: patient_draws(each.auc, each.groups, RESAMPLES) for arm, each in found.items()}
        for name, seed in found:
            cells[name, seed, split] = _cells(found, draws, name, seed, records.reference or "")
    if not cells:
        return None
    shown = [arm for arm in arms if any((*arm, split) in cells for split in splits)]
    rows = [
        [Cell(name), Cell(str(seed)), *(cell for split in splits for cell in cells.get((name, seed, split), _EMPTY))]
        for name, seed in shown
    ]
    reference = records.reference
    note = (
        f"Intervals of 95% within each run: {RESAMPLES} draws of patients with replacement, each with all of its images; "
        "they tell how sure the score of these networks is on other patients, not how other seeds would fare. Held-out "
        "predictions of all folds are taken together, so that values differ from means over folds. "
        f"Differences are from {reference}'s run of the same seed on the same draws. p: two-sided DeLong test, for two "
        "classes where every patient has one image, not adjusted."
    )
    columns = ["strategy", "seed", *["AUC", "difference", "p DeLong"] * len(splits)]
    groups = [("", 2), *((split, 3) for split in splits)]
    return Table(f"AUC over the patients of each run, {protocol}", columns, rows, groups, note)


_EMPTY = [Cell(NONE)] * 3


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
        p = delong(positive, np.stack([each.probabilities[:, 1], other.probabilities[:, 1]])).difference(0, 1).p
    return [own, score(between, signed=True), Cell(p_value(p))]
