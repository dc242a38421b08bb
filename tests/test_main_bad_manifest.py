"""Bad data: one line that names the manifest, the row and the file, what was expected; exit code 2; nothing run."""

import re

import pytest

from tests.command import run, write_config


@pytest.mark.parametrize(
    ("column", "name", "words"),
    [
        ("label", "kind", ["no column 'label'", "'image', 'kind', 'mask', 'patient', 'source'"]),
        ("image", "thing", ["no column 'image'", "'thing', 'label'"]),
        ("image", "Imagge", ["no column 'image'", "did you mean 'Imagge'?"]),
        ("source", "set", ["'source=corpus' names no column", "'image'"]),
    ],
)
def test_a_column_that_is_not_there(refused_data, data, column, name, words):
    data.change(1, column, name)
    refused_data(words=["manifest.csv", *words])


def test_a_manifest_without_header(refused_data, data):
    data.write(data.lines[1:])
    refused_data(words=["manifest.csv: no column 'image'"])


def test_missing_images_are_all_counted(refused_data, data):
    for row in (3, 5, 9):
        data.image(row).rename(data.image(row).with_suffix(".jpg"))
    first = "first: row 3: corpus/images/000001.png"
    refused_data(words=["3 of 36 images", "manifest.csv do not exist", first, "'000001.jpg'"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("cut", ["cannot be read", "a whole PNG"]),
        (b"", ["not an image that Pillow reads", "PNG, JPEG"]),
        (b"image,label\n", ["not an image that Pillow reads", "PNG, JPEG"]),
    ],
)
def test_an_image_that_cannot_be_read(refused_data, data, content, words):
    data.spoil(4, data.image(4).read_bytes()[:-400] if content == "cut" else content)
    refused_data(words=["1 of 36 images", "first: row 4: ", "corpus/images/000002.png", *words])


def test_bad_images_are_skipped_on_request_and_counted(tmp_path, data, capsys):
    data.spoil(4, b"")
    data.image(6).unlink()
    flags = (f"--config={write_config(tmp_path)}", f"--config.data_dir={data.folder}", "--config.mode=plan")
    assert run(*flags, "--config.data.on_bad_image=skip") == 0
    assert re.search(
        r"corpus: 34 images \(.*\), 6 patients, 2 unreadable images skipped", capsys.readouterr().out
    )


