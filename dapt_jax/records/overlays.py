"""A few images with their true and predicted masks, kept beside an arm for the report's pictures."""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dapt_jax.data.dataset import Dataset

FOLDER = "overlays"
"""In a workdir, of `TASK-SPLIT-STRATEGY-PROTOCOL.npz`; each holds its fields, see `Kept`."""


@dataclasses.dataclass(frozen=True)
class SegmentationSamples:
    """What was said of some images.

    Attributes:
        task: whose images.
        split: of the task.
        strategy: whose network.
        protocol: by which it was trained.
        names: of the files.
        segments: names of the masks' values.
        overlapping: whether masks are bit fields.
        images: uint8 [k, h, w, 3].
        truth: uint8 [k, h, w].
        predicted: uint8 [k, h, w].
    """

    task: str
    split: str
    strategy: str
    protocol: str
    names: tuple[str, ...]
    segments: tuple[str, ...]
    overlapping: bool
    images: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray

    @property
    def regions(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By segment, the background left out: where it is and where it is said to be, bool [k, h, w] each."""
        masks = self.truth, self.predicted
        if self.overlapping:
            found = [tuple((mask >> bit & 1).astype(bool) for mask in masks) for bit in range(len(self.segments) - 1)]
        else:
            found = [tuple(mask == value for mask in masks) for value in range(1, len(self.segments))]
        return {name: (truth, said) for name, (truth, said) in zip(self.segments[1:], found, strict=True)}


def read(workdir: Path) -> list[SegmentationSamples]:
    """What a study has kept, by file name; files of another kind are left alone."""
    found = []
    for path in sorted((workdir / FOLDER).glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            if set(file.files) == {field.name for field in dataclasses.fields(SegmentationSamples)}:
                values = {name: file[name] for name in file.files}
                plain = {name: value.item() if value.ndim == 0 else value for name, value in values.items()}
                plain |= {name: tuple(map(str, values[name])) for name in ("names", "segments")}
                found.append(SegmentationSamples(**plain))
    return found


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

    def write(self, workdir: Path, task: str, split: str, strategy: str, protocol: str) -> None:
        """Writes what was kept, if anything."""
        if not len(self._images):
            return
        folder = workdir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        kept = SegmentationSamples(
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
        np.savez_compressed(folder / f"{task}-{split}-{strategy}-{protocol}.npz", **vars(kept))
