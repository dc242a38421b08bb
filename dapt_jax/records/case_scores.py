"""Dice of every image of a task of masks, from which comparisons over patients are made.

`WORKDIR/case_scores/STRATEGY-seedN/TASK-SPLIT-PROTOCOL.npz` holds `dice` (float [n, classes], 1 where neither mask has the
class), `group` (str [n], the patient) and `image` (str [n]).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dapt_jax.errors import UserError
from dapt_jax.records import arrays
from dapt_jax.runtime import safe_paths
from dapt_jax.statistics import drawn_by

FOLDER = "case_scores"
"""Name of the folder in a workdir."""


@dataclasses.dataclass(frozen=True)
class CaseScores:
    """Scores of the images of a split.

    Attributes:
        dice: Dice by image and class, 1 where neither mask has the class, float [n, classes].
        groups: The patient of each image, [n].
        images: File name of each image, [n].
    """

    dice: np.ndarray
    groups: np.ndarray
    images: np.ndarray

    def mean(self, rows: np.ndarray) -> float:
        """Return the mean Dice over some rows and the classes, as the metric `dice` is; NaN without rows.

        >>> dice = np.array([[1.0, 0.25], [0.5, 0.25]])
        >>> CaseScores(dice, np.array(["a", "b"]), np.array(["1", "2"])).mean(np.arange(2))
        0.5
        """
        return float(self.dice[rows].mean()) if len(rows) else math.nan

    @property
    def drawn(self) -> str:
        """What a draw with replacement draws by these groups: see `statistics.drawn_by`."""
        return drawn_by(self.groups, self.images)

    def same_images(self, other: CaseScores) -> bool:
        """Return whether both are of the same images and patients, row by row."""
        return np.array_equal(self.groups, other.groups) and np.array_equal(self.images, other.images)


def mean_of(folds: Sequence[CaseScores]) -> CaseScores:
    """Return the mean over folds of scores of the same images."""
    return dataclasses.replace(folds[0], dice=np.mean([each.dice for each in folds], axis=0))


def path_of(workdir: Path, strategy: str, seed: object, task: str, split: str, protocol: str) -> Path:
    """Return the path of the scores of an arm on a split of a task."""
    name = f"{FOLDER}/{strategy}-seed{seed}/{task}-{split}-{protocol}.npz"
    return workdir.joinpath(*safe_paths.check(name, workdir / "results.jsonl"))


def write(path: Path, scores: CaseScores) -> None:
    """Write one file atomically."""
    arrays.write(path, {"dice": scores.dice, "group": scores.groups.astype(str), "image": scores.images})


def read(path: Path) -> CaseScores:
    """Read one file.

    Raises:
        UserError: The file cannot be read, lacks an array, or its arrays are inconsistent.
    """
    file = arrays.read(path)
    for name in ("dice", "group", "image"):
        if name not in file:
            raise UserError(f"{path}: no array {name!r}; expected dice, group and image")
    found = CaseScores(file["dice"], file["group"], file["image"])
    shapes = found.dice.shape[:1], found.groups.shape, found.images.shape
    if found.dice.ndim != 2 or found.dice.dtype.kind != "f" or len({*shapes}) > 1:
        raise UserError(
            f"{path}: dice is {found.dice.shape}, group {found.groups.shape}, image {found.images.shape}; expected one "
            "row for each image in all"
        )
    return found
