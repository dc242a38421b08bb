"""No image and no patient is in two sets that have to be apart: found by file, content, look and patient."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dapt_jax.data import near_duplicates
from dapt_jax.data.manifest import load_manifest
from dapt_jax.data.sources import load
from dapt_jax.errors import UserError
from dapt_jax.settings.schema import DataSettings
from dapt_jax.study import leakage
from dapt_jax.study.tasks import Task
from tests import medical_files as write

FEW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def scene(number: int, side: int = 48) -> np.ndarray:
    """A smooth picture of its own, uint8 [side, side]."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:side, :side] / side
    waves = sum(
        rng.normal() * np.cos(2 * np.pi * (rng.uniform(0, 4) * x + rng.uniform(0, 4) * y + rng.uniform()))
        for _ in range(8)
    )
    return np.rint((waves - waves.min()) / np.ptp(waves) * 200 + 20).astype(np.uint8)


class Sets:
    """Tables of pictures, each row a picture's number, patient and the way in which its file is made."""

    def __init__(self, folder: Path):
        self.folder = folder

    def table(self, name: str, rows: list[tuple[int, str]], how: str = "same", size: int = 32, **options):
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["image,label,patient"]
        for place, (number, patient) in enumerate(rows):
            file = self._write(folder / f"{name}{place}", number, how)
            lines.append(f"{file},{'ab'[number % 2]},{patient}")
        (folder / "table.csv").write_text("\n".join(lines))
        return load_manifest(folder / "table.csv", image_size=size, classes=("a", "b"), **options)

    def _write(self, stem: Path, number: int, how: str) -> Path:
        pixels = scene(number)
        if how == "jpeg":
            Image.fromarray(pixels).resize((61, 61)).save(stem.with_suffix(".jpg"), quality=70)
            return Path(f"{stem.name}.jpg")
        if how == "brighter":
            Image.fromarray((pixels + 25).astype(np.uint8)).convert("RGB").save(stem.with_suffix(".png"))
            return Path(f"{stem.name}.png")
        if how == "link":
            original = self.folder / f"{number}.png"
            if not original.exists():
                Image.fromarray(pixels).save(original)
            return Path("..", original.name)
        Image.fromarray(pixels).save(stem.with_suffix(".png"))
        return Path(f"{stem.name}.png")


@pytest.fixture
def sets(tmp_path):
    return Sets(tmp_path / "sets")


def test_equal_files_are_found_though_each_set_crops_and_sizes_them_in_its_own_way(sets):
    ours = sets.table("ours", [(number, f"p{number}") for number in range(8)])
    theirs = sets.table("theirs", [(number, f"q{number}") for number in range(4, 12)], size=24, crop=20)
    assert kinds(leakage.between(ours, theirs, "ours", "theirs")) == {**kinds([]), "content": 4}


def kinds(found: list[leakage.Leak]) -> dict[str, int]:
    return {kind: sum(leak.kind == kind for leak in found) for kind in ("file", "content", "look", "patient")}


@pytest.mark.parametrize(
    ("how", "kind"), [("link", "file"), ("same", "content"), ("jpeg", "look"), ("brighter", "look")]
)
def test_copies_are_found_however_they_were_made_and_nothing_else_is(sets, how, kind):
    ours = sets.table(
        "ours", [(number, f"p{number}") for number in range(30)], "link" if how == "link" else "same"
    )
    copies = [(number, f"q{number}") for number in range(20, 30)]
    theirs = sets.table("theirs", copies + [(number, f"q{number}") for number in range(100, 120)], how)
    found = leakage.between(ours, theirs, "ours", "theirs")
    assert kinds(found) == {**kinds([]), kind: 10}
    assert {(leak.rows_a[0] - 20, leak.rows_b[0]) for leak in found} == {
        (number, number) for number in range(10)
    }


