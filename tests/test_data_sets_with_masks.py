"""Readers of public sets that have masks, or lie in DICOM, NIfTI and MATLAB files, on small copies in their true layout."""

import h5py
import numpy as np
import pytest
import scipy.io

from tests import medical_files as write
from tests.small_sets import RNG, grey, read, refused, text

# --- sets to be segmented


def test_montgomery_merges_left_and_right_lung(tmp_path):
    lungs = RNG.random((2, 16, 16)) < 0.3
    for name in ("MCUCXR_0001_0.png", "MCUCXR_0104_1.png"):
        grey(tmp_path / "CXR_png" / name)
        for side, lung in zip(("left", "right"), lungs, strict=True):
            write.image(tmp_path / "ManualMask" / f"{side}Mask" / name, lung.astype(np.uint8) * 255)
    data = read(tmp_path, "montgomery")
    assert data.segments == ("background", "lung")
    np.testing.assert_array_equal(data.load_masks(), np.stack([lungs.any(axis=0)] * 2))
    as_classes = read(tmp_path, "montgomery", task="classification")
    assert as_classes.labels.tolist() == [0, 1]
    assert not as_classes.segments
    np.testing.assert_array_equal(as_classes.load_masks(), data.load_masks())
    refused(tmp_path, "montgomery", r"no task 'segment'; did you mean 'segmentation'", task="segment")
    (tmp_path / "ManualMask" / "leftMask" / "MCUCXR_0104_1.png").unlink()
    refused(
        tmp_path, "montgomery", r"1 of 2 masks .* do not exist, first: CXR_png/MCUCXR_0104_1\.png: .*leftMask"
    )


@pytest.fixture
def siim(tmp_path):
    marks = RNG.random((2, 16, 16)) < 0.2
    rows = ["ImageId, EncodedPixels"]
    for name, runs in {
        "1.2.3.4": [write.run_lengths(marks[0]), write.run_lengths(marks[1])],
        "1.2.3.5": [" -1"],
    }.items():
        write.dicom(
            tmp_path / "dicom" / name / f"{name}.dcm",
            RNG.integers(0, 256, (16, 16)).astype(np.uint8),
            PatientID=f"P{name[-1]}",
        )
        rows += [f"{name},{run}" for run in runs]
    text(tmp_path / "train-rle.csv", "\n".join(rows))
    return tmp_path, marks.any(axis=0)


def test_siim_acr_is_dicom_with_run_lengths_in_a_table(siim):
    folder, marked = siim
    data = read(folder, "siim_acr")
    np.testing.assert_array_equal(data.load_masks(), [marked, np.zeros((16, 16))])
    assert data.groups.tolist() == ["P4", "P5"]
    assert read(folder, "siim_acr", task="classification").labels.tolist() == [1, 0]
    table = folder / "train-rle.csv"
    table.write_text(table.read_text() + "\n1.2.3.6,1 2 3")
    refused(folder, "siim_acr", r"1 of 3 images .* first: train-rle\.csv row 5: 1\.2\.3\.6")
    table.write_text("ImageId, EncodedPixels\n1.2.3.5,1 2 3")
    refused(
        folder,
        "siim_acr",
        r"first: train-rle\.csv row 2: .*train-rle\.csv: row 2: 3 run lengths; expected pairs",
    )
    table.write_text("ImageId, EncodedPixels\n,-1")
    refused(folder, "siim_acr", r"train-rle\.csv: row 2: no image named in column 'ImageId'")
    table.write_text("Image, EncodedPixels\n1.2.3.5,-1")
    refused(folder, "siim_acr", r"train-rle\.csv: no column 'ImageId'")


def test_siim_acr_masks_may_be_files_of_the_images_name(tmp_path):
    for name, value in (("1.2", 255), ("1.3", 0)):
        write.dicom(tmp_path / "images" / f"{name}.dcm", RNG.integers(0, 256, (9, 9)).astype(np.uint8))
        grey(tmp_path / "masks" / f"{name}.png", 9, value)
    data = read(tmp_path, "siim_acr", image_size=9)
    assert data.load_masks().mean(axis=(1, 2)).tolist() == [1, 0]
    assert data.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        ({"training": "1st_manual", "test": "1st_manual"}, ["train", "test"]),
        ({"train": "labels", "validate": "labels", "test": "labels"}, ["train", "val", "test"]),
    ],
)
def test_drive_is_read_as_published_or_as_preprocessed(tmp_path, folders, splits):
    vessels = RNG.random((16, 16)) < 0.2
    for number, (folder, drawn) in enumerate(folders.items(), start=21):
        colour = RNG.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        write.image(tmp_path / folder / "images" / f"{number}_{folder}.tif", colour)
        write.image(
            tmp_path / folder / drawn / f"{number}_manual1.gif", np.where(vessels, 255, 0).astype(np.uint8)
        )
    data = read(tmp_path, "drive")
    assert data.columns["split"].tolist() == splits
    np.testing.assert_array_equal(data.load_masks(), np.stack([vessels] * len(splits)))
    assert data.segments == ("background", "vessel")


