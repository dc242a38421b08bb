"""Sample images and maps of features that a study stores for its report: see `records.samples`."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from dapt_jax.data import facts
from dapt_jax.data.dataset import Dataset
from dapt_jax.records import samples
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.tasks import Task

TILES, EXAMPLES = 12, 4
"""Images of a contact sheet, and of each kind of examples."""
EXPLAINED = 2
"""Examples of each kind whose saliency is computed."""
POINTS = 500
"""Most images on a map of features."""
SIDE = 96
"""Most pixels of a side of a stored image."""
_SEED = 0

Explain = Callable[[str, np.ndarray, np.ndarray], np.ndarray]
"""Function from a split, rows of its scored images and their predicted classes to saliency [k, h, w]."""


def sheet_rows(dataset: Dataset) -> np.ndarray:
    """Return the rows of a contact sheet: classes in turn, each image of another patient where possible."""
    rng = np.random.default_rng(_SEED)
    queues = []
    for column in range(len(dataset.classes)):
        rows = rng.permutation(np.flatnonzero(facts.has_class(dataset, column)))
        first = np.unique(dataset.groups[rows], return_index=True)[1]
        queues.append([*rows[np.sort(first)], *np.delete(rows, first)])
    found: list[int] = []
    while any(queues) and len(found) < TILES:
        for queue in queues:
            row = next((int(row) for row in queue if row not in found), None)
            queue[:] = [each for each in queue if each != row]
            if row is not None and len(found) < TILES:
                found.append(row)
    return np.array(found or range(min(TILES, len(dataset))), np.int64)


def write_sheets(study: Study, workdir: Path) -> None:
    """Write a contact sheet of each set of a study: the images as the network sees them, in small."""
    sets: dict[str, Dataset] = {name or "corpus": corpus for name, corpus in study.corpora.items()}
    sets |= {f"{task.name} {split}": data for task in study.tasks for split, data in task.parts.items()}
    for title, dataset in sets.items():
        rows = sheet_rows(dataset)
        patients = 0 if facts.unnamed(dataset).all() else len(np.unique(dataset.groups))
        labels = _labels(dataset, rows)
        sheet = samples.Sheet(
            title, len(dataset), patients, dataset.images.size, _small(dataset, rows), labels
        )
        samples.write(samples.sheet_path(workdir, title), sheet)


def write_examples(
    workdir: Path,
    arm: Arm,
    task: Task,
    protocol: str,
    predicted: Mapping[str, Mapping[str, np.ndarray]],
    explain: Explain | None = None,
) -> None:
    """Write examples of right and wrong predictions on each split, of images of one class each.

    The surest wrong ones are those of the highest predicted probability; of the others, and of the right
    ones, a fixed random sample is taken.

    Args:
        workdir: Folder of the study.
        arm: The arm.
        task: The task.
        protocol: The protocol of the predictions.
        predicted: Probabilities by split and protocol, float [n, classes].
        explain: Function that computes the saliency of some of them; None for none.
    """
    for split, dataset in task.scored_sets(task.scored_rows).items():
        probabilities = predicted.get(split, {}).get(protocol)
        if probabilities is None or dataset.multi_label:
            continue
        guess, sure = probabilities.argmax(1), probabilities.max(1)
        rows_of = chosen(guess == dataset.truth, sure)
        rows = np.concatenate(list(rows_of.values()))
        classes = np.asarray(dataset.classes, str)
        saliency = None
        if explain is not None and len(rows):
            order = np.concatenate([np.arange(len(each)) for each in rows_of.values()])
            few = np.flatnonzero(order < EXPLAINED)
            maps = explain(split, rows[few], guess[rows[few]])
            saliency = np.full((len(rows), *maps.shape[1:]), np.nan, np.float32)
            saliency[few] = maps
        found = samples.Examples(
            protocol=protocol,
            kinds=np.repeat(list(rows_of), [len(each) for each in rows_of.values()]).astype(str),
            names=np.asarray([Path(dataset.images.names[row]).name for row in rows], str),
            images=_small(dataset, rows),
            labels=classes[dataset.truth[rows]],
            predicted=classes[guess[rows]],
            probabilities=sure[rows].astype(np.float64),
            saliency=saliency,
        )
        samples.write(samples.examples_path(workdir, arm.name, arm.seed, task.name, split), found)


def chosen(is_right: np.ndarray, sure: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows of the examples of each kind; no row comes twice.

    >>> found = chosen(np.array([True] + [False] * 6), np.array([0.9, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]))
    >>> found["surest wrong"].tolist(), len(found["wrong"])
    ([1, 2, 3, 4], 2)

    Args:
        is_right: Whether each prediction is right, bool [n].
        sure: Probability of the predicted class, float [n].
    """
    rng = np.random.default_rng(_SEED)
    wrong = np.flatnonzero(~is_right)
    surest = wrong[np.argsort(-sure[wrong], kind="stable")[:EXAMPLES]]
    rest = np.setdiff1d(wrong, surest)
    right = np.flatnonzero(is_right)
    return {
        "right": np.sort(rng.permutation(right)[:EXAMPLES]),
        "wrong": np.sort(rng.permutation(rest)[:EXAMPLES]),
        "surest wrong": surest,
    }


