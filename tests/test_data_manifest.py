from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dapt_jax.data.folders import load_folder
from dapt_jax.data.manifest import load_manifest
from dapt_jax.data.near_duplicates import duplicates
from dapt_jax.errors import UserError


class Home:
    """A folder in which images and manifests are quickly made."""

    def __init__(self, folder: Path):
        self.folder = folder

    def image(self, name: str, shade: int = 100, side: int = 10) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(path)
        return path

    def manifest(self, text: str, name: str = "manifest.csv", images: bool = True) -> Path:
        path = self.folder / name
        path.write_bytes(text.encode())
        for line in text.splitlines()[1:]:
            written = line.split(",")[0]
            if images and written and not (self.folder / written).exists():
                self.image(written)
        return path

    def load(self, text: str, **options):
        return load_manifest(self.manifest(text), **{"image_size": 8, **options})


@pytest.fixture
def home(tmp_path) -> Home:
    return Home(tmp_path)


def test_a_manifest_becomes_images_labels_groups_and_columns(home):
    home.image("a.png", 10)
    home.image("b.png", 20)
    home.image("m.png", 1)
    data = home.load("image,label,mask,patient,source\na.png,sick,m.png,P1,x\nb.png,healthy,,,y\n")
    assert data.classes == ("healthy", "sick")
    assert data.labels.tolist() == [1, 0]
    assert data.labels.dtype == np.int64
    assert data.groups[0] == "P1"
    assert data.groups[1].endswith("b.png")
    assert {name: values.tolist() for name, values in data.columns.items()} == {"source": ["x", "y"]}
    assert [mask and str(mask) for mask in data.masks] == [str(home.folder / "m.png"), None]
    assert data.images.batch([0, 1])[:, 0, 0, 0].tolist() == [10, 20]
    assert data.class_counts() == {"healthy": 1, "sick": 1}
    assert not data.multi_label
    with pytest.raises(UserError, match=r"1 of 2 images have no mask, first: .*b\.png"):
        data.load_masks()


def test_byte_order_mark_crlf_spaces_and_blank_lines_are_read_over(home):
    home.image("a.png")
    data = home.load("\ufeffimage, label\r\na.png,\tsick \r\n\r\n,\r\n\n")
    assert data.class_counts() == {"sick": 1}


def test_a_semicolon_manifest_with_backslashes_is_read(home):
    home.image("set/a.png")
    path = home.manifest("image;label;split\nset\\a.png;sick;train\n", images=False)
    data = load_manifest(path, image_size=8)
    assert data.columns["split"].tolist() == ["train"]


def test_labels_joined_by_a_bar_make_a_multi_label_set(home):
    data = home.load("image,label\na.png,x|y\nb.png,\nc.png,z\n")
    assert data.multi_label
    assert data.classes == ("x", "y", "z")
    assert data.labels.dtype == np.float32
    assert data.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert data.class_counts() == {"x": 1, "y": 1, "z": 1}
    assert data.keep_classes(["z", "x"]).labels.tolist() == [[0, 1], [0, 0], [1, 0]]


def test_one_column_per_class_makes_a_multi_label_set_with_nan_for_blank(home):
    text = "image,edema,effusion,split\na.png,1,0,dev\nb.png,,1.0,dev\n"
    data = home.load(text, label="edema,effusion")
    np.testing.assert_array_equal(data.labels, np.array([[1, 0], [np.nan, 1]], np.float32))
    assert data.class_counts() == {"edema": 1, "effusion": 1}
    assert set(data.columns) == {"split"}
    assert home.load(text, label="edema,effusion", classes=("effusion", "edema")).labels[0].tolist() == [0, 1]
    with pytest.raises(UserError, match=r"manifest\.csv: row 2: edema is '-1', expected 0, 1 or blank"):
        home.load("image,edema,effusion\na.png,-1,0\n", label="edema,effusion")
    with pytest.raises(UserError, match=r"class 'oedema' .*did you mean 'edema'"):
        home.load(text, label="edema,effusion", classes=("oedema",))
    for label, classes in (("edema,edema", ()), ("edema,effusion", ("edema", "edema"))):
        with pytest.raises(UserError, match=r"classes name 'edema' twice; expected each class once"):
            home.load(text, label=label, classes=classes)