def test_idrid_lesions_overlap_in_bit_fields(tmp_path):
    root = tmp_path / "A. Segmentation"
    drawn = {
        "MA": RNG.random((12, 18)) < 0.3,
        "HE": RNG.random((12, 18)) < 0.3,
        "OD": RNG.random((12, 18)) < 0.3,
    }
    folders = {"MA": "1. Microaneurysms", "HE": "2. Haemorrhages", "OD": "5. Optic Disc"}
    for folder, number in (("a. Training Set", "01"), ("b. Testing Set", "55")):
        colour = RNG.integers(0, 256, (12, 18, 3)).astype(np.uint8)
        write.image(root / "1. Original Images" / folder / f"IDRiD_{number}.jpg", colour)
        for lesion, marked in drawn.items():
            if number == "55" and lesion == "HE":
                continue  # no file where there is no such lesion
            red = np.zeros((12, 18, 3), np.uint8)
            red[..., 0] = marked * 255
            file = (
                root
                / "2. All Segmentation Groundtruths"
                / folder
                / folders[lesion]
                / f"IDRiD_{number}_{lesion}.tif"
            )
            write.image(file, red)
    data = read(tmp_path, "idrid", crop=12, image_size=12)
    assert data.overlapping
    assert len(data.segments) == 6
    middle = slice(3, 15)
    bits = [drawn["MA"] + 2 * drawn["HE"] + 16 * drawn["OD"], drawn["MA"] + 16 * drawn["OD"]]
    np.testing.assert_array_equal(data.load_masks(), np.stack(bits)[:, :, middle])
    assert data.columns["split"].tolist() == ["train", "test"]
    one = read(tmp_path, "idrid", crop=12, image_size=12, lesions=("haemorrhage",))
    assert one.segments == ("background", "haemorrhage")
    np.testing.assert_array_equal(one.load_masks()[0], drawn["HE"][:, middle])
    assert not one.load_masks()[1].any()
    refused(
        tmp_path, "idrid", r"lesions name 'hemorrhage'; did you mean 'haemorrhage'", lesions=("hemorrhage",)
    )


@pytest.fixture
def acdc(tmp_path):
    volumes = {}
    for folder, patient in (("training", "patient001"), ("testing", "patient101")):
        home = tmp_path / "database" / folder / patient
        text(home / "Info.cfg", "ED: 1\nES: 12\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n")
        for frame in (1, 12):
            image = RNG.random((10, 12, 3)).astype(np.float32) * 300
            mask = RNG.integers(0, 4, (10, 12, 3)).astype(np.uint8)
            write.nifti(home / f"{patient}_frame{frame:02d}.nii.gz", image)
            write.nifti(home / f"{patient}_frame{frame:02d}_gt.nii.gz", mask)
            volumes[patient, frame] = mask
    return tmp_path, volumes


def test_acdc_slices_of_both_phases_are_read_with_their_masks(acdc):
    folder, volumes = acdc
    data = read(folder, "acdc", crop=10, image_size=10)
    assert len(data) == 12
    assert data.groups.tolist() == ["patient101"] * 6 + ["patient001"] * 6
    assert data.segments[3] == "left ventricle"
    es = data.where("split=train,phase=ES,slice=2")
    turned = volumes["patient001", 12][:, :, 2].T[::-1, ::-1]
    np.testing.assert_array_equal(es.load_masks()[0], turned[1:11])
    assert read(folder, "acdc", task="classification").class_counts()["DCM"] == 12


def test_a_wrong_acdc_is_one_line(acdc):
    folder, _ = acdc
    home = folder / "database" / "training" / "patient001"
    write.nifti(home / "patient001_frame12_gt.nii.gz", np.full((10, 12, 3), 4, np.uint8))
    refused(
        folder,
        "acdc",
        r"3 masks .* first: .*patient001_frame12\.nii\.gz\[0\]: .*holds the value 4, expected 0 to 3",
    )
    write.nifti(home / "patient001_frame12_gt.nii.gz", np.zeros((11, 12, 3), np.uint8))
    refused(folder, "acdc", r"11 x 12 pixels, its image 10 x 12; expected a mask as large as its image")
    text(home / "Info.cfg", "ED: 1\nGroup: DCM\n")
    refused(folder, "acdc", r"patient001.Info\.cfg: ES is None; expected the lines 'ED: 1'")


