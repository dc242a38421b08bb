"""What is odd about a set is told of by name before anything is trained; splits keep what they promise or say where not."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score

from dapt_jax import metrics
from dapt_jax.data import findings, near_duplicates
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.decode import ImageStore
from dapt_jax.data.manifest import load_manifest
from dapt_jax.data.sources import load
from dapt_jax.data.splits import grouped_folds, grouped_holdout
from dapt_jax.errors import UserError
from dapt_jax.study import classification
from dapt_jax.study.tasks import ArmKey, Task
from tests import medical_files as write


def dataset(images: np.ndarray, labels, classes=("a", "b"), groups=None) -> Dataset:
    store = ImageStore.from_arrays(images, images.shape[1])
    labels = np.asarray(labels)
    return Dataset("set", store, labels, classes, np.asarray(groups or store.names, dtype=str))


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (n, 16, 16, 3), dtype=np.uint8)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 19)), st.integers(0, 255))
def test_images_without_content_are_counted_and_a_set_or_class_of_them_is_named(flat, grey):
    images = noise(20)
    images[sorted(flat)] = grey
    labels = np.arange(20) // 10
    lines = " / ".join(findings.of_set(dataset(images, labels)))
    if not flat:
        assert not lines
        return
    kind = "all black" if grey <= 2 else "one grey value"
    assert f"({kind} {len(flat)})" in lines
    assert f"first: array/{min(flat):06d}" in lines
    assert ("all 20 images are without content" in lines) == (len(flat) == 20)
    for label, name in enumerate("ab"):
        whole = {*np.flatnonzero(labels == label).tolist()} <= flat
        assert (f"all 10 images of class {name!r}" in lines) == (whole and len(flat) < 20)


@pytest.mark.parametrize("form", ["npy", "tif"])
def test_images_of_nan_alone_are_called_so(tmp_path, form):
    lines = ["image,label"]
    for number in range(6):
        values = np.random.default_rng(number).normal(size=(9, 9)).astype(np.float32)
        values = np.full_like(values, np.nan) if number in (1, 3) else values
        file = tmp_path / f"{number}.{form}"
        np.save(file, values) if form == "npy" else Image.fromarray(values).save(file)
        lines.append(f"{file.name},{'ab'[number % 2]}")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    found = findings.of_set(load_manifest(tmp_path / "m.csv", image_size=9))
    assert any("2 of 6 images (33.3%) are without content (all NaN 2), first: " in line for line in found)


def test_nothing_is_decoded_again_for_what_is_told(tmp_path, monkeypatch):
    lines = ["image,label"]
    for number in range(6):
        Image.fromarray(noise(1, number)[0]).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{'ab'[number % 2]}")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    data = load_manifest(tmp_path / "m.csv", image_size=9, cache_bytes=0)
    monkeypatch.setattr("dapt_jax.data.decode.decode", None)
    assert findings.of_set(data) == []
    assert near_duplicates.duplicates(data, data) == []


def test_look_alikes_are_merged_aloud_and_not_where_the_source_says_so(tmp_path):
    lines = ["image,label,patient"]
    for number in range(10):
        pixels = noise(1, 0 if number == 9 else number)[0].astype(int) + (3 if number == 9 else 0)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{'ab'[number % 2]},P{number}")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    spec = {"kind": "manifest", "path": str(tmp_path / "m.csv")}
    data = load(spec, data_dir=None, image_size=16)
    (line,) = findings.of_set(data, is_split=True)
    assert "2 images of different patients look alike (1 pairs, first: " in line
    assert "0.png and " in line
    assert "merge_look_alikes=False" in line
    groups = near_duplicates.merged(data).groups
    assert groups[0] == groups[9]
    for off in (False, "false"):
        apart = load({**spec, "merge_look_alikes": off}, data_dir=None, image_size=16)
        assert near_duplicates.merged(apart).groups.tolist() == data.groups.tolist()
        assert findings.of_set(apart, is_split=True) == []
    with pytest.raises(UserError, match="merge_look_alikes is 'perhaps'; expected true or false"):
        load({**spec, "merge_look_alikes": "perhaps"}, data_dir=None, image_size=16)


def test_one_picture_under_two_labels_is_named():
    images = noise(6)
    images[5] = images[0]
    lines = findings.of_set(dataset(images, [0, 0, 0, 1, 1, 1]))
    assert any("2 images are 1 picture under several names" in line for line in lines)
    assert any(
        "1 of these pictures have several labels, first: array/000000 and array/000005" in line
        for line in lines
    )


def lacking(labels: np.ndarray, sides: np.ndarray, folds: int) -> int:
    """How many classes of two groups or more some training part lacks; images are groups here."""
    wanted = labels[:, labels.sum(axis=0) >= 2] == 1
    return sum(
        any(not (wanted[:, c] & (sides != fold)).any() for fold in range(folds))
        for c in range(wanted.shape[1])
    )


@settings(max_examples=80, deadline=None)
@given(st.integers(4, 7), st.integers(2, 3), st.integers(0, 10_000))
@example(4, 2, 2294)  # three classes of two patients each, of three: no two folds will do
def test_every_class_of_two_patients_is_in_every_training_part_wherever_that_can_be(n, folds, seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 4)) < rng.uniform(0.1, 0.7, 4)).astype(np.float32)
    splits = grouped_folds(labels, np.arange(n), folds, seed)
    sides = np.zeros(n, int)
    for fold, (_, held) in enumerate(splits):
        sides[held] = fold
    possible = min(
        lacking(labels, np.array(each), folds)
        for each in itertools.product(range(folds), repeat=n)
        if len(set(each)) == folds
    )
    assert lacking(labels, sides, folds) == possible


@settings(max_examples=60, deadline=None)
@given(st.integers(6, 30), st.floats(0.1, 0.8), st.integers(0, 10_000))
def test_a_holdout_leaves_every_class_to_training(n, fraction, seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 4)) < rng.uniform(0.1, 0.7, 4)).astype(np.float32)
    train, held = grouped_holdout(labels, np.arange(n), fraction, seed)
    assert len(held)
    assert not (labels[train].sum(axis=0) == 0)[labels.sum(axis=0) >= 2].any()


def test_a_class_that_a_training_part_lacks_is_named_with_its_fold():
    labels = np.array([0, 1] * 10 + [2])
    data = dataset(noise(21), labels, ("a", "b", "rare"))
    splits = grouped_folds(labels, data.groups, 5, 0)
    fold = next(fold for fold, (_, held) in enumerate(splits) if 20 in held)
    (line,) = findings.of_folds(data, splits)
    assert line.startswith(f"class 'rare' has 1 patient: the training part of fold {fold + 1} of 5 lacks it")
    assert findings.of_folds(data.take(range(20)), grouped_folds(labels[:20], data.groups[:20], 5, 0)) == []


@given(st.integers(0, 1000), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_class_that_a_head_never_saw_is_in_no_mean_over_classes(seed, multi_label):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(3), rng.integers(0, 3, 30)])
    said = rng.dirichlet(np.ones(3), len(labels))
    targets = np.eye(3)[labels] if multi_label else labels
    seen = np.array([True, True, False])
    scores = {
        score.metric: score for score in metrics.classification(targets, said, ("a", "b", "c"), seen=seen)
    }
    every = {score.metric: score for score in metrics.classification(targets, said, ("a", "b", "c"))}
    assert scores["auc"].classes == ("a", "b")
    assert scores["auc"].value == pytest.approx((every["auc/a"].value + every["auc/b"].value) / 2)
    assert np.isnan(scores["auc/c"].value)
    for metric in ("ap", "f1") if multi_label else ("ap", "f1", "balanced_accuracy"):
        assert "c" in every[metric].classes
        assert "c" not in scores[metric].classes


def test_scores_of_folds_leave_out_the_class_that_one_head_never_saw():
    labels = np.array([0, 1] * 10 + [2])
    task = Task(
        "t",
        dataset(noise(21), labels, ("a", "b", "rare")),
        {"external": dataset(noise(9, 1), [0, 1, 2] * 3, ("a", "b", "rare"))},
    )
    folds = task.folds(5, 0)
    rng = np.random.default_rng(0)
    held = [(rng.dirichlet(np.ones(3), len(rows)), rows) for _, rows in folds]
    others = {"external": [rng.dirichlet(np.ones(3), 9) for _ in folds]}
    rows = list(classification.score(task, ArmKey("none", 0, "random", "m"), "linear", held, others))
    value = {(row["split"], row["metric"]): row for row in rows}
    assert value["development", "auc"]["classes"] == ["a", "b"]
    assert value["development", "auc/rare"]["value"] is None
    blind = next(fold for fold, (train, _) in enumerate(folds) if 20 not in train)
    truth = np.array([0, 1, 2] * 3) == 2
    seen = [roc_auc_score(truth, said[:, 2]) for fold, said in enumerate(others["external"]) if fold != blind]
    assert value["external", "auc/rare"]["value"] == pytest.approx(np.mean(seen))
    assert value["external", "auc"]["classes"] == ["a", "b"]


def test_tasks_of_the_users_own_grades_have_a_quadratic_kappa(tmp_path):
    lines = ["image,label,patient"]
    for number in range(12):
        Image.fromarray(noise(1, number)[0]).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{number % 4},P{number}")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    data = load(
        {"kind": "manifest", "path": str(tmp_path / "m.csv"), "ordinal": True}, data_dir=None, image_size=16
    )
    task = Task("t", data, {})
    held = [(np.eye(4)[data.labels[rows]], rows) for _, rows in task.folds(3, 0)]
    rows = {
        row["metric"]: row["value"]
        for row in classification.score(task, ArmKey("n", 0, "r", "m"), "linear", held, {})
    }
    assert rows["kappa_quadratic"] == 1


@pytest.mark.parametrize(
    ("shape", "size", "crop", "words"),
    [
        ((40, 40), 16, None, []),
        ((40, 90), 16, None, ["far from square and squashed to 16 x 16, the default", "model.resize=pad"]),
        ((40, 90), 16, 40, []),
        ((140, 140), 16, None, ["140 x 140 pixels, median of 3 files) are shrunk 9 times to 16 x 16"]),
    ],
)
def test_what_resizing_loses_is_told_before_training(tmp_path, shape, size, crop, words):
    values = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    for number in range(3):
        Image.fromarray(values + number).save(tmp_path / f"{number}.png")
    (tmp_path / "manifest.csv").write_text("image,label\n0.png,a\n1.png,b\n2.png,a\n")
    dataset = load_manifest(tmp_path / "manifest.csv", image_size=size, crop=crop)
    lines = [line for line in findings.of_set(dataset) if "median of" in line]
    assert len(lines) == bool(words)
    assert all(word in lines[0] for word in words)


@pytest.mark.parametrize(("window", "told"), [("", True), ("32608,33008", False)])
def test_a_set_that_is_shown_in_few_grey_levels_is_told_of(tmp_path, window, told):
    rows = ["image,label"]
    for number in range(6):
        hounsfield = np.random.default_rng(number).normal(40, 150, (32, 32)).clip(-1000, 1500)
        hounsfield[:8] = -1000  # air
        Image.fromarray((hounsfield + 32768).astype(np.uint16)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{'ab'[number % 2]}")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    lines = findings.of_set(load_manifest(tmp_path / "m.csv", image_size=32, window=window))
    assert len(lines) == told
    if told:
        assert re.match(
            r"the images are shown in [5-7] of 256 grey levels \(12\d to 1[23]\d, .*16 bits.*window=",
            lines[0],
        )


@pytest.mark.parametrize(
    ("modality", "width", "told"), [("CT", 1500, True), ("CT", 700, False), ("MR", 1500, False)]
)
def test_ct_of_very_different_windows_is_told_of(tmp_path, modality, width, told):
    rows = ["image,label,patient"]
    for number in range(4):
        values = np.random.default_rng(number).integers(0, 2000, (16, 16)).astype(np.uint16)
        write.dicom(
            tmp_path / f"{number}.dcm", values, Modality=modality, RescaleSlope=1, RescaleIntercept=-1024,
            WindowCenter=40, WindowWidth=width if number == 2 else 400,
        )  # fmt: skip
        rows.append(f"{number}.dcm,{'ab'[number % 2]},{number}")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    path = tmp_path / "m.csv"
    lines = [
        line for line in findings.of_set(load_manifest(path, image_size=16)) if "windows of the CT" in line
    ]
    assert len(lines) == told
    if told:
        assert re.search(
            r"399 to 1499 wide \(.*3\.dcm and .*2\.dcm\), .* one window='LOW,HIGH' for all", lines[0]
        )
    assert not any(
        "windows of" in line for line in findings.of_set(load_manifest(path, image_size=16, window="0,80"))
    )