def write_feature_map(workdir: Path, arm: Arm, task: Task, features: Mapping[str, np.ndarray]) -> None:
    """Write the first two principal components of the features of at most `POINTS` images of all splits.

    Args:
        workdir: Folder of the study.
        arm: The arm.
        task: The task.
        features: Features by split, float [n, d].
    """
    total = sum(map(len, features.values()))
    rng = np.random.default_rng(_SEED)
    rows_of = {
        split: np.sort(rng.permutation(len(values))[: -(-POINTS * len(values) // max(total, POINTS))])
        for split, values in features.items()
    }
    together = np.concatenate([features[split][rows] for split, rows in rows_of.items()])[:POINTS]
    points, explained = principal_components(together)
    datasets = task.datasets
    sources = [_sources(datasets[split], rows) for split, rows in rows_of.items()]
    found = samples.FeatureMap(
        points=points,
        explained=explained,
        splits=np.repeat(list(rows_of), [len(rows) for rows in rows_of.values()]).astype(str)[:POINTS],
        labels=np.concatenate([_labels(datasets[split], rows) for split, rows in rows_of.items()])[:POINTS],
        sources=np.concatenate(sources)[:POINTS],
    )
    samples.write(samples.feature_map_path(workdir, arm.name, arm.seed, task.name), found)


def principal_components(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first two principal components, and the share of variance along each.

    >>> points, explained = principal_components(np.array([[0.0, 1.0, 1.0], [2.0, 1.0, 1.0]]))
    >>> points[:, 0].tolist(), explained.tolist()
    ([-1.0, 1.0], [1.0, 0.0])

    Args:
        features: float [n, d].

    Returns:
        float32 [n, 2] and float64 [2]; 0 along components that the features do not have. The largest loading
        of each component is positive, so that maps of a study do not flip.
    """
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(np.take_along_axis(vt, np.abs(vt).argmax(1)[:, None], 1))[:, 0]
    points, explained = np.zeros((len(features), 2), np.float32), np.zeros(2)
    known = min(2, len(s))
    points[:, :known] = (u * s * np.where(signs, signs, 1))[:, :known]
    if (total := (s**2).sum()) > 0:
        explained[:known] = (s**2)[:known] / total
    return points, explained


def _labels(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """Return the names of the classes of some images, joined by commas."""
    has = [facts.has_class(dataset, column)[rows] for column in range(len(dataset.classes))]
    named = [
        ", ".join(name for name, each in zip(dataset.classes, has, strict=True) if each[place])
        for place in range(len(rows))
    ]
    return np.asarray(named, str) if named else np.zeros(0, "U1")


def _sources(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    values = dataset.columns.get("source")
    return np.full(len(rows), "", "U1") if values is None else np.asarray(values, str)[rows]


def _small(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """Return images of at most `SIDE` pixels a side, uint8 [k, h, w, 3]."""
    images = dataset.images.batch(rows)
    if not len(images) or max(images.shape[1:3]) <= SIDE:
        return images
    scale = SIDE / max(images.shape[1:3])
    size = round(images.shape[2] * scale), round(images.shape[1] * scale)
    return np.stack([np.asarray(Image.fromarray(each).resize(size, Image.Resampling.BOX)) for each in images])
