"""Predictions of an arm's heads, image by image: see `records.predictions` for the files."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from dapt_jax.records import predictions
from dapt_jax.study.tasks import Task

FoldPredictions = list[tuple[Float[np.ndarray, "k classes"], np.ndarray]]
"""Probabilities of the rows that each fold holds out, and these rows."""


class Predictions:
    """Predicted probabilities of one arm on one task."""

    def __init__(self, task: Task):
        """Start without predictions."""
        self._task = task
        self._by_split: dict[str, dict[str, np.ndarray]] = {
            split: {} for split in (task.scored, *task.held_out)
        }

    def add(self, protocol: str, out_of_fold: FoldPredictions, held_out: dict[str, list[np.ndarray]]) -> None:
        """Add the predictions of a protocol.

        Args:
            protocol: The protocol.
            out_of_fold: Predictions of development images; they count only if every image was held out once.
            held_out: Predictions of each fold for other splits, of which the mean over folds counts.
        """
        rows = np.concatenate([part for _, part in out_of_fold])
        if len(rows) and len(rows) == len(self._task.scored_rows):
            values = np.concatenate([values for values, _ in out_of_fold])
            self._by_split[self._task.scored][protocol] = values[np.argsort(rows)]
        for split, folds in held_out.items():
            self._by_split[split][protocol] = np.mean(folds, 0)

    def write(self, workdir: Path, name: str, seed: int) -> None:
        """Write a file for each split of which there are any.

        Args:
            workdir: Folder of the study.
            name: Name of the arm.
            seed: Seed of the arm.
        """
        for split, by_protocol in self._by_split.items():
            if not by_protocol:
                continue
            dataset = self._task.scored_sets(self._task.scored_rows)[split]
            images = np.asarray([Path(each).name for each in dataset.images.names])
            path = predictions.path_of(workdir, name, seed, self._task.name, split)
            predictions.write(path, dataset.truth, dataset.groups, images, by_protocol)
