"""Predictions of an arm's heads, image by image: see `records.predictions` for the files."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from dapt_jax.records import predictions
from dapt_jax.study.tasks import Arm, Task

Held = list[tuple[Float[np.ndarray, "k classes"], np.ndarray]]
"""Probabilities of each fold's held-out rows, and these rows."""


class Predictions:
    """Predictions of one arm on one task."""

    def __init__(self, task: Task):
        """Begin with none."""
        self._task = task
        self._found: dict[str, dict[str, np.ndarray]] = {split: {} for split in task.datasets}

    def add(self, protocol: str, out_of_fold: Held, held_out: dict[str, list[np.ndarray]]) -> None:
        """Take in the predictions of a protocol.

        Args:
            protocol: Name of the protocol.
            out_of_fold: Predictions of each fold's held-out development images; kept where every image was held out once.
            held_out: Predictions of the other splits by each fold's head, of which the mean is kept.
        """
        rows = np.concatenate([part for _, part in out_of_fold])
        if len(rows) == len(self._task.development):
            said = np.concatenate([values for values, _ in out_of_fold])
            self._found["development"][protocol] = said[np.argsort(rows)]
        for split, folds in held_out.items():
            self._found[split][protocol] = np.mean(folds, 0)

    def write(self, workdir: Path, arm: Arm) -> None:
        """Write a file for each split of which there are any."""
        for split, by_protocol in self._found.items():
            if not by_protocol:
                continue
            dataset = self._task.datasets[split]
            images = np.asarray([Path(name).name for name in dataset.images.names])
            path = predictions.path_of(workdir, arm.strategy, arm.seed, self._task.name, split)
            predictions.write(path, dataset.truth, dataset.groups, images, by_protocol)
