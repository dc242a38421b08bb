"""What heads said of every image, kept for what a report can only tell from single predictions.

`WORKDIR/predictions/STRATEGY-seedN/TASK-SPLIT.npz` holds `label`, `group` (the patient), `image` and, for each protocol,
`probability/PROTOCOL`.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from dapt_jax.report.predictions import FOLDER
from dapt_jax.study.tasks import Arm, Task

Held = list[tuple[Float[np.ndarray, "k classes"], np.ndarray]]
"""Probabilities of each fold's held-out rows, and these rows."""


class Predictions:
    """Of one arm on one task."""

    def __init__(self, task: Task):
        """Begins with none."""
        self._task = task
        self._found: dict[str, dict[str, np.ndarray]] = {split: {} for split in task.datasets}

    def add(self, protocol: str, held: Held, others: dict[str, list[np.ndarray]]) -> None:
        """Takes a protocol's: of development images where every one was held out once, of others the mean over folds."""
        rows = np.concatenate([part for _, part in held])
        if len(rows) == len(self._task.development):
            said = np.concatenate([values for values, _ in held])
            self._found["development"][protocol] = said[np.argsort(rows)]
        for split, folds in others.items():
            self._found[split][protocol] = np.mean(folds, 0)

    def write(self, workdir: Path, arm: Arm) -> None:
        """Writes a file for each split of which there are any."""
        for split, by_protocol in self._found.items():
            if not by_protocol:
                continue
            dataset = self._task.datasets[split]
            folder = workdir / FOLDER / f"{arm.strategy}-seed{arm.seed}"
            folder.mkdir(parents=True, exist_ok=True)
            arrays = {
                "label": dataset.truth,
                "group": np.asarray(dataset.groups, str),
                "image": np.asarray([Path(name).name for name in dataset.images.names]),
                **{f"probability/{name}": said.astype(np.float32) for name, said in by_protocol.items()},
            }
            np.savez_compressed(folder / f"{self._task.name}-{split}.npz", **arrays)  # type: ignore[arg-type]