def test_a_condition_on_labels_finds_a_flag_in_every_form_that_is_read(home):
    text = "image,edema,effusion\na.png,1,0\nb.png,1.0,0\nc.png,TRUE,1\nd.png,0,1\n"
    for where, count in (("label=edema", 3), ("label=effusion", 2)):
        assert len(home.load(text, label="edema,effusion", where=where)) == count
        assert len(home.load(text, label="edema,effusion").where(where)) == count


def test_where_comes_before_labels_and_files_are_looked_at(home):
    home.image("a.png")
    text = "image,label,source\na.png,sick,dev\ngone.png,unheard-of,old\n"
    path = home.manifest(text, images=False)
    data = load_manifest(path, image_size=8, where="source=dev", classes=("healthy", "sick"))
    assert len(data) == 1
    assert data.class_counts() == {"healthy": 0, "sick": 1}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("sauce=dev", r"'sauce=dev' names no column here; did you mean 'source'\?"),
        ("source=dve", r"no row has 'source=dve'; did you mean 'dev'\?"),
        ("source", r"cannot read the condition 'source'; expected column=value"),
        (
            "split!=a",
            r"cannot read the condition 'split!=a'; expected column=value, or .* all values to select",
        ),
        ("age>=61", r"cannot read the condition 'age>=61'"),
        ("source=dev,age<=60", r"cannot read the condition 'age<=60'"),
        ("source=dev,split=b", r"no row meets all of 'source=dev,split=b'"),
    ],
)
def test_a_condition_that_selects_nothing_is_explained(home, where, message):
    text = "image,label,source,split,age\na.png,x,dev,a,60\nb.png,y,ext,b,61\n"
    with pytest.raises(UserError, match=message):
        home.load(text, where=where)
    with pytest.raises(UserError, match=message):
        home.load(text).where(where)


@pytest.mark.parametrize("sign", [";", "/", " + ", "; "])
def test_labels_joined_by_another_sign_than_a_bar_are_no_class_unless_named_one(home, sign):
    text = f"image,label\na.png,x\nb.png,y\nc.png,x{sign}y\n"
    with pytest.raises(UserError, match=r"row 4: label .* expected 'x\|y' for an image with several labels"):
        home.load(text)
    named = ("x", "y", f"x{sign}y")
    assert home.load(text, classes=named).classes == named
    assert home.load(text, drop_classes=named[2:]).classes == ("x", "y")
    for alone in ("her2+", "n/n, not graded", "x+z"):
        assert alone in home.load(text.replace(f"x{sign}y", f'"{alone}"')).classes


SPELT = "image,label,split\n" + "".join(
    f"{row}.png,{'xy'[row % 2]},{split}\n"
    for row, split in enumerate(
        ("train", "Train", "TRAIN", "Training", "test", "test_2", "Fold 03", "fold_3")
    )
)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("split=train", range(4)),
        ("split=Training", range(4)),
        ("split=test|train", range(6)),
        ("split=test", (4, 5)),
        ("split=test_2", (5,)),
        ("split=fold_3", (6, 7)),
    ],
)
def test_a_condition_finds_a_split_in_every_spelling_though_a_cell_is_the_very_word(home, where, rows):
    expected = [f"{row}.png" for row in rows]
    data = home.load(SPELT)
    for found in (home.load(SPELT, where=where), data.where(where)):
        assert [Path(name).name for name in found.images.names] == expected


