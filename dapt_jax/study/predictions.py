"""Predictions of an arm's heads, image by image: see `records.predictions` for the files."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from dapt_jax.data.dataset import Dataset
from dapt_jax.records import predictions
from dapt_jax.study.tasks import Task

FoldPredictions = list[tuple[Float[np.ndarray, "k classes"], np.ndarray]]
"""Probabilities of the rows that each fold holds out, and these rows."""


def classes_outside(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """Return the classes with an image among a fold's training rows, bool [classes].

    Args:
        dataset: The development images.
        rows: The rows that the fold holds out.
    """
    training = np.delete(dataset.truth, rows, axis=0)
    if dataset.multi_label:
        seen: np.ndarray = (training == 1).any(axis=0)
        return seen
    return np.isin(np.arange(len(dataset.classes)), training)


class Predictions:
    """Predicted probabilities of one arm on one task, and the classes that their heads had seen in training.

    Attributes:
        by_split: Probabilities by split and protocol, float [n, classes].
    """

    def __init__(self, task: Task):
        """Start without predictions."""
        self._task = task
        self.by_split: dict[str, dict[str, np.ndarray]] = {
            split: {} for split in (task.scored, *task.held_out)
        }
        self._seen: dict[str, dict[str, np.ndarray]] = {split: {} for split in self.by_split}

    def add(self, protocol: str, out_of_fold: FoldPredictions, held_out: dict[str, list[np.ndarray]]) -> None:
        """Add the predictions of a protocol.

        Args:
            protocol: The protocol.
            out_of_fold: Predictions of development images; they count only if every image was held out once.
            held_out: Predictions of each fold for other splits, of which the mean over folds counts. A class
                that the head of any of these folds had not seen counts as unseen.
        """
        seen = [classes_outside(self._task.development, part) for _, part in out_of_fold]
        rows = np.concatenate([part for _, part in out_of_fold])
        if len(rows) and len(rows) == len(self._task.scored_rows):
            values = np.concatenate([values for values, _ in out_of_fold])
            by_row = np.repeat(seen, [len(part) for _, part in out_of_fold], axis=0)
            self.by_split[self._task.scored][protocol] = values[np.argsort(rows)]
            self._seen[self._task.scored][protocol] = by_row[np.argsort(rows)]
        for split, folds in held_out.items():
            self.by_split[split][protocol] = np.mean(folds, 0)
            self._seen[split][protocol] = np.tile(np.all(seen, 0), (len(self._task.datasets[split]), 1))

    def write(self, workdir: Path, name: str, seed: int) -> None:
        """Write a file for each split of which there are any.

        Args:
            workdir: Folder of the study.
            name: Name of the arm.
            seed: Seed of the arm.
        """
        for split, by_protocol in self.by_split.items():
            if not by_protocol:
                continue
            dataset = self._task.scored_sets(self._task.scored_rows)[split]
            images = np.asarray([Path(each).name for each in dataset.images.names])
            path = predictions.path_of(workdir, name, seed, self._task.name, split)
            predictions.write(
                path,
                dataset.truth,
                dataset.groups,
                images,
                by_protocol,
                seen=self._seen[split],
                classes=dataset.classes,
                sources=dataset.columns.get("source"),
                units=self._task.units(dataset) if self._task.aggregation else None,
            )
