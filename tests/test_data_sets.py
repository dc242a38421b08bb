"""Readers of public data sets, on small copies in their true layout."""

from pathlib import Path

import numpy as np
import pytest

from dapt_jax.data import sources
from dapt_jax.data.sets import SETS, chest_lists, chexpert, listing, registry
from dapt_jax.data.sources import load
from tests import medical_files as write
from tests.small_sets import RNG, grey, read, refused, text

# --- lists


LISTS = {
    "train": "00000001_000.png " + "0 1" + " 0" * 12 + "\r\n00000001_001.png " + "1 " * 14 + " \r\n\r\n",
    "val": "00000002_000.png" + "\t0" * 14 + "\n",
    "test": "00000003_000.png " + "0 " * 13 + "1",
}


@pytest.fixture
def chestxray14(tmp_path):
    for split, rows in LISTS.items():
        text(tmp_path / "dataset" / f"Xray14_{split}_official.txt", rows)
    for number, name in enumerate(("00000001_000", "00000001_001", "00000002_000", "00000003_000")):
        grey(tmp_path / f"images_{number:03d}" / "images" / f"{name}.png")
    return tmp_path


def test_chestxray14_lists_are_read_whatever_their_line_ends(chestxray14):
    data = read(chestxray14, "chestxray14")
    assert data.multi_label
    assert data.classes == chest_lists.CHESTXRAY14
    assert data.labels.sum(axis=1).tolist() == [1, 14, 0, 1]
    assert data.labels[0].argmax() == 1
    assert data.groups.tolist() == ["00000001", "00000001", "00000002", "00000003"]
    assert data.columns["split"].tolist() == ["train", "train", "val", "test"]
    hernias = read(chestxray14, "chestxray14", where="split=test", classes=("Hernia", "Mass"))
    assert hernias.labels.tolist() == [[1, 0]]
    assert read(chestxray14, "chestxray14", drop_classes=("Atelectasis",)).labels.shape == (4, 13)
    assert len(read(chestxray14, "chestxray14", lists="Xray14_val_official.txt")) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("00000009_000.png 0 1", r"Xray14_val_official\.txt: row 2: 3 fields, expected 15"),
        ("0 " * 14, r"row 2: 14 fields, expected 15"),
        ("00000009_000.png 0 1 2" + " 0" * 11, r"row 2: Effusion is '2', expected 0 or 1"),
        (
            "00000001_000.png" + " 0" * 14,
            r"patient 00000001 is in splits 'train' and 'val' \(Xray14_train_.* row 1; Xray",
        ),
        (
            "00000002_000.png" + " 0" * 14,
            r"Xray14_val_official.txt row 2: 00000002_000.png is in .* row 1 already",
        ),
        (
            "00000009_000.png" + " 0" * 14,
            r"1 of 5 images .* do not exist, first: Xray14_val_official.txt row 2: 00000009",
        ),
    ],
)
def test_a_wrong_row_of_a_list_names_file_and_row(chestxray14, row, message):
    path = chestxray14 / "dataset" / "Xray14_val_official.txt"
    path.write_text(path.read_text() + row + "\n")
    refused(chestxray14, "chestxray14", message)


def test_missing_lists_and_folders_and_unknown_classes_are_named(chestxray14):
    (chestxray14 / "dataset" / "Xray14_val_official.txt").unlink()
    refused(chestxray14, "chestxray14", r"no Xray14_val_official\.txt")
    refused(chestxray14 / "nowhere", "chestxray14", r"nowhere: no such folder; ")
    refused(chestxray14, "chestxray14", r"tells no split", lists=("dataset.txt",))
    one = {"lists": ("Xray14_train_official.txt",)}
    refused(
        chestxray14, "chestxray14", r"no class 'Hernya'; did you mean 'Hernia'", classes=("Hernya",), **one
    )


def test_a_checksum_pins_the_splits_and_not_the_folders(chestxray14):
    data = read(chestxray14, "chestxray14")
    assert len(data) == 4
    digest = registry.checksum(list(chest_lists.chestxray14(chestxray14)))
    assert len(read(chestxray14, "chestxray14", checksum=digest)) == 4
    file = chestxray14 / "images_000" / "images" / "00000001_000.png"
    file.rename(chestxray14 / file.name)
    assert len(read(chestxray14, "chestxray14", checksum=digest)) == 4
    path = chestxray14 / "dataset" / "Xray14_val_official.txt"
    path.write_text("")
    refused(chestxray14, "chestxray14", r"Xray14_val_official\.txt: no rows", checksum=digest)
    path.write_text("00000002_001.png" + " 0" * 14)
    refused(
        chestxray14, "chestxray14", rf"the checksum of its splits is .*, expected {digest}", checksum=digest
    )


