"""Target tasks: splits of their images, and result lines of their scores."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from dapt_jax.data import near_duplicates
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.splits import grouped_folds, grouped_holdout
from dapt_jax.errors import UserError
from dapt_jax.metrics import Score, lookup


@dataclasses.dataclass(frozen=True)
class Task:
    """A target task.

    Attributes:
        name: Name of the task.
        development: Images for training heads and, fold by fold, for scoring them.
        held_out: Images used for scoring only, by split name (`test`, `external`).
    """

    name: str
    development: Dataset
    held_out: dict[str, Dataset]

    def __post_init__(self) -> None:
        for split, dataset in self.held_out.items():
            if (dataset.segments, dataset.overlapping) != (
                self.development.segments,
                self.development.overlapping,
            ):
                raise UserError(
                    f"task {self.name!r}: {split} has {_segments(dataset)}; expected those of development, "
                    f"{_segments(self.development)}"
                )
            if self.is_segmentation:
                continue
            if dataset.classes != self.development.classes:
                raise UserError(
                    f"task {self.name!r}: {split} has the classes {', '.join(dataset.classes)}; expected "
                    "those of "
                    f"development: {', '.join(self.development.classes)}; where a set lacks one, name all as "
                    "its classes"
                )
            if dataset.multi_label != self.development.multi_label:
                several, one = (split, "development") if dataset.multi_label else ("development", split)
                raise UserError(
                    f"task {self.name!r}: {several} has several labels per image, {one} has one; expected "
                    "one kind"
                )

    @property
    def is_segmentation(self) -> bool:
        """Whether it is a segmentation task."""
        return bool(self.development.segments)

    @property
    def datasets(self) -> dict[str, Dataset]:
        """All images by split name, development first."""
        return {"development": self.development, **self.held_out}

    @property
    def distance_unit(self) -> str:
        """Unit of distances between masks: mm if all files define their spacing, else px of decoded images."""
        return "mm" if all(data.spacing is not None for data in self.datasets.values()) else "px"

    def folds(self, number: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return training and held-out rows of each fold; near-duplicates and patients are not split."""
        groups = near_duplicates.merged(self.development).groups
        return grouped_folds(self.development.labels, groups, number, seed)

    def inner_split(self, rows: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a fold's training rows, split again by patient: to fit on, and a fraction for validation."""
        groups = near_duplicates.merged(self.development).groups[rows]
        fit, validation = grouped_holdout(self.development.labels[rows], groups, fraction, seed)
        return rows[fit], rows[validation]


def _segments(dataset: Dataset) -> str:
    kind = "overlapping segments" if dataset.overlapping else "the segments"
    return f"{kind} {', '.join(dataset.segments)}" if dataset.segments else "no segments"


@dataclasses.dataclass(frozen=True)
class ArmKey:
    """Leading keys of the lines of one arm in `results.jsonl`.

    Attributes:
        strategy: Name of the strategy, or what stands in its place.
        seed: Seed of the arm.
        init: Weights that it started from.
        model: Name of the encoder.
    """

    strategy: str
    seed: int
    init: str
    model: str


ResultRow = dict[str, str | int | float | list[str] | None]
"""A line of `results.jsonl`."""


def result_rows(
    task: Task, arm: ArmKey, protocol: str, names: tuple[str, ...], scores: dict[str, list[list[Score]]]
) -> Iterator[ResultRow]:
    """Yield lines for `results.jsonl`: the mean of each score over the folds in which it is defined.

    Args:
        task: The task.
        arm: The arm whose scores they are.
        protocol: How the encoder was used.
        names: Names of the classes, in their order.
        scores: Scores of each fold by split; of the development images, those that a fold holds out, which
            are counted together.
    """
    for split, folds in scores.items():
        for of_folds in zip(*folds, strict=True):
            values = [score.value for score in of_folds if not np.isnan(score.value)]
            covered = set.intersection(*(set(score.classes) for score in of_folds))
            n = sum(score.n for score in of_folds) if split == "development" else of_folds[0].n
            yield {
                **dataclasses.asdict(arm),
                "task": task.name,
                "split": split,
                "protocol": protocol,
                "metric": of_folds[0].metric,
                "value": float(np.mean(values)) if values else None,
                "n": n,
                "classes": [name for name in names if name in covered],
                **({"unit": task.distance_unit} if lookup(of_folds[0].metric).is_distance else {}),
            }
