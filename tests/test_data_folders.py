"""Folders as archives, cameras and other people leave them: every class is read whole, or a line says what was not."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dapt_jax.data.folders import load_folder
from dapt_jax.errors import UserError
from tests import medical_files as write

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPLITS = {
    "train": ["train", "Train", "TRAINING", "train_images", "Training Set", "1. Training", "trainset"],
    "val": ["val", "Valid", "VALIDATION", "val_data"],
    "test": ["test", "Testing", "TEST", "test-set"],
    "fold_0": ["fold_0", "Fold0", "FOLD 0", "fold-00"],
}


class Tree:
    """A folder in which pictures, no two alike, are quickly made."""

    def __init__(self, root: Path):
        self.root, self._made = root, 0

    def image(self, name: str, form: str = "PNG") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._made += 1
        noise = np.random.default_rng(self._made).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(noise).save(path, format=form)
        return path

    def file(self, name: str, content: bytes = b"text") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def read(self, **options):
        return load_folder(self.root, image_size=8, **options)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "root")


@FEW
@given(
    st.lists(st.sampled_from(sorted(SPLITS)), min_size=1, max_size=4, unique=True),
    st.randoms(),
    st.sampled_from(["SPLIT/CLASS", "CLASS/SPLIT", "SPLIT/SPLIT/CLASS", "wrapper/inner/SPLIT/CLASS"]),
)
def test_splits_of_any_spelling_are_splits_and_classes_are_classes(tmp_path, splits, random, layout):
    tree = Tree(tmp_path / "any")
    shutil.rmtree(tree.root, ignore_errors=True)
    spelt = {split: random.choice(SPLITS[split]) for split in splits}
    for folder in spelt.values():
        for label in ("no tumour", "glioma"):
            tree.image(layout.replace("SPLIT", folder).replace("CLASS", label) + "/1.png")
    data = tree.read()
    assert data.class_counts() == {"glioma": len(splits), "no tumour": len(splits)}
    assert sorted(data.columns["split"].tolist()) == sorted(splits * 2)
    for split, folder in spelt.items():
        assert len(data.where(f"split={split}")) == len(data.where(f"split={folder}")) == 2


@pytest.mark.parametrize(
    "system", ["__MACOSX", ".thumbnails", ".Trash", "@eaDir", "$RECYCLE.BIN", ".ipynb_checkpoints"]
)
@pytest.mark.parametrize("depth", ["", "train/", "train/a/"])
def test_folders_of_systems_are_left_out_and_named(tree, system, depth):
    for name in ("train/a/1.png", "train/b/1.png", f"{depth}{system}/a/2.png", "train/a/._1.png"):
        tree.image(name)
    tree.file("train/a/Thumbs.db")
    tree.file("train/a/.DS_Store")
    data = tree.read()
    assert data.class_counts() == {"a": 1, "b": 1}
    assert set(data.columns["split"].tolist()) == {"train"}
    assert any(f"left out system folder {system}" in note for note in data.notes)


@pytest.mark.parametrize(
    ("name", "form"),
    [("IM_0001", "PNG"), ("scan.001", "JPEG"), ("IMG.JFIF", "JPEG"), ("a.gif", "GIF"), ("slide", "TIFF"), ("x.dat", "BMP"),
     ("y.bin", "WEBP"), ("p.PGM", "PPM")],
)  # fmt: skip
def test_images_are_known_by_their_content_where_their_name_says_nothing(tree, name, form):
    tree.image(f"a/{name}", form)
    tree.image("b/1.png")
    assert tree.read().class_counts() == {"a": 1, "b": 1}


def test_dicom_files_of_any_name_are_read(tree):
    for number, name in enumerate(("MR.1.IMA", "IM_0000", "1.2.840.113", "x.DCM")):
        (tree.root / f"c{number}").mkdir(parents=True)
        write.dicom(tree.root / f"c{number}" / name, np.arange(64, dtype=np.uint16).reshape(8, 8) + number)
    assert list(tree.read().class_counts().values()) == [1, 1, 1, 1]


def test_what_is_no_image_is_named(tree):
    for name in ("a/1.png", "b/1.png"):
        tree.image(name)
    tree.file("a/notes.txt")
    tree.file("b/without_suffix", b"nothing that one could see")
    (note,) = tree.read().notes
    assert "left out files that are not images: .txt 1, no suffix 1 (in a, b)" in note


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("", "it is empty"),
        ("c/x.nii.gz", r"other kinds \(.nii.gz 1\).*scan\.nii\.gz\[12\]"),
        ("c/x.txt", r"\(.txt 1\)"),
    ],
)
@pytest.mark.parametrize("split", ["", "train/"])
def test_a_class_without_images_is_an_error_unless_it_is_dropped(tree, other, said, split):
    for name in ("a/1.png", "b/1.png"):
        tree.image(split + name)
    (tree.root / split / "c").mkdir()
    if other:
        tree.file(split + other)
    with pytest.raises(UserError, match=rf"c: a class folder without images; .*{said}.*drop_classes='c'"):
        tree.read()
    assert tree.read(drop_classes=("c",)).class_counts() == {"a": 1, "b": 1}
    assert tree.read(where="label=a").class_counts() == {"a": 1}


def test_masks_beside_or_below_images_are_no_images(tree):
    for number in range(3):
        tree.image(f"benign/benign ({number}).png")
        tree.image(f"benign/benign ({number})_mask.png")
        tree.image(f"covid/images/{number}.png")
        tree.image(f"covid/masks/{number}.png")
    tree.image("benign/benign (1)_mask_1.png")
    data = tree.read()
    assert data.class_counts() == {"benign": 3, "covid": 3}
    assert any("left out 4 masks beside their images" in note for note in data.notes)
    assert any("masks: left out, a folder of 3 images named as masks" in note for note in data.notes)


@pytest.mark.parametrize("masks", ["lung masks", "infection_masks", "Ground Truth", "LungSegmentation"])
def test_any_word_of_a_folders_name_makes_it_one_of_masks(tree, masks):
    for label in ("COVID", "masked"):  # a class may be named so
        tree.image(f"{label}/images/1.png")
        tree.image(f"{label}/{masks}/1.png")
    data = tree.read()
    assert data.class_counts() == {"COVID": 1, "masked": 1}
    assert any(f"{masks}: left out, a folder of 1 image named as masks" in note for note in data.notes)


def test_a_class_of_nothing_but_folders_of_masks_is_refused(tree):
    tree.image("a/1.png")
    tree.image("b/lung masks/1.png")
    with pytest.raises(
        UserError, match="b: a class folder without images; it holds 1 image in folders named as masks"
    ):
        tree.read()


@pytest.mark.parametrize("within", ["", "train/"])
def test_images_and_masks_are_no_classes(tree, within):
    for name in ("images/1.png", "masks/1.png"):
        tree.image(within + name)
    with pytest.raises(
        UserError, match=r"images, masks are folders of images and masks, not of classes.*kind 'manifest'"
    ):
        tree.read()


def test_splits_among_classes_are_refused_unless_declared(tree):
    for name in ("normal/1.png", "sick/1.png", "test/1.png"):
        tree.image(name)
    with pytest.raises(
        UserError, match=r"test: a folder named as a split, without class folders, beside normal, sick"
    ):
        tree.read()
    assert len(tree.read(classes=("normal", "sick", "test"))) == 3


def test_unlabelled_images_of_a_split_are_no_class(tree):
    for name in ("train/a/1.png", "train/b/1.png", "test/test/1.png", "val/a/2.png", "val/unknown/1.png"):
        tree.image(name)
    data = tree.read()
    assert data.class_counts() == {"a": 2, "b": 1, "unknown": 1}
    for words in ("test: left out 1 image in a folder named as a split", "'b' is in train alone, not in val"):
        assert any(words in note for note in data.notes), data.notes


def test_a_class_that_is_partly_divided_into_splits_is_refused(tree):
    for name in ("a/train/1.png", "a/test/1.png", "b/1.png"):
        tree.image(name)
    with pytest.raises(
        UserError, match=r"b: holds 1\.png outside of splits.*expected CLASS/SPLIT/image throughout"
    ):
        tree.read()


def test_links_are_followed_once_and_loops_and_broken_ones_are_named(tree):
    tree.image("a/1.png")
    elsewhere = tree.image("../elsewhere/2.png").parent
    (tree.root / "b").symlink_to(elsewhere, target_is_directory=True)
    (tree.root / "a" / "loop").symlink_to(tree.root / "a", target_is_directory=True)
    (tree.root / "a" / "gone.png").symlink_to(tree.root / "nowhere.png")
    data = tree.read()
    assert data.class_counts() == {"a": 1, "b": 1}
    assert any("loop: left out, a link that leads back" in note for note in data.notes)
    assert any("gone.png: left out, a link to a file that does not exist" in note for note in data.notes)
    os.symlink(tree.root / "a" / "1.png", tree.root / "b" / "copy.png")
    with pytest.raises(UserError, match=r"b/copy\.png is in a/1\.png already, as 'a', and here as 'b'"):
        tree.read()


def test_one_class_in_two_unicode_forms_is_one(tree):
    for split, label in (("train", "Mu\u0308ller"), ("test", "M\u00fcller")):
        tree.image(f"{split}/{label}/1.png")
        tree.image(f"{split}/other/1.png")
    assert tree.read().class_counts() == {"M\u00fcller": 2, "other": 2}
    tree.image("test/OTHER/3.png")
    with pytest.raises(UserError, match=r"label 'other'.*elsewhere 'OTHER'.*one spelling"):
        tree.read()


def test_the_patient_of_dicom_files_keeps_splits_apart(tree):
    for name, patient in (
        ("train/a/1.dcm", "P1"),
        ("train/b/1.dcm", "P2"),
        ("test/a/1.dcm", "P3"),
        ("test/b/1.dcm", "P1"),
    ):
        (tree.root / name).parent.mkdir(parents=True)
        write.dicom(tree.root / name, np.arange(64, dtype=np.uint16).reshape(8, 8), PatientID=patient)
    with pytest.raises(UserError, match="patient P1 is in splits 'test' and 'train'"):
        tree.read()


@pytest.mark.parametrize(
    ("folder", "counts", "splits", "named"),
    [
        ("folders/kaggle_brain", [8, 8, 8], ["test", "train"], ["Testing is test, Training is train"]),
        (
            "folders/kaggle_chest",
            [9, 9],
            ["test", "train", "val"],
            ["__MACOSX", "chest_xray: left out, a folder of 6"],
        ),
        ("folders/unlabelled_test", [3, 3], ["train"], ["test: left out 3 images in no class folder"]),
        ("no_suffix/set", [4, 4, 4, 4, 4], [], []),
    ],
)
def test_the_cases_of_folders(shared_cases, folder, counts, splits, named):
    data = load_folder(shared_cases / folder, image_size=16)
    assert list(data.class_counts().values()) == counts
    assert sorted(set(data.columns.get("split", np.array([])).tolist())) == splits
    for words in named:
        assert any(words in note for note in data.notes), data.notes
