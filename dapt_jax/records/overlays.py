"""Sample images with true and predicted masks, stored beside an arm for the report's figures."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dapt_jax.errors import UserError
from dapt_jax.records import arrays
from dapt_jax.runtime import safe_paths

FOLDER = "overlays"
"""Name of the folder in a workdir, of `TASK-SPLIT-STRATEGY-PROTOCOL.npz`; each holds the fields of
`SegmentationSamples`."""


@dataclasses.dataclass(frozen=True)
class SegmentationSamples:
    """Sample images of a split with true and predicted masks.

    Attributes:
        task: Name of the task.
        split: Split of the task.
        strategy: Strategy of the network.
        protocol: Protocol used to train the network.
        names: Names of the images' files.
        segments: Names of the classes of the masks, the background first.
        overlapping: Whether masks are bit fields.
        images: Images, uint8 [k, h, w, 3].
        truth: True masks, uint8 [k, h, w].
        predicted: Predicted masks, uint8 [k, h, w].
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
        """True and predicted pixels by foreground class, bool [k, h, w] each."""
        masks = self.truth, self.predicted
        if self.overlapping:
            found = [
                tuple((mask >> bit & 1).astype(bool) for mask in masks)
                for bit in range(len(self.segments) - 1)
            ]
        else:
            found = [tuple(mask == value for mask in masks) for value in range(1, len(self.segments))]
        return {
            name: (truth, predicted)
            for name, (truth, predicted) in zip(self.segments[1:], found, strict=True)
        }


def read(workdir: Path) -> list[SegmentationSamples]:
    """Read the samples of a study by file name; files with other arrays are ignored.

    Raises:
        UserError: A file is damaged; names it.
    """
    fields = {field.name for field in dataclasses.fields(SegmentationSamples)}
    found = []
    for path in sorted((workdir / FOLDER).glob("*.npz")):
        values = arrays.read(path)
        if set(values) == fields:
            _check(path, values)
            plain: dict[str, Any] = {
                name: value.item() if value.ndim == 0 else value for name, value in values.items()
            }
            plain |= {name: tuple(map(str, values[name])) for name in ("names", "segments")}
            found.append(SegmentationSamples(**plain))
    return found


def write(workdir: Path, samples: SegmentationSamples) -> None:
    """Write the samples of an arm atomically."""
    name = f"{FOLDER}/{samples.task}-{samples.split}-{samples.strategy}-{samples.protocol}.npz"
    arrays.write(workdir.joinpath(*safe_paths.check(name, workdir)), vars(samples))


def _check(path: Path, values: dict[str, np.ndarray]) -> None:
    """Refuse arrays that do not match `SegmentationSamples`."""
    kinds = {**dict.fromkeys(("task", "split", "strategy", "protocol"), ("U", 0)), "overlapping": ("b", 0)}
    kinds |= {
        "names": ("U", 1),
        "segments": ("U", 1),
        "images": ("u", 4),
        "truth": ("u", 3),
        "predicted": ("u", 3),
    }
    for name, (kind, axes) in kinds.items():
        if values[name].dtype.kind != kind or values[name].ndim != axes:
            raise UserError(
                f"{path}: {name} is {values[name].dtype} with {values[name].ndim} axes; delete the file"
            )
    images = values["images"]
    is_one_size = images.shape[:3] == values["truth"].shape == values["predicted"].shape
    if not images.size or images.shape[3] != 3 or images.dtype != np.uint8 or not is_one_size:
        raise UserError(f"{path}: images are {images.shape}, masks {values['truth'].shape}; delete the file")
    if len(values["names"]) != len(images) or len(values["segments"]) < 2:
        raise UserError(f"{path}: {len(values['names'])} names of {len(images)} images; delete the file")
