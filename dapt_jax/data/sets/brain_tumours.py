"""Brain tumours in MR slices: BraTS, CE-MRI (figshare 1512427) and Kaggle's collection."""

from collections.abc import Iterator
from pathlib import Path

import scipy.io

from dapt_jax.data import arrays, nifti
from dapt_jax.data.lists import read_columns
from dapt_jax.data.plane import Plane, Window
from dapt_jax.data.records import Record
from dapt_jax.data.sets import tree
from dapt_jax.data.sets.registry import CLASSIFICATION, SEGMENTATION, TWO_SPLITS, file_set
from dapt_jax.errors import UserError, nearest

GRADES = ("LGG", "HGG")
TUMOURS = ("meningioma", "glioma", "pituitary")
SLICES = ("tumour", "all")


@file_set(
    kind="brats",
    title="BraTS",
    recipe="MICCAI_BraTS2020_TrainingData after registration (med.upenn.edu/cbica/brats2020)",
    licence="terms of the challenge, after registration",
    size="369 patients in 2020; 24,422 slices with tumour",
    splits="none for the labelled part",
    layout=(
        "a folder per patient with <patient>_t1.nii.gz and <patient>_seg.nii.gz; grades in "
        "name_mapping.csv or as folders"
    ),
    classes=GRADES,
    tasks=(CLASSIFICATION, SEGMENTATION),
    # 4 until 2021, 3 since: both are the enhancing part.
    segments=("background", "necrotic core", "oedema", "enhancing tumour", "enhancing tumour"),
)
def brats(root: Path, *, modality: str = "t1", slices: str = "tumour", window: str = "") -> Iterator[Record]:
    """Yield axial slices, with column `slice`.

    Args:
        root: Folder of the data set.
        modality: End of the file names: t1, t1ce, t2, flair.
        slices: "tumour" selects slices in which the mask marks something, "all" every slice.
        window: Black and white, see `Window.parse`; by default the 1st and 99th percentile of the volume.
    """
    if slices not in SLICES:
        raise UserError(f"slices={slices!r}; {nearest(slices, SLICES)}")
    shown, grades = Window.parse(window), _grades(root)
    for drawn in [file for file in tree.images(root) if tree.stem(file.name).endswith(("_seg", "-seg"))]:
        patient = tree.stem(drawn.name)[: -len("_seg")]
        mark, suffix = drawn.name[len(patient)], drawn.name[len(patient) + len("_seg") :]
        image = drawn.with_name(f"{patient}{mark}{modality}{suffix}")
        if not image.is_file():
            there = [file.name for file in tree.images(drawn.parent)]
            raise UserError(f"{image}: no such file, modality={modality!r}; {nearest(image.name, there)}")
        above = [folder for folder in drawn.relative_to(root).parts if folder in GRADES]
        grade = grades.get(patient) or (above[0] if above else "")
        if not grade:
            raise UserError(
                f"{drawn}: no grade of {patient}; expected it in name_mapping.csv, or a folder LGG or HGG "
                "above"
            )
        marked = [bool(part.any()) for part in nifti.slices(drawn)]
        for index, some in enumerate(marked):
            if some or slices == "all":
                place = f"{tree.relative(image, root)}[{index}]"
                yield Record(
                    place,
                    image=Plane(image, index, window=shown),
                    written=place,
                    labels=(grade,),
                    mask=Plane(drawn, index),
                    group=patient,
                    columns={"slice": str(index)},
                )


def _grades(root: Path) -> dict[str, str]:
    """Return the grade of each patient, from the table whose name starts with name_mapping."""
    path = next(iter(sorted(root.rglob("name_mapping*.csv"))), None)
    if path is None:
        return {}
    _, columns = read_columns(path, "table")
    if "Grade" not in columns:
        raise UserError(f"{path}: no column 'Grade'; {nearest('Grade', columns)}")
    names = [column for column in columns if column.startswith("BraTS") and column.endswith("ubject_ID")]
    return {
        patient: grade
        for name in names
        for patient, grade in zip(columns[name], columns["Grade"], strict=True)
    }


@file_set(
    kind="ce_mri",
    title="CE-MRI brain tumours",
    recipe="the four archives of figshare 1512427, unpacked into one folder, and cvind.mat",
    licence="CC BY 4.0 as far as known",
    size="3,064 slices of 233 patients (708 meningioma, 1,426 glioma, 930 pituitary)",
    splits="five folds in cvind.mat (column `fold`); by patient",
    layout="1.mat to 3064.mat (MATLAB v7.3, structure cjdata)",
    classes=TUMOURS,
    tasks=(CLASSIFICATION, SEGMENTATION),
    segments=("background", "tumour"),
)
def ce_mri(root: Path, *, window: str = "") -> Iterator[Record]:
    """Yield MATLAB files with cjdata/image, label (1 to 3), PID and tumorMask.

    Column `fold` is present if cvind.mat exists.

    Args:
        root: Folder of the files.
        window: Black and white, see `Window.parse`; by default the range of the set.
    """
    shown, folds = Window.parse(window), _folds(tree.first(root, "cvind.mat"))
    numbered = {int(file.stem): file for file in root.rglob("*.mat") if file.stem.isdecimal()}
    for number, file in sorted(numbered.items()):
        label = int(arrays.scalar(file, "cjdata/label")[0])
        if not 1 <= label <= len(TUMOURS):
            raise UserError(f"{file}: cjdata/label is {label}, expected 1, 2 or 3 for {', '.join(TUMOURS)}")
        if folds and number > len(folds):
            raise UserError(f"{file}: cvind.mat has {len(folds)} folds, none for this file")
        yield Record(
            tree.relative(file, root),
            image=Plane(file, key="cjdata/image", window=shown),
            written=file.name,
            labels=(TUMOURS[label - 1],),
            mask=Plane(file, key="cjdata/tumorMask"),
            group="".join(chr(code) for code in arrays.scalar(file, "cjdata/PID")),
            columns={"fold": folds[number - 1]} if folds else {},
        )


def _folds(path: Path | None) -> list[str]:
    """Return the fold of each file, from a MATLAB file of either version."""
    if path is None:
        return []
    try:
        found = scipy.io.loadmat(path)["cvind"].ravel()
    except (NotImplementedError, ValueError):
        found = arrays.scalar(path, "cvind")
    return [str(int(fold)) for fold in found]


@file_set(
    kind="kaggle_bttc",
    title="Kaggle BTTC",
    recipe="kaggle datasets download sartajbhuvaji/brain-tumor-classification-mri",
    licence="none stated by the sources of its images",
    size="3,264 slices (2,870 + 394); most repeat CE-MRI's, see docs/brain_mri.md",
    splits="official: Training/ and Testing/; no patients are named",
    layout="Training/glioma_tumor/*.jpg and so on, Testing/ likewise",
    classes=("glioma", "meningioma", "pituitary", "no tumour"),
    counts={"train": 2870, "test": 394},
    official=TWO_SPLITS,
)
def kaggle_bttc(root: Path) -> Iterator[Record]:
    """Yield the images of a folder per split and class; classes are named as in CE-MRI."""
    for folder in tree.folders(root, ("Training", "Testing")):
        split = "train" if folder.name == "Training" else "test"
        for file in tree.images(folder):
            written = tree.relative(file, root)
            label = "no tumour" if file.parent.name == "no_tumor" else file.parent.name.removesuffix("_tumor")
            yield Record(written, image=file, written=written, labels=(label,), columns={"split": split})
