"""Chest radiographs with masks: lungs (Montgomery) and pneumothoraces (SIIM-ACR)."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from dapt_jax.data import dicom, masks
from dapt_jax.data.identity import split_name
from dapt_jax.data.lists import read_columns
from dapt_jax.data.masks import Mask, Parts, Rle
from dapt_jax.data.records import Record
from dapt_jax.data.sets import tree
from dapt_jax.data.sets.chest_lists import TUBERCULOSIS, class_in_name
from dapt_jax.data.sets.registry import CLASSIFICATION, SEGMENTATION, TWO_SPLITS, file_set
from dapt_jax.errors import UserError, nearest

PNEUMOTHORAX = ("no pneumothorax", "pneumothorax")


@file_set(
    kind="montgomery",
    title="Montgomery",
    recipe="NLM-MontgomeryCXRSet.zip of the NLM (openi.nlm.nih.gov, tuberculosis chest X-rays)",
    licence="free to use; the NLM asks to be cited",
    size="138 images of 138 patients (80 normal, 58 tuberculosis)",
    splits="none",
    layout="CXR_png/MCUCXR_<number>_<0 or 1>.png, ManualMask/leftMask/ and ManualMask/rightMask/",
    classes=TUBERCULOSIS,
    tasks=(SEGMENTATION, CLASSIFICATION),
    segments=("background", "lung"),
)
def montgomery(root: Path) -> Iterator[Record]:
    """Yield images and the masks of the two lungs with the same name, which are merged."""
    left, right = tree.needed(root, "leftMask"), tree.needed(root, "rightMask")
    for file in tree.images(tree.needed(root, "CXR_png")):
        written = tree.relative(file, root)
        label = class_in_name(root, written)
        lungs = Parts(((left / file.name, 1), (right / file.name, 1)), like=file)
        yield Record(written, image=file, written=written, labels=(label,), mask=lungs)


@file_set(
    kind="siim_acr",
    title="SIIM-ACR Pneumothorax",
    recipe=(
        "kaggle datasets download of the SIIM-ACR Pneumothorax Segmentation data: DICOM files and "
        "train-rle.csv"
    ),
    licence="rules of the Kaggle competition",
    size="12,047 images with run lengths (second stage)",
    splits="those of the first stage, by the folders dicom-images-train and dicom-images-test (10,675 and "
    "1,372), or train/, val/, test/ of one's own; the papers split 80/20 at random",
    layout="DICOM files in any folder with train-rle.csv, or images/ and masks/ with files of the same name, "
    "in folders of splits or not",
    classes=PNEUMOTHORAX,
    tasks=(SEGMENTATION, CLASSIFICATION),
    segments=("background", "pneumothorax"),
    official=TWO_SPLITS,
)
def siim_acr(root: Path, *, table: str = "") -> Iterator[Record]:
    """Yield DICOM files with run lengths from a table, or with mask files.

    The table has the columns ImageId and EncodedPixels and one row per finding, -1 for none.

    Args:
        root: Folder of the data set.
        table: Name of the table; by default train-rle.csv or stage_2_train.csv; if neither exists, masks/ is
            required.
    """
    path = tree.needed(root, table) if table else tree.first(root, "train-rle.csv", "stage_2_train.csv")
    for place, written, file, mask, sick in _runs(root, path) if path else _files(root):
        patient = dicom.header(file, ("PatientID",))[0] if file.suffix == ".dcm" and file.is_file() else ""
        yield Record(
            place,
            image=file,
            written=written,
            labels=(PNEUMOTHORAX[sick],),
            mask=mask,
            group=patient,
            columns={"split": _split(file, root)},
        )


def _split(file: Path, root: Path) -> str:
    """Return the split that a folder above a file names; "" where none does."""
    above = file.relative_to(root).parts[:-1] if file.is_relative_to(root) else ()
    return next((split for part in above if (split := split_name(part.removeprefix("dicom-images-")))), "")


def _runs(root: Path, path: Path) -> Iterator[tuple[str, str, Path, Mask, bool]]:
    places, columns = read_columns(path, "table")
    for column in ("ImageId", "EncodedPixels"):
        if column not in columns:
            raise UserError(f"{path}: no column {column!r}; {nearest(column, columns)}")
    rows = defaultdict(list)
    for place, image, runs in zip(places, columns["ImageId"], columns["EncodedPixels"], strict=True):
        if not image:
            raise UserError(f"{path}: {place}: no image named in column 'ImageId'")
        rows[image].append((place, runs))
    find = tree.finder(root)
    for image, found in rows.items():
        first, written = found[0][0], tuple(text for _, text in found)
        file = find(f"{image}.dcm")
        sick = any(text not in ("", "-1") for text in written)
        yield f"{path.name} {first}", image, file, Rle(written, file, f"{path}: {first}"), sick


def _files(root: Path) -> Iterator[tuple[str, str, Path, Mask, bool]]:
    # An image without pneumothorax has an empty mask file: only its contents show this.
    tree.needed(root, "images")
    for images in sorted(root.rglob("images")):
        find = tree.finder(tree.needed(images.parent, "masks"))
        for file in tree.images(images):
            mask = Parts(((find(file.name), 1),), like=file)
            written = tree.relative(file, root)
            yield written, written, file, mask, bool(masks.read(mask).any())
