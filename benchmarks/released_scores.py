"""The released results of arXiv 2410.18677 as arrays: robustness scores and downstream Dice of every checkpoint."""

import collections
import csv
import dataclasses
from pathlib import Path

import numpy as np

from dapt_jax.errors import UserError

LENGTHS = (1, 5, 20, 50, 100, 150, 200, 250, 300)
"""Epochs of pre-training of the checkpoints. The files' length 0 repeats length 300 in the scores, and is
left out."""
ENCODERS = {
    "resnet50": "ResNet50 Attention U-Net",
    "u-net_encoder": "basic U-Net",
    "swin_transformer": "Swin U-Net",
}
DISTANCES = ("cosine_distance", "l2_loss", "inv_pearson_corr")
MARGINS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True, order=True)
class Variant:
    """One way to compute the score; `level` counts from the bottleneck, 1, as the paper's -1, to the shallowest."""

    distance: str
    margin: float
    pooled: bool
    level: int

    def __str__(self) -> str:
        return f"{self.distance}, margin {self.margin:g}, {'pooled' if self.pooled else 'dense'}, level -{self.level}"


DEFAULT = Variant("cosine_distance", 0.5, True, 2)


@dataclasses.dataclass(frozen=True)
class Released:
    """The results as arrays over 18 score cells (encoder x dataset x scheme).

    Attributes:
        cells: encoder, dataset and scheme of each score cell.
        goodness: by variant, [18, 9]: minus the robustness loss, so that higher is better.
        dice: [18, 2, 9] mean over seeds in points, by freeze mode (fine-tuned, frozen).
    """

    cells: list[tuple[str, str, str]]
    goodness: dict[Variant, np.ndarray]
    dice: np.ndarray

    @property
    def gain(self) -> np.ndarray:
        """Dice points won or lost against 300 epochs, [18, 2, 9]."""
        return self.dice - self.dice[..., -1:]

    def group(self, name: str) -> np.ndarray:
        """What each score cell is held out with, by `encoder`, `dataset` or `cell`."""
        if name == "cell":
            return np.asarray(["/".join(cell) for cell in self.cells])
        return np.asarray([cell[("encoder", "dataset").index(name)] for cell in self.cells])


def load(folder: Path) -> Released:
    """Reads the two files.

    Raises:
        UserError: a file is not there, or lacks a column or a checkpoint.
    """
    scores = _read(
        folder / "medseg_robustness_scores.csv", ("encoder", "dataset", "pretraining_length", "robustness")
    )
    results = _read(folder / "medseg_downstream_scores.csv", ("model", "dataset", "pretraining length"))
    found: dict[tuple[str, str, str], dict[tuple[Variant, int], float]] = collections.defaultdict(dict)
    deepest = {name: max(int(row["level"]) for row in scores if row["encoder"] == name) for name in ENCODERS}
    for row in scores:
        cell = (row["encoder"], row["dataset"], row["pretraining_scheme"].removesuffix("_training"))
        level = deepest[row["encoder"]] + 1 - int(row["level"])
        variant = Variant(row["metric"], float(row["margin"]), row["pooled"] == "True", level)
        found[cell][variant, int(row["pretraining_length"])] = float(row["robustness"])
    cells = sorted(found)
    by_model = {model: encoder for encoder, model in ENCODERS.items()}
    seeds: dict[tuple[str, str, str, bool, int], list[float]] = collections.defaultdict(list)
    for row in results:
        dataset = row["dataset"].replace("COVIDQUDataset", "COVID-QU")
        dice = row["mean dice index"] or row["dice index"]
        key = (by_model[row["model"]], dataset, row["pretraining scheme"], row["freeze encoder"] == "True")
        seeds[(*key, int(row["pretraining length"]))].append(100 * float(dice))
    try:
        dice = np.array(
            [[[np.mean(seeds[(*c, frozen, n)]) for n in LENGTHS] for frozen in (False, True)] for c in cells]
        )
        shared = sorted(set.intersection(*({variant for variant, _ in values} for values in found.values())))
        goodness = {v: -np.array([[found[cell][v, n] for n in LENGTHS] for cell in cells]) for v in shared}
    except KeyError as error:
        raise UserError(
            f"{folder}: no result for {error.args[0]}; expected every checkpoint of {LENGTHS}"
        ) from error
    return Released(cells, goodness, dice)


def _read(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the released results in --reference")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for column in columns:
        if not rows or column not in rows[0]:
            raise UserError(f"{path}: no column {column!r}; expected the file as its authors released it")
    return rows
