"""CheXpert: 14 observations with many uncertain labels."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from dapt_jax.data.dataset import Dataset
from dapt_jax.data.lists import read_columns
from dapt_jax.data.paths import named
from dapt_jax.data.records import Record
from dapt_jax.data.sets import tree
from dapt_jax.data.sets.registry import file_set
from dapt_jax.errors import UserError, nearest

CLASSES = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
POLICIES = ("lsr_ones", "lsr_zeros", "ones", "zeros", "ignore")
SMOOTHED = {"lsr_ones": (0.55, 0.85), "lsr_zeros": (0.0, 0.3)}
"""Bounds between which the target of an uncertain label is drawn, again for every image and epoch (Pham et
al., 2021)."""
BLANKS = {"zeros": 0.0, "ignore": float("nan")}


def _smoothed(dataset: Dataset, uncertain: str = POLICIES[0], blanks: str = "zeros") -> Dataset:
    bounds = SMOOTHED.get(uncertain)
    return replace(dataset, uncertain=bounds) if bounds and (dataset.labels == -1).any() else dataset


@file_set(
    kind="chexpert",
    title="CheXpert",
    recipe="CheXpert-v1.0-small.zip after registration (stanfordmlgroup.github.io/competitions/chexpert)",
    licence="Stanford University Dataset Research Use Agreement",
    size="223,414 + 234 images (train.csv, valid.csv)",
    splits="official: train.csv and valid.csv; the papers test on valid.csv",
    layout="train.csv, valid.csv, and the images below train/ and valid/",
    classes=CLASSES,
    multi_label=True,
    counts={"train": 223414, "val": 234},
    official={"train": "train", "test": "val"},
    finish=_smoothed,
)
def chexpert(root: Path, *, uncertain: str = POLICIES[0], blanks: str = "zeros") -> Iterator[Record]:
    """Yield the rows of the official tables.

    Columns are Path, Sex, Age, Frontal/Lateral, AP/PA, and 14 labels that are 1, 0, -1 or blank.

    Args:
        root: Folder of train.csv.
        uncertain: Meaning of -1: "ones", "zeros", "ignore" (missing), "lsr_ones" or "lsr_zeros" (a target
            drawn between bounds, see `Dataset.uncertain`).
        blanks: Meaning of a blank: "zeros", as in the papers, or "ignore".
    """
    if uncertain not in POLICIES:
        raise UserError(f"uncertain={uncertain!r}; {nearest(uncertain, POLICIES)}")
    if blanks not in BLANKS:
        raise UserError(f"blanks={blanks!r}; {nearest(blanks, BLANKS)}")
    unsure = {"ones": 1.0, "zeros": 0.0, "ignore": np.nan}.get(uncertain, -1.0)
    meaning = {"1": 1.0, "0": 0.0, "-1": unsure, "": BLANKS[blanks]}
    for split, name in (("train", "train.csv"), ("val", "valid.csv")):
        path = tree.needed(root, name)
        places, columns = read_columns(path, "table")
        if missing := [column for column in ("Path", *CLASSES) if column not in columns]:
            raise UserError(f"{path}: no column {missing[0]!r}; {nearest(missing[0], columns)}")
        plain = [column for column in columns if column not in ("Path", *CLASSES)]
        for row, (place, written) in enumerate(zip(places, columns["Path"], strict=True)):
            if not written:
                raise UserError(f"{path}: {place}: no image named in column 'Path'")
            values = []
            for label in CLASSES:
                # The tables of the first release contain 1.0 and -1.0.
                cell = columns[label][row].removesuffix(".0")
                if cell not in meaning:
                    raise UserError(f"{path}: {place}: {label} is {cell!r}, expected 1, 0, -1 or blank")
                values.append(meaning[cell])
            patient = next((part for part in written.split("/") if part.startswith("patient")), "")
            yield Record(
                f"{path.name} {place}",
                image=_image(path.parent, written),
                written=written,
                values=tuple(values),
                group=patient,
                columns={"split": split, **{column: columns[column][row] for column in plain}},
            )


def _image(folder: Path, written: str) -> Path:
    """Return an image's path.

    Paths start with the name of the release, which is the folder of the table or is below it.
    """
    inside = named(folder, str(Path(*Path(written).parts[1:])))
    return inside if inside.is_file() else named(folder, written)