def test_rows_of_several_splits_are_one_set_with_a_line_unless_asked_for(home):
    every = home.load(SPELT)
    (line,) = [note for note in every.notes if "one set" in note]
    assert (
        "column 'split' are used as one set (train 4, test 2, fold_3 2); where='split=train' selects" in line
    )
    for where in ("split=train", "split=train|test", "Split=test"):
        assert not home.load(SPELT, where=where).notes
    alone = "".join(
        line for line in SPELT.splitlines(True) if "test" not in line.lower() and "fold" not in line.lower()
    )
    assert not [note for note in home.load(alone).notes if "one set" in note]


def test_a_misspelt_split_is_told_of_with_its_row(home):
    text = "image,label,split\na.png,x,train\nb.png,y,train\nc.png,x,tarin\nd.png,y,test\ne.png,x,\nf.png,y,other\n"
    data = home.load(text, where="split=train")
    assert len(data) == 2
    (line,) = data.notes
    assert "row 4: 'tarin' in column 'split' names no split; did you mean 'train'" in line


@pytest.mark.parametrize("value", ["=test", "!test", "-test", "~test", "<test"])
def test_a_sign_before_a_split_is_no_spelling_of_it(home, value):
    with pytest.raises(UserError, match=rf"no row has 'split={value}'; did you mean 'test'"):
        home.load(SPELT, where=f"split={value}")
    assert len(home.load("image,label,size\na.png,x,<1cm\nb.png,y,>=1cm\n", where="Size=>=1cm")) == 1


def test_a_condition_that_leaves_out_another_spelling_of_its_value_is_refused(home):
    text = "image,label,site,score\na.png,x,North A,1\nb.png,y,north_a,-1\nc.png,x|y,B,0\n"
    message = (
        r"'site=North A' leaves out rows with 'north_a', another .* expected 'site=North A\|north_a' for both"
    )
    with pytest.raises(UserError, match=message):
        home.load(text, where="site=North A")
    assert len(home.load(text, where="site=North A|north_a")) == 2
    assert len(home.load(text, where="score=1")) == 1  # a sign tells numbers apart
    with pytest.raises(UserError, match="'label=x' leaves out rows with 'X'"):
        home.load("image,label\na.png,x|y\nb.png,z|X\n", where="label=x")
    assert len(home.load("image,label\na.png,x | y\nb.png,x\nc.png,z\n", where="label=x")) == 2


def test_where_and_keep_classes_of_a_dataset_narrow_it(home):
    data = home.load("image,label,source\na.png,x,dev\nb.png,y,dev\nc.png,z,ext\n")
    assert [Path(name).name for name in data.where("source=dev,label=y").images.names] == ["b.png"]
    assert len(data.where("")) == 3
    kept = data.keep_classes(["z", "x"])
    assert kept.labels.tolist() == [1, 0]
    assert [Path(name).name for name in kept.images.names] == ["a.png", "c.png"]
    with pytest.raises(UserError, match=r"no class 'w'; valid: 'x', 'y', 'z'"):
        data.keep_classes(["w"])


def test_a_missing_manifest_names_lists_and_not_whatever_lies_beside_it(home):
    (home.folder / "notes.docx").touch()
    with pytest.raises(UserError, match=r"no such manifest; .* holds none$"):
        load_manifest(home.folder / "q.csv", image_size=8)
    (home.folder / "other.tsv").touch()
    with pytest.raises(UserError, match=r"no such manifest; valid: 'other\.tsv'$"):
        load_manifest(home.folder / "q.csv", image_size=8)


