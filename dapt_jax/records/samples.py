"""Sample images of a study, and a map of features, stored for the report.

`WORKDIR/samples/sets/SET.npz` holds a `Sheet` of each set, and the set's numbers of images and patients.
`WORKDIR/samples/STRATEGY-seedN/TASK-SPLIT.npz` holds `Examples` of an arm's predictions, and
`TASK-features.npz` beside them a `FeatureMap`. Workdirs of earlier versions have none of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dapt_jax.errors import UserError
from dapt_jax.records import arrays
from dapt_jax.runtime import safe_paths

FOLDER = "samples"
"""Name of the folder in a workdir."""
KINDS = ("right", "wrong", "surest wrong")
"""Kinds of examples."""


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Sample images of a set, in small.

    Attributes:
        title: Name of the set: "corpus", or task and split.
        count: Number of images of the set.
        patients: Number of its patients, where an image without one counts as one; 0 where none names one.
        size: Pixels of a side of the images as the network sees them.
        images: uint8 [k, h, w, 3].
        labels: str [k], names of the classes of each image.
    """

    title: str
    count: int
    patients: int
    size: int
    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Examples:
    """Images that a network predicts right or wrong, in small.

    Attributes:
        protocol: The protocol of the predictions.
        kinds: str [k], one of `KINDS` for each image.
        names: str [k], names of the files.
        images: uint8 [k, h, w, 3].
        labels: str [k], true classes.
        predicted: str [k], predicted classes.
        probabilities: float [k], predicted probability of the predicted class.
        saliency: float32 [k, h, w], how far that probability falls without each square of the image; NaN for
            images of which it was not computed. None where it was computed of none, as in workdirs of earlier
            versions.
    """

    protocol: str
    kinds: np.ndarray
    names: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray
    saliency: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """The first two principal components of the features of some images.

    Attributes:
        points: float32 [k, 2].
        explained: float [2], share of the variance along each component.
        splits: str [k], the split of each image.
        labels: str [k], its classes.
        sources: str [k], its source; empty where none is named.
    """

    points: np.ndarray
    explained: np.ndarray
    splits: np.ndarray
    labels: np.ndarray
    sources: np.ndarray


Record = TypeVar("Record", Sheet, Examples, FeatureMap)

_AXES = {
    "images": 4,
    "saliency": 3,
    "points": 2,
    "title": 0,
    "protocol": 0,
    "count": 0,
    "patients": 0,
    "size": 0,
}
_DTYPES = {"images": "u", "points": "f", "explained": "f", "probabilities": "f", "saliency": "f"}
_DTYPES |= {"count": "iu", "patients": "iu", "size": "iu"}


def sheet_path(workdir: Path, title: str) -> Path:
    """Return the path of the sample images of a set."""
    return _path(workdir, f"sets/{title}")


def examples_path(workdir: Path, strategy: str, seed: object, task: str, split: str) -> Path:
    """Return the path of an arm's examples of a split."""
    return _path(workdir, f"{strategy}-seed{seed}/{task}-{split}")


def feature_map_path(workdir: Path, strategy: str, seed: object, task: str) -> Path:
    """Return the path of the map of an arm's features of a task."""
    return _path(workdir, f"{strategy}-seed{seed}/{task}-features")


def write(path: Path, record: Sheet | Examples | FeatureMap) -> None:
    """Write a record atomically."""
    arrays.write(path, {name: value for name, value in vars(record).items() if value is not None})


def read(kind: type[Record], path: Path) -> Record | None:
    """Read a record; None without such a file.

    Raises:
        UserError: The file is damaged; names it.
    """
    if not path.is_file():
        return None
    values = arrays.read(path)
    fields = dataclasses.fields(kind)
    names = [field.name for field in fields if field.name in values or field.default is dataclasses.MISSING]
    if missing := [name for name in names if name not in values]:
        raise UserError(f"{path}: no array {missing[0]!r}; delete the file")
    _check(path, {name: values[name] for name in names})
    return kind(**{name: _plain(values[name]) for name in names})


def read_examples(workdir: Path, strategy: str, seed: object, task: str, split: str) -> Examples | None:
    """Read an arm's examples of a split; None without them, and under a name that no study accepts."""
    return _read_named(Examples, lambda: examples_path(workdir, strategy, seed, task, split))


def read_feature_map(workdir: Path, strategy: str, seed: object, task: str) -> FeatureMap | None:
    """Read the map of an arm's features; None without one, and under a name that no study accepts."""
    return _read_named(FeatureMap, lambda: feature_map_path(workdir, strategy, seed, task))


def _read_named(kind: type[Record], path_of: Callable[[], Path]) -> Record | None:
    try:
        path = path_of()
    except UserError:
        return None
    return read(kind, path)


def read_sheets(workdir: Path) -> list[Sheet]:
    """Return the sample images of every set, the corpora first."""
    found = [read(Sheet, path) for path in sorted((workdir / FOLDER / "sets").glob("*.npz"))]
    return sorted((each for each in found if each), key=lambda sheet: (" " in sheet.title, sheet.title))


def _plain(value: np.ndarray) -> Any:
    return value.item() if value.ndim == 0 else value


def _path(workdir: Path, name: str) -> Path:
    return workdir.joinpath(*safe_paths.check(f"{FOLDER}/{name}.npz", workdir))


def _check(path: Path, values: Mapping[str, np.ndarray]) -> None:
    """Refuse arrays whose axes, types or lengths do not match."""
    lengths = {}
    for name, value in values.items():
        axes, dtypes = _AXES.get(name, 1), _DTYPES.get(name, "U")
        if value.ndim != axes or value.dtype.kind not in dtypes:
            raise UserError(f"{path}: {name} is {value.dtype} with {value.ndim} axes; delete the file")
        if axes and name != "explained":
            lengths[name] = len(value)
    if len(set(lengths.values())) != 1:
        raise UserError(f"{path}: arrays of the lengths {lengths}; delete the file")
    images = values.get("images")
    if images is not None and (images.shape[3] != 3 or images.dtype != np.uint8):
        raise UserError(f"{path}: images are {images.dtype} {images.shape}; delete the file")
    if "points" in values and (values["points"].shape[1] != 2 or values["explained"].shape != (2,)):
        raise UserError(f"{path}: points are {values['points'].shape}; delete the file")
