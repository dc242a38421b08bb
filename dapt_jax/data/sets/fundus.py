"""Retinal photographs: vessels (DRIVE) and lesions (IDRiD)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dapt_jax.data.masks import Parts
from dapt_jax.data.records import Record
from dapt_jax.data.sets import tree
from dapt_jax.data.sets.registry import SEGMENTATION, TWO_SPLITS, file_set
from dapt_jax.errors import UserError, nearest

LESIONS = {
    "microaneurysm": "MA",
    "haemorrhage": "HE",
    "hard exudate": "EX",
    "soft exudate": "SE",
    "optic disc": "OD",
}


@file_set(
    kind="drive",
    title="DRIVE",
    recipe="training.zip and test.zip after registration (drive.grand-challenge.org)",
    licence="terms of its page, after registration",
    size="40 photographs",
    splits="official: training/ (20) and test/ (20)",
    layout=(
        "training/images/21_training.tif with training/1st_manual/21_manual1.gif, or train/images with "
        "train/labels"
    ),
    classes=("retina",),
    tasks=(SEGMENTATION,),
    segments=("background", "vessel"),
    official=TWO_SPLITS,
)
def drive(root: Path) -> Iterator[Record]:
    """Yield photographs `<id>_*` with the vessels of the first observer, `<id>_manual1`.

    Vessels are pixels brighter than 127.
    """
    splits = {"training": "train", "train": "train", "validate": "val", "val": "val", "test": "test"}
    for folder in tree.folders(root, splits):
        drawn = tree.first(folder, "1st_manual", "labels")
        known = {tree.stem(file.name): file for file in tree.images(drawn)} if drawn else {}
        for file in tree.images(tree.needed(folder, "images")):
            written = tree.relative(file, root)
            vessels = known.get(f"{file.name.partition('_')[0]}_manual1")
            yield Record(
                written,
                image=file,
                written=written,
                labels=("retina",),
                mask=Parts(((vessels, 1),), like=file, above=127) if vessels else None,
                columns={"split": splits[folder.name]},
            )


def _segments(lesions: Sequence[str] = ()) -> tuple[str, ...]:
    return ("background", *(lesions or LESIONS))


@file_set(
    kind="idrid",
    title="IDRiD (segmentation)",
    recipe="A. Segmentation.zip (ieee-dataport.org, Indian Diabetic Retinopathy Image Dataset)",
    licence="CC BY 4.0",
    size="81 photographs of 4288 x 2848 pixels",
    splits="official: a. Training Set (54) and b. Testing Set (27)",
    layout=(
        "1. Original Images/a. Training Set/IDRiD_01.jpg and 2. All Segmentation "
        "Groundtruths/.../IDRiD_01_MA.tif"
    ),
    classes=("retina",),
    tasks=(SEGMENTATION,),
    segments=_segments,
    overlapping=True,
    counts={"train": 54, "test": 27},
    official=TWO_SPLITS,
)
def idrid(root: Path, *, lesions: Sequence[str] = ()) -> Iterator[Record]:
    """Yield photographs with one file per lesion.

    Lesions overlap, so masks are bit fields. A missing file means no such lesion.

    Args:
        root: Folder of the data set.
        lesions: The wanted lesions in order, out of microaneurysm, haemorrhage, hard exudate, soft exudate,
            optic disc; by default all five.
    """
    for lesion in lesions:
        if lesion not in LESIONS:
            raise UserError(f"lesions name {lesion!r}; {nearest(lesion, LESIONS)}")
    known = {
        tree.stem(file.name): file
        for file in tree.images(tree.needed(root, "2. All Segmentation Groundtruths"))
    }
    for file in tree.images(tree.needed(root, "1. Original Images")):
        written = tree.relative(file, root)
        parts = tuple(
            (known[name], 1 << bit)
            for bit, lesion in enumerate(lesions or LESIONS)
            if (name := f"{tree.stem(file.name)}_{LESIONS[lesion]}") in known
        )
        yield Record(
            written,
            image=file,
            written=written,
            labels=("retina",),
            mask=Parts(parts, like=file),
            columns={"split": "train" if "Training" in file.parent.name else "test"},
        )
