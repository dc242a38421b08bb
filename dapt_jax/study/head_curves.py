"""Scores of heads after every epoch of their training, as arXiv 2204.13280 reports them.

The paper prints the mean of a test set's AUC over all epochs of the head, and its spread as box plots; the
score of the trained head is what a study compares otherwise.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from dapt_jax import metrics
from dapt_jax.metrics import Score
from dapt_jax.runtime import atomic_files, processes
from dapt_jax.statistics import mean_of_defined
from dapt_jax.study.predictions import classes_outside
from dapt_jax.study.tasks import ArmKey, ResultRow, Task, result_rows

FOLDER = "head_curves"
"""Folder of the curves in a workdir."""

Fold = tuple[np.ndarray, np.ndarray]
ByEpoch = Float[np.ndarray, "folds epochs n classes"]


def curves(task: Task, folds: list[Fold], probabilities: Mapping[str, ByEpoch]) -> dict[str, np.ndarray]:
    """Return the AUC after every epoch, mean over the folds that define it, by split: float64 [epochs].

    A class that a fold's head had not seen in training does not count there, as in the score `auc`.

    Args:
        task: The task.
        folds: Training and scored rows of each fold.
        probabilities: Probabilities by each fold's head after every epoch, by split; `development` of all
            development rows.
    """
    classes, found = task.development.classes, dict[str, np.ndarray]()
    for split, of_folds in probabilities.items():
        held = split == "development"
        truth = (task.development if held else task.held_out[split]).truth
        of_fold = []
        for (_, rows), by_epoch in zip(folds, of_folds, strict=True):
            chosen = rows if held else np.arange(len(truth))
            if len(chosen):
                seen = classes_outside(task.development, rows)
                of_fold.append(
                    [metrics.mean_auc(truth[chosen], each[chosen], classes, seen) for each in by_epoch]
                )
        if of_fold:
            found[task.scored if held else split] = mean_of_defined(np.asarray(of_fold))
    return found


def rows(task: Task, key: ArmKey, protocol: str, found: Mapping[str, np.ndarray]) -> Iterator[ResultRow]:
    """Yield result lines of mean and deviation over epochs of the curves of `curves`.

    Args:
        task: The task.
        key: Key of the results.
        protocol: The protocol.
        found: The curves.
    """
    classes = task.development.classes
    scores = {}
    for split, curve in found.items():
        count = len(task.scored_rows) if split == task.scored else len(task.held_out[split])
        pair = (("auc_epochs", curve.mean()), ("auc_epochs_sd", curve.std()))
        scores[split] = [[Score(name, float(value), count, classes) for name, value in pair]]
    return result_rows(task, key, protocol, classes, scores)


def write(workdir: Path, key: ArmKey, task: Task, protocol: str, found: Mapping[str, np.ndarray]) -> None:
    """Write the curves as `head_curves/STRATEGY-seedN/TASK-PROTOCOL.csv`: a line per epoch, a column per split."""
    if not found or not processes.is_primary():
        return
    lines = [",".join(("epoch", *found))]
    for epoch, values in enumerate(zip(*found.values(), strict=True), start=1):
        lines.append(",".join((str(epoch), *(f"{value:.6f}" for value in values))))
    path = workdir / FOLDER / f"{key.strategy}-seed{key.seed}" / f"{task.name}-{protocol}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(path, "\n".join(lines) + "\n")
