"""Target tasks: whose images are split how, and the lines that their scores make."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from dapt_jax.data import near_duplicates
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.splits import grouped_folds, grouped_holdout
from dapt_jax.errors import UserError, nearest
from dapt_jax.metrics import Score


@dataclasses.dataclass(frozen=True)
class Task:
    """A target task.

    Attributes:
        name: of the task.
        development: images that heads are trained on and, in turn, scored on.
        held_out: other images that are scored only, by split name (`test`, `external`).
    """

    name: str
    development: Dataset
    held_out: dict[str, Dataset]

    def __post_init__(self) -> None:
        for split, dataset in self.held_out.items():
            if (dataset.segments, dataset.overlapping) != (self.development.segments, self.development.overlapping):
                raise UserError(
                    f"task {self.name!r}: {split} has {_segments(dataset)}; expected those of development, "
                    f"{_segments(self.development)}"
                )
            if self.is_segmentation:
                continue
            if dataset.classes != self.development.classes:
                raise UserError(
                    f"task {self.name!r}: {split} has the classes {', '.join(dataset.classes)}; expected those of "
                    f"development: {', '.join(self.development.classes)}; where a set lacks one, name all as its classes"
                )
            if dataset.multi_label != self.development.multi_label:
                several, one = (split, "development") if dataset.multi_label else ("development", split)
                raise UserError(
                    f"task {self.name!r}: {several} has several labels per image, {one} has one; expected one kind"
                )

    @property
    def is_segmentation(self) -> bool:
        """Whether pixels are to be told apart, not images."""
        return bool(self.development.segments)

    @property
    def datasets(self) -> dict[str, Dataset]:
        """All images by split name, development first."""
        return {"development": self.development, **self.held_out}

    def folds(self, number: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Training and held-out rows of the development images; look-alikes share a side as patients do."""
        groups = near_duplicates.merged(self.development).groups
        return grouped_folds(self.development.labels, groups, number, seed)

    def inner(self, rows: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Training rows of a fold, split again by patient: to fit on, and a fraction to judge by."""
        groups = near_duplicates.merged(self.development).groups[rows]
        fit, judge = grouped_holdout(self.development.labels[rows], groups, fraction, seed)
        return rows[fit], rows[judge]


def _segments(dataset: Dataset) -> str:
    kind = "overlapping segments" if dataset.overlapping else "the segments"
    return f"{kind} {', '.join(dataset.segments)}" if dataset.segments else "no segments"


@dataclasses.dataclass(frozen=True)
class Arm:
    """Whose scores these are: leading keys of `results.jsonl`."""

    strategy: str
    seed: int
    init: str
    model: str


def check_protocols(protocols: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuses a protocol that there is not.

    Args:
        protocols: that are asked for.
        known: that there are.
        where: the config's section that asks.
    """
    for protocol in protocols:
        if protocol not in known:
            raise UserError(f"unknown {where} protocol {protocol!r}; {nearest(protocol, known)}")


def result_rows(
    task: Task, arm: Arm, protocol: str, names: tuple[str, ...], found: dict[str, list[list[Score]]]
) -> Iterator[dict[str, Any]]:
    """Lines for `results.jsonl`: the mean of each score over the folds in which it is defined.

    Args:
        task: the task.
        arm: whose scores they are.
        protocol: by which the encoder was used.
        names: of classes or segments, in their order.
        found: by split, the scores of each fold; of the development images a fold's are those held out, so that all
            together are counted.
    """
    for split, folds in found.items():
        for scores in zip(*folds, strict=True):
            values = [score.value for score in scores if not np.isnan(score.value)]
            covered = set.intersection(*(set(score.classes) for score in scores))
            n = sum(score.n for score in scores) if split == "development" else scores[0].n
            yield {
                **dataclasses.asdict(arm),
                "task": task.name,
                "split": split,
                "protocol": protocol,
                "metric": scores[0].metric,
                "value": float(np.mean(values)) if values else None,
                "n": n,
                "classes": [name for name in names if name in covered],
            }