DATA = {
    "a label outside the classes": (
        ["config.corpus.classes = ('erythrocytes', 'leukocyte', 'platelet')"],
        ["row ", "label 'erythrocyte'", "not in classes", "'erythrocytes'", "drop_classes"],
    ),
    "a class that no image has": (
        ["for split in ('development', 'external'):",
         "    config.tasks.cells[split].classes = 'neutrophil,lymphocyte,monocyte,eosinophil,basophil,blast'"],
        ["cells development: no image is 'blast'", "found neutrophil"],
    ),
    "a class twice": (["config.corpus.classes = 'platelet,platelet'"], ["classes name 'platelet' twice"]),
    "a class dropped that is not there": (["config.corpus.drop_classes = 'platelets'"], ["'platelets'", "'platelet'"]),
    "one class left": (
        ["config.tasks.cells.development.drop_classes = 'lymphocyte,monocyte,eosinophil,basophil'"],
        ["cells development: all ", "'neutrophil'", "two classes or more"],
    ),
    "a condition of no row": (["config.corpus.where = 'source=corpsu'"], ["no row has 'source=corpsu'", "'corpus'"]),
    "a condition without value": (["config.corpus.where = 'corpus'"], ["cannot read", "column=value"]),
    "a group that is no column": (["config.corpus.group = 'patiant'"], ["no column 'patiant'", "'patient'"]),
    "a crop that is no number": (["config.corpus.crop = '24'"], ["corpus: crop is '24'", "a whole number"]),
    "a crop below nothing": (["config.corpus.crop = -2"], ["corpus: crop is -2", "a whole number from 0"]),
    "a key misspelt": (["config.corpus.pth = 'x'"], ["corpus: kind 'manifest' has no key 'pth'", "'path'"]),
    "a manifest misspelt": (["config.corpus.path = 'manifst.csv'"], ["manifst.csv: no such manifest", "'manifest.csv'"]),
    "a folder as manifest": (["config.corpus.path = 'corpus'"], ["corpus: a folder", "kind 'folder'"]),
    "no path": (["config.corpus.path = ''"], ["corpus: kind 'manifest' needs a path"]),
    "the target's rows as corpus": (
        ["config.corpus.where = ''"], ["36 images are in both cells development and corpus", "one side only"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_a_config_that_does_not_fit_its_manifest(refused_data, case):
    more, words = DATA[case]
    refused_data(*more, words=words)


ROWS = {
    "a blank label": (
        5,
        "label",
        "",
        ["manifest.csv: row 5: corpus/images/000003.png has no label", "'label'"],
    ),
    "a blank image": (5, "image", "", ["manifest.csv: row 5: no image named"]),
    "an image twice": (
        5,
        "image",
        "corpus/images/000000.png",
        ["row 5", "in row 2 already", "one row per image"],
    ),
    "a folder as image": (5, "image", "corpus/images", ["row 5: corpus/images; it is a folder"]),
    "a mask that is not there": (
        5,
        "mask",
        "corpus/masks/x.png",
        ["1 of 36 masks", "row 5", "corpus/masks/x.png"],
    ),
    "a row too long": (
        5,
        "label",
        "platelet,x",
        ["manifest.csv: row 5: 6 cells, expected 5 as in the header"],
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_that_cannot_be(refused_data, data, case):
    row, column, value, words = ROWS[case]
    data.change(row, column, value)
    refused_data(words=words)


def test_one_label_spelt_in_two_ways(refused_data, data):
    label = data.lines[4].split(",")[1]
    data.change(5, "label", label.title())
    refused_data(words=["manifest.csv: row ", repr(label), repr(label.title()), "one spelling"])


def test_a_quotation_mark_left_open(refused_data, data):
    data.change(5, "label", '"platelet')
    data.write([*data.lines, "x" * 140_000])
    refused_data(words=["manifest.csv", "is a quotation mark left open?"])


def test_a_manifest_that_is_not_utf8(refused_data, data):
    data.change(5, "label", "érythrocyte")
    data.write(data.lines, "latin-1")
    refused_data(words=["manifest.csv: not UTF-8 text", "save it as CSV UTF-8"])


def test_a_manifest_of_nothing(refused_data, data):
    for lines in ([], data.lines[:1]):
        data.write(lines)
        refused_data(words=["manifest.csv: no rows", "image,label,patient"])


def test_a_patient_in_two_splits(refused_data, data):
    data.write(
        [f"{line},{'split' if n == 0 else 'train' if n % 6 else 'test'}" for n, line in enumerate(data.lines)]
    )
    line = refused_data(words=["manifest.csv: patient smear-0-1-00000", "belongs in one split"])
    assert re.search(r"splits 'train' and 'test' \(rows 2, 7\), and 17 more like it", line)


def test_a_patient_of_the_target_in_the_corpus(refused_data, data):
    patient = data.lines[40].split(",")[3]
    data.change(2, "patient", patient)
    refused_data(
        words=[f"1 patient is in both cells development and corpus, first: {patient}", "one side only"]
    )


def test_an_image_of_the_target_in_the_corpus_under_another_path(refused_data, data):
    (data.folder / "other").mkdir()
    rows = [
        line.replace("development/", "../development/")
        for line in data.lines
        if line.endswith(",development")
    ]
    (data.folder / "other" / "manifest.csv").write_text("\n".join([data.lines[0], *rows]))
    more = "config.corpus.update({'path': 'other/manifest.csv', 'where': ''})"
    refused_data(
        more, words=["36 images are in both cells development and corpus", "development/images/000000.png"]
    )


def test_other_classes_outside(refused_data, data):
    for row, line in enumerate(data.lines, start=1):
        if line.endswith(",external") and "basophil" in line:
            data.change(row, "label", "monocyte")
    refused_data(
        words=["'cells': external has the classes eosinophil", "basophil", "name all as its classes"]
    )


def test_several_labels_on_one_side_alone(refused_data, data):
    (data.folder / "outside.csv").write_text("\n".join(data.lines))
    data.change(
        next(n for n, line in enumerate(data.lines, 1) if "neutrophil" in line),
        "label",
        "neutrophil|basophil",
    )
    more = "config.tasks.cells.external.path = 'outside.csv'"
    refused_data(more, words=["'cells'", "development has several labels per image, external has one"])


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("nowhere", ["corpus: no folder", "nowhere", "manifest.csv", "--config.data_dir=FOLDER"]),
        ("manifest.csv", ["corpus: no folder", "manifest.csv", "--config.data_dir=FOLDER"]),
        (None, ["corpus: manifest.csv is relative", "--config.data_dir=FOLDER"]),
    ],
)
def test_a_data_folder_that_is_none(refused_data, data, folder, words):
    refused_data(flags=[f"--config.data_dir={data.folder / folder if folder else ''}"], words=words)