def test_vindr_lists_name_images_without_suffix_and_dicom_serves_too(tmp_path):
    text(
        tmp_path / "VinDrCXR_train_pe_global_one.txt",
        "train_jpeg/a1 0 0 0 0 0 1 \r\ntrain_jpeg/b2 0 1 1 0 0 0 \r\n",
    )
    text(tmp_path / "VinDrCXR_test_pe_global_one.txt", "test_jpeg/c3 1 0 0 0 0 0 \r\n")
    write.image(tmp_path / "train_jpeg" / "a1.jpeg", np.zeros((9, 9), np.uint8))
    write.dicom(tmp_path / "train" / "b2.dicom", RNG.integers(0, 4096, (9, 9)).astype(np.uint16))
    write.dicom(tmp_path / "test" / "c3.dicom", RNG.integers(0, 4096, (9, 9)).astype(np.uint16))
    data = read(tmp_path, "vindr_cxr")
    assert data.labels.tolist() == [[0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert data.class_counts()["No finding"] == 1


def test_rsna_pneumonia_lists_hold_class_numbers(tmp_path):
    for split, rows in {
        "train": "a-1.png 0\nb-2.png 2\n",
        "val": "c-3.png 1\n",
        "test": "d-4.png 2\n",
    }.items():
        text(tmp_path / f"RSNAPneumonia_{split}.txt", rows)
    for name in ("a-1", "b-2", "c-3"):
        grey(tmp_path / f"{name}.png")
    write.dicom(tmp_path / "stage_2_train_images" / "d-4.dcm", RNG.integers(0, 256, (9, 9)).astype(np.uint8))
    data = read(tmp_path, "rsna_pneumonia")
    assert data.labels.tolist() == [0, 2, 1, 2]
    assert data.classes == ("Normal", "No Lung Opacity/Not Normal", "Lung Opacity")
    text(tmp_path / "RSNAPneumonia_val.txt", "c-3.png 3\n")
    refused(
        tmp_path,
        "rsna_pneumonia",
        r"RSNAPneumonia_val\.txt: row 1: class '3', expected one of 0 Normal, 1 No",
    )


def test_shenzhen_is_read_by_its_lists_or_by_its_names(tmp_path):
    for name in ("CHNCXR_0001_0", "CHNCXR_0402_1", "CHNCXR_0403_1"):
        grey(tmp_path / "CXR_png" / f"{name}.png")
    assert read(tmp_path, "shenzhen").class_counts() == {"normal": 1, "tuberculosis": 2}
    rows = {
        "train": "CHNCXR_0402_1.png,1\r\n",
        "valid": "CHNCXR_0001_0.png,0 \n",
        "test": "CHNCXR_0403_1.png,1\n",
    }
    for split, content in rows.items():
        text(tmp_path / f"ShenzenCXR_{split}_data.txt", content)
    data = read(tmp_path, "shenzhen")
    assert data.columns["split"].tolist() == ["train", "val", "test"]
    assert data.labels.tolist() == [1, 0, 1]
    text(tmp_path / "ShenzenCXR_valid_data.txt", " ,0\n")
    refused(tmp_path, "shenzhen", r"ShenzenCXR_valid_data\.txt: row 1: no image named")
    text(tmp_path / "ShenzenCXR_valid_data.txt", rows["valid"])
    grey(tmp_path / "Augmented" / "CHNCXR_0001_0.png")
    refused(
        tmp_path,
        "shenzhen",
        r"CHNCXR_0001_0\.png may be Augmented/CHNCXR_0001_0\.png or CXR_png/.*; expected one",
    )


# --- CheXpert


HEADER = ",".join(("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *chexpert.CLASSES))
ROW = "CheXpert-v1.0-small/{0},Female,68,Frontal,AP"


@pytest.fixture
def chexpert_folder(tmp_path):
    root = tmp_path / "CheXpert-v1.0-small"
    rows = {
        "train.csv": [
            ("train/patient00001/study1/view1_frontal.jpg", "1.0,,,,,,,,,0.0,,,,1.0"),
            ("train/patient00002/study2/view1_frontal.jpg", ",,-1.0,1.0,,-1.0,-1.0,,-1.0,,-1.0,,1.0,"),
        ],
        "valid.csv": [("valid/patient64541/study1/view1_frontal.jpg", ",".join(["0.0"] * 13 + ["1.0"]))],
    }
    for table, content in rows.items():
        lines = [HEADER, *(f"{ROW.format(path)},{labels}" for path, labels in content)]
        text(root / table, "\r\n".join(lines) + "\r\n")
        for path, _ in content:
            write.image(root / path, RNG.integers(0, 256, (12, 16)).astype(np.uint8))
    return root


UNSURE = [chexpert.CLASSES.index(name) for name in ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis")]


@pytest.mark.parametrize(
    ("policy", "label", "bounds"),
    [
        ("ones", 1, None),
        ("zeros", 0, None),
        ("ignore", np.nan, None),
        ("lsr_ones", -1, (0.55, 0.85)),
        ("lsr_zeros", -1, (0.0, 0.3)),
    ],
)
def test_chexpert_policies_say_what_an_uncertain_label_is(chexpert_folder, policy, label, bounds):
    data = read(chexpert_folder, "chexpert", uncertain=policy)
    np.testing.assert_array_equal(data.labels[1, UNSURE], np.full(4, label, np.float32))
    assert data.labels[1, 0] == 0  # a blank
    assert data.uncertain == bounds
    assert data.groups.tolist() == ["patient00001", "patient00002", "patient64541"]
    assert data.columns["Age"].tolist() == ["68"] * 3
    assert data.class_counts()["Lung Opacity"] == 1
    assert data.class_counts()["Edema"] == (policy == "ones")
    assert read(chexpert_folder, "chexpert", uncertain=policy, where="split=val").uncertain is None
    five = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
    np.testing.assert_array_equal(read(chexpert_folder.parent, "chexpert", classes=five).labels[1], [-1] * 5)


def test_blanks_of_chexpert_may_be_missing_labels_and_the_fingerprint_knows_the_policy(chexpert_folder):
    data = read(chexpert_folder, "chexpert", uncertain="ignore", blanks="ignore")
    assert np.isnan(data.labels[0]).sum() == 11
    prints = {
        read(chexpert_folder, "chexpert", uncertain=policy).fingerprint() for policy in chexpert.POLICIES
    }
    assert len(prints) == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (",Female,68,Frontal,AP" + "," * 14, r"train\.csv: row 4: no image named in column 'Path'"),
        (
            f"{ROW.format('train/patient00009/a.jpg')},2" + "," * 13,
            r"train\.csv: row 4: No Finding is '2', expected 1, 0",
        ),
        (ROW.format("train/patient00009/a.jpg"), r"train\.csv: row 4: 5 cells, expected 19"),
        (
            f"{ROW.format('train/patient64541/a.jpg')}" + "," * 14,
            r"patient64541 is in splits 'train' and 'val'",
        ),
        (
            f"{ROW.format('train/patient00009/a.jpg')}" + "," * 14,
            r"1 of 4 images .* first: train\.csv row 4: CheXpert-v1",
        ),
    ],
)
def test_a_wrong_row_of_chexpert_names_file_and_row(chexpert_folder, line, message):
    table = chexpert_folder / "train.csv"
    table.write_bytes(table.read_bytes() + line.encode() + b"\r\n")
    refused(chexpert_folder, "chexpert", message)


def test_wrong_policies_name_the_nearest(chexpert_folder):
    refused(
        chexpert_folder, "chexpert", r"uncertain='lsr-ones'; did you mean 'lsr_ones'", uncertain="lsr-ones"
    )
    refused(chexpert_folder, "chexpert", r"blanks='zero'; did you mean 'zeros'", blanks="zero")


def test_an_image_that_cannot_be_read_is_named_with_its_row_or_left_out_and_counted(chestxray14):
    broken = chestxray14 / "images_002" / "images" / "00000002_000.png"
    broken.write_bytes(broken.read_bytes()[:40])
    refused(
        chestxray14,
        "chestxray14",
        r"1 of 4 images .* cannot be read, first: Xray14_val_official\.txt row 1: ",
    )
    spec = {"kind": "chestxray14", "path": str(chestxray14)}
    data = load(spec, data_dir=None, image_size=16, on_bad_image="skip")
    assert (len(data), data.skipped) == (3, 1)


# --- the page in the docs


PAGE = Path(__file__).resolve().parents[1] / "docs" / "data_sets.md"


def test_the_page_lists_the_sets_as_they_are():
    assert listing() in PAGE.read_text(encoding="utf-8")
    for entry in SETS.values():
        assert entry.kind in sources.KINDS
        assert all(
            (entry.title, entry.recipe, entry.licence, entry.size, entry.splits, entry.checksum, entry.tasks)
        )
        assert not {"|", "\n"} & set(
            "".join((entry.recipe, entry.licence, entry.size, entry.splits, entry.checksum))
        )


def test_the_reader_that_the_page_shows_works(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "SETS", {})
    code = PAGE.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    exec(compile(code, str(PAGE), "exec"), {})
    lesions = RNG.random((2, 16, 16)) < 0.2
    for name in ("benign (1)", "normal (1)"):
        home = tmp_path / name.split()[0]
        grey(home / f"{name}.png")
        for number, lesion in enumerate(lesions if name.startswith("benign") else []):
            write.image(home / f"{name}_mask{'_1' * number}.png", lesion.astype(np.uint8) * 255)
    read_it = registry.SETS["busi"].load
    data = read_it(tmp_path, image_size=16, task="segmentation")
    np.testing.assert_array_equal(data.load_masks(), [np.zeros((16, 16)), lesions.any(axis=0)])
    assert read_it(tmp_path, image_size=16).class_counts() == {"normal": 1, "benign": 1, "malignant": 0}
