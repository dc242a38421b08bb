"""A few images with their true and predicted masks, kept beside an arm for the report's pictures."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dapt_jax.data.dataset import Dataset

FOLDER = "overlays"
"""In a workdir: `TASK-SPLIT-STRATEGY-PROTOCOL.npz` with `images`, `truth`, `predicted` and `names`."""


class Overlays:
    """Picks some images of a set, the same for every arm, and keeps what was said of them."""

    def __init__(self, dataset: Dataset, count: int):
        """Spreads the images over the set; `count` 0 keeps none."""
        self._dataset = dataset
        self._rows = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int))
        self._images: list[np.ndarray] = []
        self._predicted: list[np.ndarray] = []

    def add(
        self, rows: np.ndarray, images: UInt8[np.ndarray, "k h w 3"], predicted: UInt8[np.ndarray, "b h w"]
    ) -> None:
        """Takes a batch: `rows` of the set in order, and what was predicted of each."""
        for place, row in enumerate(rows):
            if row in self._rows:
                self._images.append(images[place])
                self._predicted.append(predicted[place])

    def write(self, arm: Path, task: str, split: str, strategy: str, protocol: str) -> None:
        """Writes what was kept, into the workdir of an arm's folder (`workdir/checkpoints/ARM`)."""
        if not len(self._images):
            return
        folder = arm.parent.parent / FOLDER
        folder.mkdir(exist_ok=True)
        np.savez_compressed(
            folder / f"{task}-{split}-{strategy}-{protocol}.npz",
            images=np.stack(self._images),
            truth=self._dataset.targets[self._rows],
            predicted=np.stack(self._predicted),
            names=np.array([Path(self._dataset.images.names[row]).name for row in self._rows]),
            segments=np.array(self._dataset.segments),
            overlapping=np.array(self._dataset.overlapping),
        )
