"""Predictions of single images, from which a report computes intervals and tests.

`WORKDIR/predictions/STRATEGY-seedN/TASK-SPLIT.npz` holds `label` ([n] class numbers, or [n, classes] of 0, 1
and NaN), `group` (str [n], the patient), `image` (str [n]) and, for each protocol, `probability/PROTOCOL`
(float [n, classes]) and `seen/PROTOCOL` (bool [n, classes], whether the heads that predicted the image had seen the
class in training); `classes` are the names of the classes, `source` (str [n]) is the column of that name of
the manifest, if it has one, and `unit` (str [n]) the unit that an image belongs to, of a task that aggregates images
to units. Files of earlier versions lack the last four. Of a published study `order/PROTOCOL` stands in the place of
`probability/PROTOCOL`: numbers from 0 to 1 in the same order, class by class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dapt_jax.errors import UserError
from dapt_jax.records import arrays
from dapt_jax.runtime import safe_paths
from dapt_jax.statistics import Aggregation, Units, auc, drawn_by

FOLDER = "predictions"
"""Name of the folder in a workdir."""

PROBABILITY, ORDER = "probability", "order"
"""First part of the names of arrays: of probabilities, and of numbers from 0 to 1 in their order, class by class."""


def path_of(workdir: Path, strategy: str, seed: object, task: str, split: str) -> Path:
    """Return the path of the predictions of an arm on a split of a task."""
    name = f"{FOLDER}/{strategy}-seed{seed}/{task}-{split}.npz"
    return workdir.joinpath(*safe_paths.check(name, workdir / "results.jsonl"))


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions of a run for the images of a split.

    Attributes:
        targets: Binary labels of each class, 0 or 1, NaN where unknown and where the head that predicted the
            image had not seen the class in training, float [n, classes].
        groups: The patient of each image, [n].
        probabilities: Predicted probabilities, float [n, classes].
        unseen: Names of the classes that some head had not seen.
        classes: Names of the columns; their numbers in files of earlier versions.
        sources: The source of each image, [n]; None where the file names none.
        labels: Class numbers, int [n], of images of one class each; None of several labels per image.
        drawn: What a draw with replacement draws by these groups: see `statistics.drawn_by`.
    """

    targets: np.ndarray
    groups: np.ndarray
    probabilities: np.ndarray
    unseen: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    sources: np.ndarray | None = None
    labels: np.ndarray | None = None
    drawn: str = "patients"

    def take(self, rows: np.ndarray) -> Predictions:
        """Return the predictions of some rows, int64 or bool."""
        return dataclasses.replace(
            self,
            targets=self.targets[rows],
            groups=self.groups[rows],
            probabilities=self.probabilities[rows],
            sources=None if self.sources is None else self.sources[rows],
            labels=None if self.labels is None else self.labels[rows],
        )

    def of_units(self, names: np.ndarray, rule: str) -> Predictions:
        """Return the predictions of units; patient and source are those of a unit's first image.

        Args:
            names: The unit of each image, str [n].
            rule: Rule of `statistics.Aggregation`.
        """
        units = Units.of(names)
        targets, labels = self.targets, None
        if self.labels is not None:
            labels = units.labels(self.labels, targets.shape[1])
            unseen = np.stack([np.bincount(units.member, np.isnan(each)) > 0 for each in targets.T], -1)
            targets = np.where(unseen, np.nan, np.eye(targets.shape[1])[labels])
        else:
            targets = units.labels(targets, targets.shape[1])
        return dataclasses.replace(
            self.take(units.first),
            targets=targets,
            labels=labels,
            probabilities=units.probabilities(self.probabilities, rule, self.labels is None),
        )

    def auc(self, rows: np.ndarray) -> float:
        """Return the mean one-versus-rest AUC over some rows.

        The mean covers the classes with both positives and negatives among the rows; NaN if there are none.
        """
        targets, probabilities = self.targets[rows], self.probabilities[rows]
        known = ~np.isnan(targets)
        areas = [auc(t[k] == 1, p[k]) for t, p, k in zip(targets.T, probabilities.T, known.T, strict=True)]
        found = [area for area in areas if np.isfinite(area)]
        return float(np.mean(found)) if found else float("nan")

    @property
    def positive(self) -> np.ndarray | None:
        """Positive images, bool [n], of a binary task with one image per patient; else None."""
        is_binary = self.targets.shape[1] == 2 and bool((self.targets.sum(1) == 1).all())
        return (
            self.targets[:, 1] == 1 if is_binary and len(np.unique(self.groups)) == len(self.groups) else None
        )

    def same_images(self, other: Predictions) -> bool:
        """Return whether labels and patients of both agree row by row."""
        return np.array_equal(self.groups, other.groups) and np.array_equal(
            self.targets, other.targets, equal_nan=True
        )