@FEW
@given(
    st.lists(
        st.sampled_from(
            [("P7", "p07"), ("007", "7"), ("12.0", "12"), ("José", "Jose\u0301"), ("A-1", "a_1")]
        ),
        min_size=1,
        unique=True,
    )
)
def test_patients_are_found_though_the_tables_spell_them_in_two_ways(tmp_path, pairs):
    sets = Sets(tmp_path / "spelt")
    ours = sets.table("ours", [(number, pair[0]) for number, pair in enumerate(pairs)] + [(90, "other")])
    theirs = sets.table(
        "theirs", [(100 + number, pair[1]) for number, pair in enumerate(pairs)] + [(190, "another")]
    )
    found = leakage.between(ours, theirs, "ours", "theirs")
    assert kinds(found) == {
        **kinds([]),
        "patient": len({leakage.identity.spelling(pair[0]) for pair in pairs}),
    }


def test_images_without_a_patient_and_images_without_content_leak_nothing(sets):
    ours, theirs = (
        sets.table(name, [(number + start, "") for number in range(8)])
        for name, start in (("o", 0), ("t", 50))
    )
    for number, data in enumerate((ours, theirs)):
        Image.fromarray(np.full((9 + number, 9), 7, np.uint8)).save(Path(data.images.names[0]))
    again = [
        load_manifest(sets.folder / name / "table.csv", image_size=32, classes=("a", "b"))
        for name in ("o", "t")
    ]
    assert leakage.between(*again, "o", "t") == []


def test_the_patient_of_a_dicom_file_counts_whatever_the_table_calls_him(tmp_path):
    for name, start in (("a", 0), ("b", 10)):
        lines = ["image,label,patient"]
        for number in range(4):
            pixels = scene(start + number).astype(np.uint16)
            write.dicom(tmp_path / name / f"{number}.dcm", pixels, PatientID=f"MRN{number + start // 5}")
            lines.append(f"{number}.dcm,{'xy'[number % 2]},{name}{number}")
        (tmp_path / name / "m.csv").write_text("\n".join(lines))
    a, b = (load_manifest(tmp_path / name / "m.csv", image_size=32) for name in ("a", "b"))
    found = leakage.between(a, b, "a", "b")
    assert kinds(found) == {**kinds([]), "patient": 2}
    assert {leak.patient for leak in found} == {"MRN2", "MRN3"}


def study(sets, how="same"):
    """A corpus, development and external images that share two pictures and, beside these, a patient."""
    corpus = sets.table("corpus", [(number, f"c{number}") for number in range(200, 212)])
    development = sets.table("dev", [(number, f"p{number}") for number in range(12)])
    outside = [(0, "x0"), (1, "x1"), (50, "p5"), *((number, f"x{number}") for number in range(60, 68))]
    return Task("t", development, {"external": sets.table("ext", outside, how)}), corpus


def test_an_error_names_both_sets_and_the_ways_out(sets):
    task, corpus = study(sets, "jpeg")
    with pytest.raises(UserError) as caught:
        leakage.resolve([task], {"": corpus})
    line = str(caught.value)
    for words in (
        "2 images are in both t external and t development (by look 2), first: ", "dev0.png is ", "ext0.jpg",
        "1 patient is in both t external and t development, first: p5", "data.leaks='drop_train'", "'drop_eval'", "'mark'",
        "data.leaks=LIST.csv", "cohort",
    ):  # fmt: skip
        assert words in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("policy", "sizes"), [("drop_train", (12, 9, 11)), ("drop_eval", (12, 12, 8)), ("mark", (12, 12, 11))]
)
def test_a_policy_drops_from_one_side_or_marks(sets, policy, sizes):
    task, corpus = study(sets)
    found = leakage.resolve([task], {"": corpus}, policy)
    left = found.tasks[0]
    assert (len(found.corpora[""]), len(left.development), len(left.held_out["external"])) == sizes
    assert len(found.notes) == 1
    assert found.marks == (
        {"t": {"external": "2 images (by content 2); 1 patient"}} if policy == "mark" else {}
    )
    if policy != "mark":
        assert leakage.resolve(found.tasks, found.corpora).notes == []  # nothing is left to be found


