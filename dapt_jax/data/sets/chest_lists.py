"""Chest radiographs with labels and splits from the lists of the benchmark papers."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dapt_jax.data.lists import class_name, flags, read_rows
from dapt_jax.data.records import Record
from dapt_jax.data.sets import tree
from dapt_jax.data.sets.registry import THREE_SPLITS, TWO_SPLITS, file_set

CHESTXRAY14 = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
VINDR = ("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding")
RSNA = ("Normal", "No Lung Opacity/Not Normal", "Lung Opacity")
TUBERCULOSIS = ("normal", "tuberculosis")


@file_set(
    kind="chestxray14",
    title="ChestX-ray14",
    recipe="NIH's images_001.tar.gz to images_012.tar.gz (nihcc.app.box.com), and the lists of "
    "MR-HosseinzadehTaher/BenchmarkTransferLearning (dataset/) beside them",
    licence="free to use; NIH asks to be named",
    size="112,120 images of 30,805 patients",
    splits="lists: train and val of the benchmark, test official; by patient",
    layout="*_train_official.txt, *_val_official.txt, *_test_official.txt and the PNGs in any folder",
    classes=CHESTXRAY14,
    multi_label=True,
    counts={"train": 75312, "val": 11212, "test": 25596},
    official=THREE_SPLITS,
)
def chestxray14(
    root: Path,
    *,
    lists: Sequence[str] = (
        "Xray14_train_official.txt",
        "Xray14_val_official.txt",
        "Xray14_test_official.txt",
    ),
) -> Iterator[Record]:
    """Yield rows "00000001_000.png 0 1 0 ...": an image and 14 flags.

    The patient is the number before the underscore.
    """
    yield from _flags(root, lists, CHESTXRAY14, suffix="")


@file_set(
    kind="vindr_cxr",
    title="VinDr-CXR",
    recipe="physionet.org/content/vindr-cxr/1.0.0 (credentialed), and the lists of "
    "jlianglab/BenchmarkTransformers "
    "(dataset/) beside them",
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    size="18,000 images",
    splits="lists: train and test official",
    layout="VinDrCXR_train_pe_global_one.txt, VinDrCXR_test_pe_global_one.txt and the images (DICOM or JPEG)",
    classes=VINDR,
    multi_label=True,
    counts={"train": 15000, "test": 3000},
    official=TWO_SPLITS,
)
def vindr_cxr(
    root: Path,
    *,
    lists: Sequence[str] = ("VinDrCXR_train_pe_global_one.txt", "VinDrCXR_test_pe_global_one.txt"),
) -> Iterator[Record]:
    """Yield rows "train_jpeg/<id> 0 0 0 0 0 1": an image without its suffix and 6 flags.

    The first flag is COPD in the set's own table of global labels; later code of the same group calls it PE.
    """
    yield from _flags(root, lists, VINDR, suffix=".jpeg", patients=False)


@file_set(
    kind="rsna_pneumonia",
    title="RSNA Pneumonia Detection",
    recipe="kaggle competitions download -c rsna-pneumonia-detection-challenge, and the lists of "
    "jlianglab/BenchmarkTransformers (dataset/) beside it",
    licence="rules of the Kaggle competition",
    size="26,684 images",
    splits="lists of the benchmark",
    layout=(
        "RSNAPneumonia_train.txt, RSNAPneumonia_val.txt, RSNAPneumonia_test.txt and the images (DICOM or PNG)"
    ),
    classes=RSNA,
    counts={"train": 21295, "val": 2680, "test": 2709},
    official=THREE_SPLITS,
)
def rsna_pneumonia(
    root: Path,
    *,
    lists: Sequence[str] = ("RSNAPneumonia_train.txt", "RSNAPneumonia_val.txt", "RSNAPneumonia_test.txt"),
) -> Iterator[Record]:
    """Yield rows "<id>.png 0": an image and the number of its class; `<id>.dcm` is also accepted."""
    yield from _numbered(root, lists, RSNA, separator=None)


@file_set(
    kind="shenzhen",
    title="Shenzhen",
    recipe="ChinaSet_AllFiles.zip of the NLM (openi.nlm.nih.gov, tuberculosis chest X-rays), and the lists "
    "of "
    "MR-HosseinzadehTaher/BenchmarkTransferLearning (dataset/) beside it",
    licence="free to use; the NLM asks to be cited",
    size="662 images of 662 patients (326 normal, 336 tuberculosis)",
    splits="lists of the benchmark; without them none",
    layout="CXR_png/CHNCXR_<number>_<0 or 1>.png, with the lists or without",
    classes=TUBERCULOSIS,
    counts={"train": 463, "val": 65, "test": 134},
    official=THREE_SPLITS,
)
def shenzhen(
    root: Path,
    *,
    lists: Sequence[str] = (
        "ShenzenCXR_train_data.txt",
        "ShenzenCXR_valid_data.txt",
        "ShenzenCXR_test_data.txt",
    ),
) -> Iterator[Record]:
    """Yield rows "CHNCXR_0402_1.png,1"; without lists, the digit before the suffix is the class."""
    if tree.lists(root, lists, required=False):
        yield from _numbered(root, lists, TUBERCULOSIS, separator=",")
        return
    for file in tree.images(root):
        if file.name.startswith("CHNCXR_"):
            written = tree.relative(file, root)
            label = class_in_name(root, written)
            yield Record(written, image=file, written=written, labels=(label,))


def class_in_name(root: Path, written: str) -> str:
    """Return the class at the end of an image name in the two tuberculosis sets."""
    return class_name(root, written, tree.stem(written)[-1:], TUBERCULOSIS)


def _flags(
    root: Path, names: Sequence[str], classes: Sequence[str], suffix: str, patients: bool = True
) -> Iterator[Record]:
    find = tree.finder(root)
    for split, path in tree.lists(root, names):
        for row in read_rows(path, 1 + len(classes)):
            image, *cells = row.cells
            yield Record(
                f"{path.name} {row.place}",
                image=find(image + suffix),
                written=image,
                values=flags(path, row.place, cells, classes),
                group=image.partition("_")[0] if patients else "",
                columns={"split": split},
            )


def _numbered(
    root: Path, names: Sequence[str], classes: Sequence[str], separator: str | None
) -> Iterator[Record]:
    find = tree.finder(root)
    for split, path in tree.lists(root, names):
        for row in read_rows(path, 2, separator):
            image, cell = row.cells
            label = class_name(path, row.place, cell, classes)
            place = f"{path.name} {row.place}"
            yield Record(place, image=find(image), written=image, labels=(label,), columns={"split": split})