def read(path: Path, protocol: str, kind: str = PROBABILITY) -> Predictions | None:
    """Read one file; None where it lacks the protocol.

    Args:
        path: The file.
        protocol: The protocol; of units by `statistics.Aggregation.protocol`, which this function aggregates.
        kind: What is read as probabilities: `PROBABILITY`, or `ORDER`, which is enough for AUC and for nothing else.

    Raises:
        UserError: The file cannot be read, lacks an array, or its arrays are inconsistent.
    """
    protocol, aggregation = Aggregation.split(protocol)
    file = arrays.read(path)
    if aggregation and ("unit" not in file or kind != PROBABILITY):
        return None
    for name in ("label", "group"):
        if name not in file:
            raise UserError(f"{path}: no array {name!r}; expected label, group and {PROBABILITY}/<protocol>")
    if f"{kind}/{protocol}" not in file:
        return None
    labels, groups, probabilities = file["label"], file["group"], file[f"{kind}/{protocol}"]
    n = len(groups) if groups.ndim == 1 and groups.dtype.kind in "USiu" else -1
    if probabilities.ndim != 2 or len(probabilities) != n or labels.shape not in ((n,), probabilities.shape):
        raise UserError(
            f"{path}: label is {labels.shape}, group {groups.shape}, {kind}/{protocol} "
            f"{probabilities.shape}; "
            "expected one row for each image in all"
        )
    if probabilities.dtype.kind != "f" or not ((probabilities >= 0) & (probabilities <= 1.0001)).all():
        raise UserError(
            f"{path}: {kind}/{protocol} holds values that are not from 0 to 1; expected probabilities"
        )
    classes, numbers = probabilities.shape[1], labels if labels.ndim == 1 else None
    if numbers is not None:
        if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
            raise UserError(f"{path}: labels {_range(labels)}; expected classes from 0 to {classes - 1}")
        labels = np.eye(classes)[labels]
    elif labels.dtype.kind not in "fiub" or not (np.isnan(labels) | (labels == 0) | (labels == 1)).all():
        raise UserError(f"{path}: labels {_range(labels)}; expected 0, 1 or NaN for each class")
    names, sources = file.get("classes", np.arange(classes)), file.get("source")
    if names.shape != (classes,):
        raise UserError(f"{path}: {names.shape} classes; expected {classes} names")
    for name in ("source", "unit"):
        if name in file and file[name].shape != (n,):
            raise UserError(f"{path}: {name} is {file[name].shape}; expected one for each of {n} images")
    found = Predictions(
        labels.astype(float),
        groups,
        probabilities,
        classes=tuple(map(str, names)),
        sources=sources,
        labels=numbers,
        drawn=drawn_by(groups, file.get("image")),
    )
    found = _with_seen(path, file, protocol, found)
    return found.of_units(file["unit"], aggregation.rule) if aggregation else found


def _with_seen(path: Path, file: Mapping[str, np.ndarray], protocol: str, found: Predictions) -> Predictions:
    """Return predictions without the labels of classes that a head had not seen."""
    seen = file.get(f"seen/{protocol}")
    if seen is None:
        return found
    if seen.dtype.kind != "b" or seen.shape != found.probabilities.shape:
        raise UserError(
            f"{path}: seen/{protocol} is {seen.dtype} {seen.shape}; expected bool {found.probabilities.shape}"
        )
    unseen = tuple(name for name, each in zip(found.classes, seen.T, strict=True) if not each.all())
    targets = np.where(seen, found.targets, np.nan)
    return dataclasses.replace(found, targets=targets, unseen=unseen)


def write(
    path: Path,
    labels: np.ndarray,
    groups: np.ndarray,
    images: np.ndarray,
    probabilities: Mapping[str, np.ndarray],
    seen: Mapping[str, np.ndarray] | None = None,
    classes: Sequence[str] = (),
    sources: np.ndarray | None = None,
    units: np.ndarray | None = None,
) -> None:
    """Write one file atomically.

    Args:
        path: File to write; see `path_of`.
        labels: Class numbers [n], or 0, 1 and NaN [n, classes].
        groups: The patient of each image.
        images: File name of each image.
        probabilities: Predicted probabilities by protocol.
        seen: By protocol, whether the heads that predicted an image had seen each class; None for all.
        classes: Names of the classes.
        sources: The source of each image; None where the manifest names none.
        units: The unit of each image; None where images are not aggregated.
    """
    by_protocol = {f"probability/{name}": each.astype(np.float32) for name, each in probabilities.items()}
    by_protocol |= {f"seen/{name}": each for name, each in (seen or {}).items()}
    named = {"classes": np.asarray(classes, str)} if classes else {}
    named |= {} if units is None else {"unit": np.asarray(units, str)}
    named |= {} if sources is None else {"source": np.asarray(sources, str)}
    about = {"label": labels, "group": np.asarray(groups, str), "image": images, **named}
    arrays.write(path, {**about, **by_protocol})


def _range(labels: np.ndarray) -> str:
    """Return the available labels, as part of an error line."""
    return (
        f"{labels.min()} to {labels.max()}"
        if labels.dtype.kind in "iuf" and labels.size
        else f"of {labels.dtype}"
    )
