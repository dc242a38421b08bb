"""Choice of the sample images with masks in the report, the same for every arm."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dapt_jax.data.dataset import Dataset
from dapt_jax.records import overlays


class Overlays:
    """Collector of predictions for sample images of a set."""

    def __init__(self, dataset: Dataset, count: int):
        """Choose evenly spaced images of the set; none if `count` is 0."""
        self._dataset = dataset
        self._rows = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int))
        self._images: list[np.ndarray] = []
        self._predicted: list[np.ndarray] = []

    def add(
        self, rows: np.ndarray, images: UInt8[np.ndarray, "k h w 3"], predicted: UInt8[np.ndarray, "b h w"]
    ) -> None:
        """Add a batch: `rows` of the set in order, and their predictions."""
        for place, row in enumerate(rows):
            if row in self._rows:
                self._images.append(images[place])
                self._predicted.append(predicted[place])

    def write(self, workdir: Path, task: str, split: str, strategy: str, protocol: str) -> None:
        """Write the samples, if any."""
        if not len(self._images):
            return
        samples = overlays.SegmentationSamples(
            task=task,
            split=split,
            strategy=strategy,
            protocol=protocol,
            names=tuple(Path(self._dataset.images.names[row]).name for row in self._rows),
            segments=self._dataset.segments,
            overlapping=self._dataset.overlapping,
            images=np.stack(self._images),
            truth=self._dataset.targets[self._rows],
            predicted=np.stack(self._predicted),
        )
        overlays.write(workdir, samples)
