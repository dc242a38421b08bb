"""Names of columns, labels, patients and splits mean the same however people spell them; what cannot be known is said."""

import codecs
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dapt_jax.data import facts, identity
from dapt_jax.data.manifest import load_manifest
from dapt_jax.data.sources import load
from dapt_jax.errors import UserError
from tests import medical_files as write

PER_EXAMPLE = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SEPARATORS = st.sampled_from(["", "_", " ", "-", "."])
NAMES = st.text("abcdefghéüñøß", min_size=1, max_size=8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of twelve different pictures, 0.png to 11.png."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 255, (12, 12), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def read(folder: Path, rows: list[list[str]], separator: str = ",", name: str = "manifest.csv", **options):
    path = folder / name
    path.write_text("\n".join(separator.join(row) for row in rows) + "\n", encoding="utf-8")
    return load_manifest(path, image_size=8, **options)


def table(**columns: list[str]) -> list[list[str]]:
    header = list(columns)
    return [header, *([columns[name][row] for name in header] for row in range(12))]


FILES = [f"{number}.png" for number in range(12)]
LABELS = ["sick", "well"] * 6
PATIENTS = [f"P{number // 3}" for number in range(12)]


def spelt(*names: str):
    """One of several names, its words in any case and with any separator."""

    def spell(name: str):
        words = [st.sampled_from([word, word.upper(), word.title()]) for word in name.split()]
        return st.builds(lambda parts, separator: separator.join(parts), st.tuples(*words), SEPARATORS)

    return st.one_of(*map(spell, names))


@PER_EXAMPLE
@given(
    image=spelt("image", "file name", "image path", "img", "file path"),
    label=spelt("label", "class", "target", "diagnosis", "finding labels"),
    patient=spelt(
        "patient id",
        "patient identifier",
        "subject",
        "participant no",
        "case id",
        "pid",
        "mrn",
        "anon patient id",
    ),
    split=spelt("split", "subset", "data set", "usage"),
    order=st.permutations(range(4)),
    separator=st.sampled_from([",", ";", "\t"]),
)
def test_columns_are_found_by_usual_names_in_any_order_and_spelling(
    pictures, image, label, patient, split, order, separator
):
    splits = ["Train"] * 6 + ["TEST"] * 6
    columns = [(image, FILES), (label, LABELS), (patient, PATIENTS), (split, splits)]
    data = read(pictures, table(**dict(columns[place] for place in order)), separator)
    assert data.class_counts() == {"sick": 6, "well": 6}
    assert data.groups.tolist() == PATIENTS
    assert len(data.where("split=train")) == 6
    for name, usual in ((image, "image"), (label, "label"), (patient, "patient"), (split, "split")):
        assert (name == usual) or any(repr(name) in note for note in data.notes), data.notes


@PER_EXAMPLE
@given(st.lists(NAMES, min_size=4, max_size=4, unique_by=identity.spelling), st.randoms())
def test_composed_and_decomposed_letters_are_one_patient_and_one_label(pictures, names, random):
    forms = ["NFC", "NFD"]
    patients = [unicodedata.normalize(random.choice(forms), names[number // 3]) for number in range(12)]
    labels = [
        unicodedata.normalize(random.choice(forms), f"{names[0]}ü{number % 2}") + " " for number in range(12)
    ]
    data = read(pictures, table(image=FILES, label=labels, patient=patients))
    assert len(data.classes) == 2
    assert len(set(data.groups.tolist())) == 4


@PER_EXAMPLE
@given(st.sampled_from(["NFC", "NFD"]), st.sampled_from(["NFC", "NFD"]), st.booleans())
def test_a_file_is_found_in_either_unicode_form_and_any_case(tmp_path, on_disk, in_table, loud):
    folder = tmp_path / f"{on_disk}{in_table}{loud}"
    inner = folder / unicodedata.normalize(on_disk, "Bilder für é")
    inner.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        name = unicodedata.normalize(on_disk, f"röntgen {number}.png")
        Image.fromarray(np.full((4, 4), 50 * number, np.uint8)).save(inner / name)
    written = [unicodedata.normalize(in_table, f"Bilder für é/röntgen {number}.png") for number in range(2)]
    written = [f"./{name.upper() if loud else name}" for name in written]
    data = read(folder, [["image", "label"], [written[0], "a"], [written[1], "b"]])
    assert len(data) == 2


@pytest.mark.parametrize("missing", ["nan", "NaN", "NA", "N/A", "", "null", "<NA>", "#N/A"])
def test_missing_values_name_no_class_and_nobody_unless_declared(pictures, missing):
    patients = [missing, *PATIENTS[1:]]
    rows = table(image=FILES, label=[missing, *LABELS[1:]], patient=patients)
    with pytest.raises(
        UserError, match=r"row 2: 0\.png has no label.*drop_classes='nan' leaves such rows out"
    ):
        read(pictures, rows)
    left = read(pictures, rows, drop_classes=("nan",))
    assert left.class_counts() == {"sick": 5, "well": 6}
    assert any("left out 1 rows without a label" in note for note in left.notes)
    if missing:
        declared = read(pictures, rows, classes=("sick", "well", missing))
        assert declared.class_counts()[missing] == 1
        assert declared.groups[0].endswith("0.png")  # a group of its own


@PER_EXAMPLE
@given(st.sampled_from([("007", "7"), ("P09", "p09"), ("7.0", "7"), ("A_1", "a-1"), ("sub-01", "SUB_1")]))
def test_names_that_are_nearly_one_are_told_of_and_stay_together(pictures, pair):
    from dapt_jax.data import findings, near_duplicates

    patients = [pair[0]] * 3 + [pair[1]] * 3 + [f"Q{number}" for number in range(6)]
    data = read(pictures, table(image=FILES, label=LABELS, patient=patients))
    assert any(all(repr(name) in line for name in pair) for line in findings.of_set(data))
    assert len(set(near_duplicates.merged(data).groups[:6].tolist())) == 1


@given(st.lists(st.integers(0, 999), min_size=2, max_size=30, unique=True))
def test_different_numbers_are_different_patients_however_padded(numbers):
    assert not identity.near_spellings([f"{number:04d}" for number in numbers])
    padded = [f"{number:05d}" for number in numbers] + [str(number) for number in numbers]
    assert len(identity.near_spellings(padded)) == sum(f"{number:05d}" != str(number) for number in numbers)


@pytest.mark.parametrize("name", ["lesion_id", "StudyUID", "slide", "exam_no", "AccessionNumber"])
def test_a_column_that_looks_like_identities_is_pointed_out(pictures, name):
    cells = [f"L{number // 2}" for number in range(12)]
    data = read(pictures, table(image=FILES, label=LABELS, **{name: cells}))
    assert any(f"group={name!r}" in note and "6 in 12 rows" in note for note in data.notes)
    assert len(set(data.groups.tolist())) == 12
    # Where it divides no patient, it says nothing new.
    quiet = read(pictures, table(image=FILES, label=LABELS, patient=PATIENTS, **{name: FILES}))
    assert not quiet.notes


def test_measures_are_no_identities(pictures):
    ages, sexes = [str(40 + number // 3) for number in range(12)], ["F", "M"] * 6
    assert not read(
        pictures, table(image=FILES, label=LABELS, age=ages, sex=sexes, source=["site1"] * 12)
    ).notes


def test_two_columns_of_patients_that_disagree_are_refused(pictures):
    other = [f"S{number % 4}" for number in range(12)]
    with pytest.raises(
        UserError, match=r"'PatientID' and 'subject' both seem to name patients.*group='PatientID'"
    ):
        read(pictures, table(image=FILES, label=LABELS, subject=other, PatientID=PATIENTS))
    finer = [f"{patient}-{number % 2}" for number, patient in enumerate(PATIENTS)]
    assert (
        read(pictures, table(image=FILES, label=LABELS, case_id=finer, PatientID=PATIENTS)).groups.tolist()
        == PATIENTS
    )


def test_a_column_that_says_whether_somebody_is_a_patient_names_nobody(pictures):
    data = read(pictures, table(image=FILES, label=LABELS, Case=["case", "control"] * 6))
    assert len(set(data.groups.tolist())) == 12


def test_names_without_a_folder_are_found_in_the_one_folder_that_holds_them_all(pictures, tmp_path):
    stems = [str(number) for number in range(12)]
    shutil.copytree(pictures, tmp_path / "train_images", ignore=shutil.ignore_patterns("*.csv"))
    data = read(tmp_path, table(id_code=stems, diagnosis=["0", "1"] * 6))
    assert len(data) == 12
    assert any(f"its images lie in {tmp_path / 'train_images'}" in note for note in data.notes)
    shutil.copytree(tmp_path / "train_images", tmp_path / "copies")
    with pytest.raises(UserError, match="no column 'image'"):
        read(tmp_path, table(id_code=stems, diagnosis=["0", "1"] * 6))
    with pytest.raises(UserError, match=r"12 of 12 images .* do not exist"):
        read(tmp_path, table(image=FILES, label=LABELS))


def test_several_columns_that_could_be_the_label_are_named(pictures):
    rows = table(image=FILES, diagnosis=LABELS, grade=["1", "2", "3"] * 4)
    with pytest.raises(
        UserError, match=r"no column 'label'; it could be 'diagnosis' or 'grade'; expected label='diag"
    ):
        read(pictures, rows)
    assert read(pictures, rows, label="Grade").classes == ("1", "2", "3")
    numbered = table(image=FILES, class_id=[str(LABELS.index(name)) for name in LABELS], class_name=LABELS)
    assert read(pictures, numbered).classes == ("sick", "well")
    flags = table(image=FILES, MEL=["1", "0"] * 6, NV=["0", "1"] * 6)
    with pytest.raises(UserError, match=r"2 columns of 0 and 1: label='MEL,NV'"):
        read(pictures, flags)


def test_identities_without_suffix_name_files_where_one_fits(pictures):
    stems = [str(number) for number in range(12)]
    assert len(read(pictures, table(id_code=stems, diagnosis=LABELS))) == 12
    with pytest.raises(UserError, match="no column 'image'"):
        read(pictures, table(id=[f"x{stem}" for stem in stems], diagnosis=LABELS))


@PER_EXAMPLE
@given(
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from([b"", codecs.BOM_UTF8]),
    st.sampled_from(["utf-8", "utf-16"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_a_table_is_read_as_spreadsheets_write_it(
    pictures, separator, mark, encoding, end, quoted, numbered, said
):
    rows = table(
        image=FILES, label=["né, oui" if separator != "," or quoted else "né", "well"] * 6, patient=PATIENTS
    )
    cells = [[f'"{cell}"' if quoted else cell for cell in row] for row in rows]
    cells = (
        [[("" if place == 0 else str(place)), *row] for place, row in enumerate(cells)] if numbered else cells
    )
    lines = [
        separator.join(row) + separator for row in cells
    ]  # a column without a name, as a stray cell leaves it
    text = end.join([*(["sep=" + separator] if said else []), *lines, separator * 3, ""])
    path = pictures / "saved.csv"
    path.write_bytes((mark if encoding == "utf-8" else b"") + text.encode(encoding))
    data = load_manifest(path, image_size=8)
    assert len(data) == 12
    assert data.groups.tolist() == PATIENTS
    assert len(data.classes) == 2


def test_the_patient_of_a_dicom_file_is_used_where_no_column_names_one(tmp_path):
    rng = np.random.default_rng(0)
    for number, patient in enumerate(("A1", "A1", "B2", "anonymous", "0000")):
        write.dicom(
            tmp_path / f"{number}.dcm", rng.integers(0, 99, (8, 8)).astype(np.uint16), PatientID=patient
        )
    lines = ["image,label", *(f"{number}.dcm,{'ab'[number % 2]}" for number in range(5))]
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    groups = load_manifest(tmp_path / "manifest.csv", image_size=8).groups.tolist()
    assert groups[:3] == ["A1", "A1", "B2"]
    assert groups[3].endswith("3.dcm")
    assert groups[4].endswith("4.dcm")
    (tmp_path / "manifest.csv").write_text("image,label,split\n0.dcm,a,train\n1.dcm,b,test\n")
    with pytest.raises(UserError, match=r"patient A1 is in splits 'train' and 'test' \(rows 2, 3\)"):
        load_manifest(tmp_path / "manifest.csv", image_size=8)


def test_the_files_of_a_dicom_study_that_names_no_patient_are_one_group_with_a_line(tmp_path):
    rng = np.random.default_rng(0)
    headers = [
        {"PatientID": "ANONYMOUS", "StudyInstanceUID": "1.2.1", "SeriesInstanceUID": "1.2.1.1"},
        {"PatientID": "", "StudyInstanceUID": "1.2.1", "SeriesInstanceUID": "1.2.1.2"},
        {"SeriesInstanceUID": "1.2.3"}, {"SeriesInstanceUID": "1.2.3"}, {},
        {"PatientID": "A1", "StudyInstanceUID": "1.2.4"},
    ]  # fmt: skip
    for number, header in enumerate(headers):
        write.dicom(tmp_path / f"{number}.dcm", rng.integers(0, 99, (8, 8)).astype(np.uint16), **header)
    lines = ["image,label", *(f"{number}.dcm,{'ab'[number % 2]}" for number in range(6))]
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    data = load_manifest(tmp_path / "manifest.csv", image_size=8)
    assert data.groups.tolist() == ["1.2.1", "1.2.1", "1.2.3", "1.2.3", str(tmp_path / "4.dcm"), "A1"]
    assert any(
        "4 images of DICOM files name no patient: each of their 2 studies" in note for note in data.notes
    )
    assert facts.unnamed(data).tolist() == [True] * 5 + [False]
    other = [
        {"kind": "folder", "path": str(tmp_path / "one"), "cohort": "one"},
        {"kind": "manifest", "cohort": "two"},
    ]
    shutil.copytree(
        write.image(tmp_path / "one" / "a" / "1.png", np.eye(8, dtype=np.uint8)).parent,
        tmp_path / "one" / "b",
    )
    other[1]["path"] = str(tmp_path / "manifest.csv")
    joined = load(other, data_dir=None, image_size=8)
    assert facts.unnamed(joined).tolist() == [True] * 7 + [False]


def test_slices_and_tiles_without_a_patient_are_not_said_to_be_patients(tmp_path):
    rows = ["image,label"]
    for name, label in (("P1_T1", "a"), ("P1_T2", "a"), ("P2_T1", "b")):
        write.nifti(tmp_path / f"{name}.nii", np.random.default_rng(len(rows)).random((8, 8, 3)))
        rows += [f"{name}.nii[{index}],{label}" for index in range(3)]
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    spec = {"kind": "manifest", "path": str(tmp_path / "manifest.csv")}
    said = r"none named: each image, volume or study counts as a patient of its own \(3 of them\)"
    for more in ({}, {"tile_size": 4}):
        data = load({**spec, **more}, data_dir=None, image_size=8)
        assert facts.unnamed(data).all()
        assert re.fullmatch(said, facts.of_set(data)["patients"])
    (tmp_path / "manifest.csv").write_text(
        "\n".join([rows[0] + ",patient", *(f"{row},{row[:2]}" for row in rows[1:])])
    )
    data = load(spec, data_dir=None, image_size=8)
    assert not facts.unnamed(data).any()
    assert facts.of_set(data)["patients"] == "2, of 3 to 6 images each (median 4.5)"


def test_links_and_dots_to_one_file_are_one_image(pictures, tmp_path):
    (tmp_path / "set").mkdir()
    Image.open(pictures / "0.png").save(tmp_path / "0.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "0.png")
    for other in ("set/../0.png", "./0.png", "link.png"):
        with pytest.raises(UserError, match=r"row 3: .* is in row 2 already"):
            read(tmp_path, [["image", "label"], ["0.png", "a"], [other, "b"]])
        with pytest.raises(UserError, match=r"image 0\.png is in splits 'train' and 'Testing' \(rows 2, 3\)"):
            read(tmp_path, [["image", "label", "split"], ["0.png", "a", "train"], [other, "b", "Testing"]])


@given(
    st.lists(st.integers(-3, 300), min_size=2, max_size=20, unique=True),
    st.sampled_from(["", "grade ", "T"]),
    st.randoms(),
)
def test_grades_are_in_numerical_order(numbers, prefix, random):
    numbers = sorted({abs(number) for number in numbers} if prefix else numbers)
    labels = [f"{prefix}{number}" for number in numbers]
    shuffled = random.sample(labels, len(labels))
    assert identity.in_order(shuffled) == (tuple(labels), True)


def test_named_grades_need_an_order_and_numbers_have_one(shared_cases):
    def grades(table, **more):
        return load(
            {"kind": "manifest", "path": str(shared_cases / "grades" / table), "ordinal": True, **more},
            **WHERE,
        )

    assert grades("numbers.csv").classes == tuple(map(str, range(12)))
    with pytest.raises(
        UserError, match=r"grades need an order, but these are names: mild, moderate, none, severe"
    ):
        grades("names.csv")
    named = grades("names.csv", classes="none,mild,moderate,severe")
    assert named.ordinal
    assert named.classes == ("none", "mild", "moderate", "severe")


WHERE = {"data_dir": None, "image_size": 16}


@pytest.mark.parametrize("table", ["manifest.csv", "h.csv"])
def test_the_case_of_patient_columns(shared_cases, table):
    data = load_manifest(shared_cases / "patient_column" / table, image_size=16)
    assert len(set(data.groups.tolist())) == 6


def test_the_case_of_composed_letters(shared_cases):
    data = load_manifest(shared_cases / "nfd" / "labels.csv", image_size=16)
    assert data.classes == ("Müller", "b")
    assert len(set(data.groups.tolist())) == 1
    assert len(load_manifest(shared_cases / "nfd" / "manifest.csv", image_size=16)) == 2


@given(
    st.sampled_from(
        ["train", "Training", "TRAIN", "train_images", "1. Training Set", "TrainData", "seg_train"]
    )
)
def test_splits_are_known_in_any_spelling(name):
    assert identity.split_name(name) == "train"


@given(
    st.sampled_from(
        ["trained", "contest", "normal", "testis", "tests of liver", "devil", "set", "fold", "train test"]
    )
)
def test_other_words_are_no_splits(name):
    assert identity.split_name(name) == ""