def test_a_missing_manifest_names_the_nearest_file(home):
    path = home.manifest("image,label\na.png,x\n")
    with pytest.raises(UserError, match=r"manifset\.csv: no such manifest; did you mean 'manifest\.csv'\?"):
        load_manifest(path.with_name("manifset.csv"), image_size=8)
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        load_manifest(home.folder / "nowhere" / "manifest.csv", image_size=8)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "image,lable\na.png,x\n",
            {},
            r"no column 'label'; did you mean 'lable'\? its columns: image, lable",
        ),
        ("thing,label\na.png,x\n", {}, r"no column 'image'; .*'thing', 'label'"),
        ("image,label\na.png,x\n", {"group": "subject"}, r"no column 'subject'"),
        ("image,label\n", {}, "no rows; expected a header such as image,label"),
        ("", {}, "no rows"),
        ("image,label\na.png,x\nb.png\n", {}, "row 3: 1 cells, expected 2 as in the header"),
        ("image,label,label\na.png,x,y\n", {}, "column 'label' is there twice"),
        (
            "image,label,patient\na.png,x,P1\nb.png,y,#REF!\n",
            {},
            r"row 3: '#REF!' in column 'patient' is the error of a formula; expected its value, or blank",
        ),
        (
            "image,edema,pleural\na.png,#DIV/0!,1\n",
            {"label": "edema,pleural"},
            "row 2: '#DIV/0!' in column 'edema'",
        ),
        ("image,label\na.png,\n", {}, r"row 2: a\.png has no label; expected a name in column 'label'"),
        ("image,label\n,x\n", {}, "row 2: no image named"),
        ("image,label\na.png,x\n", {"on_bad_image": "skp"}, "on_bad_image='skp'; did you mean 'skip'"),
        (
            "image,label\na.png,x\nb.png,neutrophill\nc.png,neutrophill\n",
            {"classes": ("x", "neutrophil")},
            r"manifest\.csv: row 3: label 'neutrophill' \(2 rows\) is not in classes; did you mean 'neutrophil'\?",
        ),
        (
            'image,label\na.png,edema\nb.png,effusion\nc.png,"edema, Effusion"\nd.png,none\n',
            {},
            r"row 4: label 'edema, Effusion' \(1 rows\) joins labels that .* by ','; expected 'edema\|Effusion' for",
        ),
        (
            "image,label\na.png,x\n",
            {"drop_classes": ("y",)},
            "drop_classes names 'y', which no row has; valid: 'x'",
        ),
        ("image,label\na.png,x\n", {"classes": ("x", "x")}, "classes name 'x' twice"),
        (
            "image,label\na.png,0\nb.png,1\nc.png,False\nd.png,True\n",
            {},
            r"row 4: label 'False' \(1 rows\), elsewhere '0' \(1 rows\); expected one spelling",
        ),
        ("image,label\na.png,no\nb.png,Yes\nc.png,1.0\n", {}, r"label 'Yes' \(1 rows\), elsewhere '1.0'"),
        (
            "image,label,patient,split\na.png,x,P006,train\nb.png,x,P007,train\nc.png,x,P007,test\n",
            {"where": "split=train"},
            r"patient P007 is in splits 'train' and 'test' \(rows 3, 4\)",
        ),
        (
            "image,label,split\na.png,x,train\na.png,x,test\n",
            {},
            r"image a\.png is in splits 'train' and 'test' \(rows 2, 3\)",
        ),
    ],
)
def test_a_wrong_manifest_is_one_line_that_names_the_row_and_the_remedy(home, text, options, message):
    with pytest.raises(UserError, match=message) as caught:
        home.load(text, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Our cohort,,\nimage,label,patient\na.png,x,P1\n",
            "no name above the values of columns 2, 3; expected the first row to be a header such as image,label",
        ),
        (
            "image;label;Patient ID\na.png;x;1,23E+15\n",
            r"row 2: '1,23E\+15' in column 'Patient ID' is a number that a spreadsheet has rounded",
        ),
        (
            "image,label\na.png,x\na.png[0],y\n",
            r"row 3: a\.png\[0\] is in row 2 already, as 'x', and here as 'y'",
        ),
    ],
)
def test_what_a_spreadsheet_or_another_name_of_an_image_spoils_is_told(home, text, message):
    home.image("a.png")
    with pytest.raises(UserError, match=message):
        load_manifest(home.manifest(text, images=False), image_size=8)