def test_covid_qu_is_read_from_its_folders(tmp_path):
    root = tmp_path / "Infection Segmentation Data"
    for split, name, value in (("Train", "COVID-19", 255), ("Test", "Normal", 0)):
        home = root / split / name
        grey(home / "images" / "a.png")
        grey(home / "infection masks" / "a.png", value=value)
        grey(home / "lung masks" / "a.png", value=255)
    data = read(tmp_path, "covid_qu")
    assert data.segments == ("background", "infection")
    assert data.columns["split"].tolist() == ["test", "train"]
    assert data.load_masks().mean(axis=(1, 2)).tolist() == [0, 1]
    assert read(tmp_path, "covid_qu", region="lung").load_masks().min() == 1
    assert read(tmp_path, "covid_qu", task="classification").classes == ("COVID-19", "Normal")
    refused(tmp_path, "covid_qu", r"region='lungs'; did you mean 'lung'", region="lungs")


def test_covid_qu_is_read_from_arrays_whose_marks_are_2(tmp_path):
    home = tmp_path / "Inf_segm" / "data arrays" / "COVID-19"
    images = RNG.integers(0, 256, (3, 16, 16, 1)).astype(np.uint8)
    marked = RNG.random((3, 16, 16)) < 0.4
    for split, rows in (("train and val", slice(0, 2)), ("test", slice(2, 3))):
        (home / split).mkdir(parents=True)
        np.save(home / split / "imgs.npy", images[rows])
        np.save(home / split / "inf_masks.npy", marked[rows] * 2)
    data = read(tmp_path, "covid_qu", image_size=16)
    assert data.columns["split"].tolist() == ["test", "train", "train"]
    np.testing.assert_array_equal(data.load_masks(), marked[[2, 0, 1]])
    np.testing.assert_array_equal(data.images.batch(range(3))[..., 0], images[[2, 0, 1], :, :, 0])
    np.save(home / "test" / "inf_masks.npy", marked)
    refused(tmp_path, "covid_qu", r"inf_masks\.npy: 3 masks for the 1 images of imgs\.npy")


# --- brains and lungs


@pytest.mark.parametrize("graded", ["table", "folders"])
def test_brats_takes_the_slices_with_tumour(tmp_path, graded):
    rows = ["Grade,BraTS_2019_subject_ID,BraTS_2020_subject_ID"]
    for number, grade in (("001", "HGG"), ("002", "LGG")):
        patient = f"BraTS20_Training_{number}"
        home = tmp_path / (grade if graded == "folders" else "") / patient
        mask = np.zeros((8, 9, 5), np.uint8)
        mask[2:4, 3:5, 2] = 4
        mask[5, 5, 3] = 1
        write.nifti(home / f"{patient}_seg.nii.gz", mask)
        write.nifti(home / f"{patient}_t1.nii.gz", RNG.random((8, 9, 5)).astype(np.float32))
        rows.append(f"{grade},NA,{patient}")
    if graded == "table":
        text(tmp_path / "name_mapping.csv", "\n".join(rows))
    data = read(tmp_path, "brats", image_size=8)
    assert data.class_counts() == {"LGG": 2, "HGG": 2}
    assert data.columns["slice"].tolist() == ["2", "3", "2", "3"]
    masks = read(tmp_path, "brats", task="segmentation", crop=8, image_size=8)
    assert masks.segments == ("background", "necrotic core", "oedema", "enhancing tumour")
    assert [np.unique(mask).tolist() for mask in masks.load_masks()[:2]] == [[0, 3], [0, 1]]
    assert len(read(tmp_path, "brats", slices="all", image_size=8)) == 10
    refused(tmp_path, "brats", r"_t2\.nii\.gz: no such file, modality='t2'; did you mean", modality="t2")
    refused(tmp_path, "brats", r"slices='any'", slices="any")
    if graded == "table":
        (tmp_path / "name_mapping.csv").unlink()
        refused(tmp_path, "brats", r"no grade of BraTS20_Training_001; expected it in name_mapping\.csv")