@pytest.mark.parametrize(("policy", "sizes"), [("drop_train", (10, 7)), ("drop_eval", (14, 4))])
def test_an_image_is_dropped_with_all_of_its_patient_under_whatever_name(sets, policy, sizes):
    own = [(number, "D0") for number in range(3)] + [(3, "d0"), (4, "")]
    development = sets.table("dev", own + [(number, f"D{number}") for number in range(5, 14)])
    other = [(0, "X9"), (50, "X9"), (51, "X9"), (52, ""), (53, ""), (54, "X1"), (55, "X1")]
    task = Task("t", development, {"external": sets.table("ext", other)})
    found = leakage.resolve([task], {}, policy)
    left = found.tasks[0]
    assert (len(left.development), len(left.held_out["external"])) == sizes
    patients = {*left.development.groups.tolist(), *left.held_out["external"].groups.tolist()}
    assert not ({"D0", "d0"} if policy == "drop_train" else {"X9"}) & patients
    dropped = "4 images of t development (3" if policy == "drop_train" else "3 images of t external (2"
    assert found.notes[0].startswith(
        f"leaks dropped: {dropped} as others of the same patients), since 1 image is"
    )


def test_a_slice_is_dropped_with_its_whole_volume(tmp_path):
    parts = []
    for name, numbers in (("a", (0, 1, 2)), ("b", (1, 50, 51))):
        volume = np.stack([scene(number).T for number in numbers], -1).astype(np.float32)
        write.nifti(tmp_path / f"{name}.nii.gz", volume)
        Image.fromarray(scene(60 + numbers[1])).save(tmp_path / f"{name}.png")
        lines = [f"{name}.nii.gz[{place}],{'ab'[place % 2]}" for place in range(3)] + [f"{name}.png,a"]
        (tmp_path / f"{name}.csv").write_text("\n".join(["image,label", *lines]))
        parts.append(load_manifest(tmp_path / f"{name}.csv", image_size=32, window="0,255"))
    left = leakage.resolve([Task("t", parts[0], {"external": parts[1]})], {}, "drop_train").tasks[0]
    assert (len(left.development), len(left.held_out["external"])) == (1, 4)


def test_a_corpus_is_nearer_to_training_than_any_target(sets):
    task, _ = study(sets)
    corpus = sets.table("other", [(number, f"c{number}") for number in range(8, 20)])
    clean = Task("t", task.development, {})
    assert len(leakage.resolve([clean], {"": corpus}, "drop_train").corpora[""]) == 8
    assert len(leakage.resolve([clean], {"": corpus}, "drop_eval").tasks[0].development) == 8
    marks = leakage.resolve([clean], {"": corpus}, "mark").marks
    assert marks == {"t": {"development": "4 images (by content 4)"}}
    with pytest.raises(UserError, match="corpus: all of its 12 images are in other sets too"):
        leakage.resolve([clean], {"": task.development}, "drop_train")


def test_a_list_is_written_filled_in_and_followed(sets, tmp_path):
    task, corpus = study(sets)
    path = tmp_path / "lists" / "leaks.csv"
    with pytest.raises(
        UserError, match=rf"all are listed in {re.escape(str(path))}: fill in its column decision"
    ):
        leakage.resolve([task], {"": corpus}, str(path))
    with pytest.raises(UserError, match=r"leaks\.csv: no decision on 2 images"):
        leakage.resolve([task], {"": corpus}, str(path))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["content", "content", "patient"]

    def decided(*words):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows([row | {"decision": word} for row, word in zip(rows, words, strict=True)])
        return leakage.resolve([task], {"": corpus}, str(path))

    found = decided("drop_train", "mark", "distinct")
    assert len(found.tasks[0].development) == 11
    assert found.marks == {"t": {"external": "1 image (by content 1)"}}
    assert decided("distinct", "distinct", "distinct").notes == []
    with pytest.raises(UserError, match=r"row 3: decision 'drop'; did you mean 'drop_"):
        decided("mark", "drop", "mark")


def test_an_unknown_policy_is_refused_before_any_image_is_read():
    with pytest.raises(
        UserError, match=r"unknown leaks 'marc'; did you mean 'mark'\?, or the path of a list\.csv"
    ):
        DataSettings(leaks="marc")
    assert DataSettings(leaks="decided.csv").leaks == "decided.csv"