def test_text_in_another_encoding_is_refused(home):
    path = home.folder / "manifest.csv"
    path.write_bytes("image,label\na.png,Gef\xe4\xdf\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_manifest(path, image_size=8)


def test_drop_classes_leaves_rows_out(home):
    data = home.load("image,label\na.png,x\nb.png,rare\n", classes=("x",), drop_classes=("rare",))
    assert data.class_counts() == {"x": 1}


MISSING = "image,label\na.png,x\nset/b.png,x\nset/c.png,y\n"


def test_missing_images_are_all_counted_and_the_first_is_named(home):
    home.image("a.png")
    home.image("set/bb.png")
    path = home.manifest(MISSING, images=False)
    with pytest.raises(
        UserError, match=r"2 of 3 images .* do not exist, first: row 3: set/b\.png; .*'bb\.png'"
    ):
        load_manifest(path, image_size=8)


def test_unreadable_images_are_all_counted_and_the_first_is_named(home):
    path = home.manifest(MISSING)
    for name in ("set/b.png", "set/c.png"):
        (home.folder / name).write_bytes((home.folder / name).read_bytes()[:50])
    with pytest.raises(UserError, match=r"2 of 3 images .* cannot be read, first: row 3: .*b\.png: "):
        load_manifest(path, image_size=8)


def test_bad_images_are_skipped_and_counted_on_request_but_bad_labels_never(home):
    path = home.manifest(MISSING)
    (home.folder / "a.png").write_bytes(b"")
    (home.folder / "set/b.png").unlink()
    data = load_manifest(path, image_size=8, on_bad_image="skip", classes=("x", "y"))
    assert data.skipped == 2
    assert data.class_counts() == {"x": 0, "y": 1}
    assert data.images.batch([0]).max() == 100
    with pytest.raises(UserError, match="label 'y'"):
        load_manifest(path, image_size=8, on_bad_image="skip", classes=("x",))
    (home.folder / "set/c.png").unlink()
    with pytest.raises(UserError, match="none of its 3 images can be read"):
        load_manifest(path, image_size=8, on_bad_image="skip")


def test_missing_masks_are_counted(home):
    with pytest.raises(UserError, match=r"1 of 1 masks .* do not exist, first: row 3: .*m\.png"):
        home.load("image,label,mask\na.png,x,\nb.png,x,m.png\n")


def test_images_may_lie_outside_the_manifests_folder(home):
    home.image("a.png")
    (home.folder / "lists").mkdir()
    path = home.manifest("image,label\n../a.png,x\n", "lists/manifest.csv")
    assert len(load_manifest(path, image_size=8)) == 1


def test_fingerprint_follows_labels_images_and_size(home):
    text = "image,label\na.png,x\nb.png,y\n"
    before = home.load(text).fingerprint()
    assert home.load(text).fingerprint() == before
    assert home.load(text, image_size=9).fingerprint() != before
    assert home.load(text, crop=5).fingerprint() != before
    assert home.load(text.replace("y", "z")).fingerprint() != before
    assert home.load("image,label\na.png,y\nb.png,x\n").fingerprint() != before
    home.image("b.png", 101, side=40)
    assert home.load(text).fingerprint() != before


def test_class_folders_are_read(home):
    for name in ("x/1.png", "x/deep/2.JPG", "y/3.png", "y/notes.txt"):
        home.image(name) if not name.endswith("txt") else (home.folder / name).write_text("hello")
    data = load_folder(home.folder, image_size=8)
    assert data.class_counts() == {"x": 2, "y": 1}
    assert not data.columns
    assert len(set(data.groups.tolist())) == 3


def test_split_folders_above_class_folders_become_a_column(home):
    for name in ("train/x/P1_a.png", "train/y/P2_a.png", "test/x/P3_a.png"):
        home.image(name)
    data = load_folder(home.folder, image_size=8, where="split=train", group=r"(P\d+)_")
    assert data.class_counts() == {"x": 1, "y": 1}
    assert data.groups.tolist() == ["P1", "P2"]
    home.image("test/y/P1_b.png")
    with pytest.raises(UserError, match="patient P1 is in splits"):
        load_folder(home.folder, image_size=8, group=r"(P\d+)_")


def test_a_wrong_image_folder_is_explained(home):
    home.image("cells/x/1.png")
    with pytest.raises(UserError, match=r"cels: no such folder; did you mean 'cells'\?"):
        load_folder(home.folder / "cels", image_size=8)
    with pytest.raises(UserError, match=r"no images; expected CLASS/image\.png"):
        load_folder(home.folder / "cells" / "x", image_size=8)
    with pytest.raises(UserError, match=r"finds no patient in 'x/1\.png'"):
        load_folder(home.folder / "cells", image_size=8, group=r"(P\d+)")
    with pytest.raises(UserError, match="not in classes"):
        load_folder(home.folder / "cells", image_size=8, classes=("y",))


def test_the_blood_cell_corpus_is_read_whole(shared_data):
    data = load_manifest(shared_data / "bccd/manifest.csv", image_size=32)
    assert data.class_counts() == {"Platelets": 361, "RBC": 4153, "WBC": 372}
    assert len(set(data.groups.tolist())) == 364


def test_the_white_blood_cells_are_read_with_masks(shared_data):
    classes = ("neutrophil", "lymphocyte", "monocyte", "eosinophil", "basophil")
    path = shared_data / "wbc/manifest.csv"
    data = load_manifest(path, image_size=48, where="source=dataset1", classes=classes)
    assert list(data.class_counts().values()) == [176, 53, 48, 22, 1]
    assert set(np.unique(data.take(range(20)).load_masks())) == {0, 1, 2}
    external = load_manifest(
        path, image_size=48, where="source=dataset2", drop_classes=("basophil",), crop=180
    )
    assert len(external) == 97
    assert duplicates(data, external) == []


def test_a_copied_image_is_found(shared_data):
    data = load_manifest(shared_data / "wbc/manifest.csv", image_size=64, where="source=dataset1")
    pairs = [{Path(data.images.names[index]).name for index in pair} for pair in duplicates(data, data)]
    assert {"112.png", "139.png"} in pairs
    assert len(pairs) < 5
    assert duplicates(data.take([111]), data.take([0, 138])) == [(0, 1)]


def test_the_brain_tumour_splits_are_read_and_keep_patients_apart(shared_data):
    data = load_manifest(shared_data / "brain_mri/manifest.csv", image_size=16)
    sizes = {split: len(data.where(f"split={split}")) for split in ("corpus", "dev", "test", "external")}
    assert sizes == {"corpus": 1793, "dev": 636, "test": 635, "external": 851}
    assert data.masks is not None
    assert data.where("source=web").masks == (None,) * 851


def test_a_set_of_masks_needs_no_labels_and_says_so(home):
    for name in ("a", "b"):
        home.image(f"{name}.png", 10)
        home.image(f"{name}_m.png", 1)
    table = "image,mask,patient\na.png,a_m.png,P1\nb.png,b_m.png,P2\n"
    data = home.load(table, segments=("background", "cell"))
    assert data.classes == ("unlabelled",)
    assert data.segments == ("background", "cell")
    assert data.masks.all()
    assert any("no column 'label'" in note for note in data.notes)
    with pytest.raises(UserError, match="no column 'label'"):
        home.load(table)
    with pytest.raises(UserError, match="no column 'label'"):
        home.load(table, segments=("background", "cell"), classes=("a", "b"))


def test_a_line_or_a_name_too_long_is_one_line_and_the_name_can_be_skipped(home):
    home.manifest("image,label\n" + "," * (2 << 20) + "\n", images=False)
    with pytest.raises(UserError, match=r"line 2 has 2,097,152 characters; expected at most 1,048,576"):
        load_manifest(home.folder / "manifest.csv", image_size=8)
    text = f"image,label\na.png,x\n{'n' * 300}.png,y\n"
    home.image("a.png")
    path = home.manifest(text, images=False)
    with pytest.raises(UserError, match=r"1 of 2 images named in .* do not exist, first: row 3: nnn"):
        load_manifest(path, image_size=8)
    assert load_manifest(path, image_size=8, on_bad_image="skip").skipped == 1