@pytest.mark.parametrize("kind", ["5", "7.3"])
def test_ce_mri_is_read_from_matlab_files(tmp_path, kind):
    drawn = []
    for number, (label, patient) in enumerate([(1, "100360"), (3, "MR0405"), (2, "100360")], start=1):
        image = RNG.integers(0, 3000, (9, 7)).astype(np.int16)
        drawn.append(RNG.random((9, 7)) < 0.3)
        codes = np.array([[ord(letter)] for letter in patient], np.uint16)
        write.matlab(
            tmp_path / "1-766" / f"{number}.mat",
            image=image,
            label=np.array([[label]], float),
            PID=codes.T,
            tumorMask=drawn[-1].astype(np.uint8),
            tumorBorder=np.zeros((8, 1)),
        )
    folds = np.array([[1], [2], [1]], float)
    if kind == "5":
        scipy.io.savemat(tmp_path / "cvind.mat", {"cvind": folds})
    else:
        with h5py.File(tmp_path / "cvind.mat", "w") as file:
            file["cvind"] = folds.T
    data = read(tmp_path, "ce_mri", image_size=7, crop=7)
    assert data.classes == ("meningioma", "glioma", "pituitary")
    assert data.labels.tolist() == [0, 2, 1]
    assert data.groups.tolist() == ["100360", "MR0405", "100360"]
    assert data.columns["fold"].tolist() == ["1", "2", "1"]
    masks = read(tmp_path, "ce_mri", image_size=7, crop=7, task="segmentation")
    np.testing.assert_array_equal(masks.load_masks(), np.stack(drawn)[:, 1:8])
    write.matlab(tmp_path / "4.mat", label=np.array([[4.0]]))
    refused(tmp_path, "ce_mri", r"4\.mat: cjdata/label is 4, expected 1, 2 or 3")


def test_kaggle_bttc_is_folders_with_the_names_of_ce_mri(tmp_path):
    for split in ("Training", "Testing"):
        for name in ("glioma_tumor", "meningioma_tumor", "no_tumor", "pituitary_tumor"):
            write.image(
                tmp_path / split / name / "image (1).jpg", RNG.integers(0, 256, (9, 9)).astype(np.uint8)
            )
    data = read(tmp_path, "kaggle_bttc")
    assert data.class_counts() == {"glioma": 2, "meningioma": 2, "pituitary": 2, "no tumour": 2}
    three = ("meningioma", "glioma", "pituitary")
    tumours = read(tmp_path, "kaggle_bttc", where="split=test", classes=three, drop_classes=("no tumour",))
    assert tumours.classes == three
    assert len(tumours) == 3
    (tmp_path / "Testing" / "glioma_tumor").rename(tmp_path / "Testing" / "gloma_tumor")
    refused(tmp_path, "kaggle_bttc", r"label 'gloma' \(1 rows\) is not in classes; did you mean 'glioma'")


def test_rsna_pe_slices_are_windowed_in_hounsfield_units(tmp_path):
    hounsfield = RNG.integers(-1000, 1000, (9, 9)).astype(np.int16)
    rows = ["StudyInstanceUID,SeriesInstanceUID,SOPInstanceUID,pe_present_on_image,negative_exam_for_pe"]
    for study, image, present in (("1.1", "1.1.1.1", 0), ("1.1", "1.1.1.2", 1), ("1.2", "1.2.1.1", 0)):
        stored = (hounsfield + 1024).astype(np.uint16)
        write.dicom(
            tmp_path / "train" / study / f"{study}.1" / f"{image}.dcm",
            stored,
            RescaleSlope=1,
            RescaleIntercept=-1024,
        )
        rows.append(f"{study},{study}.1,{image},{present},0")
    text(tmp_path / "train.csv", "\n".join(rows))
    data = read(tmp_path, "rsna_pe", image_size=9)
    assert data.labels.tolist() == [0, 1, 0]
    assert data.groups.tolist() == ["1.1", "1.1", "1.2"]
    expected = np.rint(np.clip((hounsfield + 250) / 700, 0, 1) * 255)
    np.testing.assert_array_equal(data.images[0][..., 0], expected)
    assert len(read(tmp_path, "rsna_pe", every=2)) == 2
    text(tmp_path / "train.csv", "\n".join([*rows, "1.2,1.2.1,,1,0"]))
    refused(tmp_path, "rsna_pe", r"train\.csv: row 5: no image named")
    text(tmp_path / "train.csv", "\n".join([*rows, "1.2,1.2.1,1.2.1.1,yes,0"]))
    refused(tmp_path, "rsna_pe", r"train\.csv: row 5: pe_present_on_image is 'yes', expected 0 or 1")
    refused(tmp_path, "rsna_pe", r"window='lung'; expected black and white", window="lung")
    (tmp_path / "train.csv").rename(tmp_path / "Train.csv")
    refused(tmp_path, "rsna_pe", r"no train\.csv; did you mean 'Train\.csv'")


@pytest.mark.parametrize(
    "kind", ["montgomery", "drive", "covid_qu", "kaggle_bttc", "ce_mri", "brats", "acdc"]
)
def test_an_empty_folder_is_refused(tmp_path, kind):
    refused(tmp_path, kind, r"no images of .*; expected |no leftMask|no images")