def test_patients_of_two_cohorts_are_others_whatever_their_names(sets):
    ours = sets.table("ours", [(number, str(number)) for number in range(4)])
    theirs = sets.table("theirs", [(number + 10, str(number)) for number in range(4)])
    assert len(leakage.between(ours, theirs, "a", "b")) == 4
    spec = {"kind": "manifest", "classes": ("a", "b")}
    apart = [
        load(
            {**spec, "path": str(sets.folder / name / "table.csv"), "cohort": name},
            data_dir=None,
            image_size=32,
        )
        for name in ("ours", "theirs")
    ]
    assert leakage.between(*apart, "a", "b") == []


@pytest.mark.parametrize("where", ["two", "one"])
def test_the_case_of_leaks(shared_cases, where):
    tables = (
        ("train/manifest.csv", "test/manifest.csv") if where == "two" else ("one/train.csv", "one/test.csv")
    )
    a, b = (load_manifest(shared_cases / "leak" / table, image_size=32) for table in tables)
    found = leakage.between(a, b, "a", "b")
    assert kinds(found) == {"file": 0, "content": 6, "look": 0, "patient": 7}


def test_hidden_slices_are_found_among_real_ones(shared_data, tmp_path):
    table = shared_data / "brain_mri/manifest.csv"
    test = load_manifest(table, image_size=96, where="split=test")
    external = load_manifest(table, image_size=96, where="split=external")
    assert kinds(leakage.between(test, external, "test", "external")) == kinds([])
    rows = np.random.default_rng(0).choice(len(test), 30, replace=False)
    lines = ["image,label", *(f"{name},x" for name in external.images.names[:60])]
    for row in rows:
        Image.open(test.images.names[row]).resize((211, 211)).save(tmp_path / f"h{row}.jpg", quality=80)
        lines.append(f"h{row}.jpg,y")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    hidden = load_manifest(tmp_path / "m.csv", image_size=96)
    found = leakage.between(test, hidden, "a", "b")
    assert {leak.rows_b[0] for leak in found} == set(range(60, 90))
    assert set(rows.tolist()) <= {
        leak.rows_a[0] for leak in found
    }  # and neighbours of some, that look like them


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 60), st.floats(0.9, 0.999))
def test_no_pair_of_look_alikes_is_missed_where_not_all_pairs_are_tried(seed, n, m, correlation):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, 768)).astype(np.float32)
    b = np.concatenate(
        [
            a[rng.integers(0, n, m)] + rng.normal(size=(m, 768)) * rng.uniform(0, 0.5, (m, 1)),
            rng.normal(size=(3, 768)),
        ]
    )
    a, b = (x.astype(np.float32) / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    every = near_duplicates._alike(a, b, correlation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "_ALL_PAIRS", 0)
        some = near_duplicates._alike(a, b, correlation)
    assert sorted(map(tuple, some.tolist())) == sorted(map(tuple, every.tolist()))


def test_marked_leaks_are_in_every_table_of_the_report(tmp_path):
    from dapt_jax.records.study_records import LEAKS
    from dapt_jax.report import page

    (tmp_path / "config.json").write_text(json.dumps({"strategies": ["none", "full"], "seeds": [0]}))
    rows = [
        {"strategy": name, "seed": 0, "init": "random", "model": "m", "task": "t", "split": split, "protocol": "linear",
         "metric": metric, "value": 0.7, "n": 9, "classes": ["a", "b"]}
        for name in ("none", "full") for split in ("development", "external") for metric in ("auc", "accuracy", "auc/a")
    ]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.build(tmp_path)
    before = (tmp_path / "report.md").read_text()
    assert "‡" not in before
    (tmp_path / LEAKS).write_text(json.dumps({"t": {"external": "2 images (by look 2)"}}))
    page.build(tmp_path)
    text = (tmp_path / "report.md").read_text()
    tables = re.findall(r"^### .*?(?=^###|^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(tables) >= 3
    for table in tables:
        assert (
            "‡ Leak, kept on request; seen in training or in another set: external: 2 images (by look 2)"
            in table
        )
    assert "external ‡" in text
    assert "LEAK: 2 images (by look 2) of t external" in text
