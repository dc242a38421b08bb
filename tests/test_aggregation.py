"""Scores of patients beside those of images: aggregated by hand, in results, in predictions and on the page."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn import metrics as sk

from dapt_jax import metrics
from dapt_jax.data import sources
from dapt_jax.errors import UserError
from dapt_jax.records import predictions as files
from dapt_jax.records.study_records import Records
from dapt_jax.settings import StudySettings, default, resolve
from dapt_jax.settings.sources import TaskSettings
from dapt_jax.statistics import Aggregation, Units
from dapt_jax.study import classification, prepare, segmentation
from dapt_jax.study.predictions import Predictions
from dapt_jax.study.tasks import ArmKey, Task
from tests import tiny

KEY = ArmKey("full", 0, "imagenet", "tiny")
UNITS = Units.of(np.array(["b", "a", "b", "a", "b"]))
TWO = np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [0.6, 0.4]])


def test_rules_by_hand():
    assert UNITS.names.tolist() == ["a", "b"]
    assert UNITS.probabilities(TWO, "mean", False)[:, 1] == pytest.approx([0.55, 0.5])
    assert UNITS.probabilities(TWO, "max", False) == pytest.approx(np.array([[0.3, 0.7], [0.1, 0.9]]))
    assert UNITS.probabilities(TWO, "vote", False)[:, 1] == pytest.approx([1 / 2, 1 / 3])
    assert UNITS.probabilities(TWO, "max", True) == pytest.approx(np.array([[0.6, 0.7], [0.8, 0.9]]))
    assert UNITS.probabilities(TWO, "vote", True) == pytest.approx(np.array([[0.5, 0.5], [2 / 3, 1 / 3]]))


def test_labels_by_hand():
    assert UNITS.labels(np.array([0, 0, 1, 0, 0]), 2).tolist() == [0, 1]
    assert UNITS.labels(np.array([2, 0, 2, 0, 2]), 3).tolist() == [0, 2]
    with pytest.raises(UserError, match=r"'b' has images of 2 of 3 classes; expected one class"):
        UNITS.labels(np.array([2, 0, 1, 0, 2]), 3)
    several = np.array([[0, 1], [0, np.nan], [np.nan, 0], [0, 1], [0, 0]])
    np.testing.assert_array_equal(UNITS.labels(several, 2), [[0, 1], [np.nan, 1]])


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.0, 1.0, width=32)), min_size=1, max_size=30))
def test_units_of_one_image_each_change_nothing_and_a_mean_stays_within_its_images(rows):
    scores = np.array([score for _, score in rows])
    probabilities = np.stack([1 - scores, scores], 1)
    alone = Units.of(np.arange(len(rows)))
    for rule in ("mean", "max"):
        assert alone.probabilities(probabilities, rule, False) == pytest.approx(probabilities)
    units = Units.of(np.array([unit for unit, _ in rows]))
    mean, most = (units.probabilities(probabilities, rule, False)[:, 1] for rule in ("mean", "max"))
    lowest = np.array([scores[units.member == unit].min() for unit in range(len(units.names))])
    assert ((lowest - 1e-6 <= mean) & (mean <= most + 1e-6)).all()


def task(rule="mean", unit="patient", classes=2, **columns):
    """A task of three images per patient, each patient of one class."""
    sets = []
    for seed, n in enumerate((24, 18)):
        labels = np.repeat(np.arange(n // 3) % classes, 3)
        groups = np.repeat([f"s{seed} p{patient}" for patient in range(n // 3)], 3)
        data = tiny.dataset(n, seed=seed, classes=classes)
        own = {name: values[:n] for name, values in columns.items()}
        sets.append(dataclasses.replace(data, labels=labels, groups=groups, columns=own))
    return Task("cells", sets[0], {"external": sets[1]}, aggregation=Aggregation(unit, rule))


def predicted(of, seed=0):
    """Predictions of two folds by patient."""
    rng = np.random.default_rng(seed)
    parts = [np.arange(12), np.arange(12, 24)]
    draw = lambda n: rng.dirichlet(np.ones(len(of.development.classes)), n).astype(np.float32)  # noqa: E731
    return [(draw(12), rows) for rows in parts], {"external": [draw(18) for _ in parts]}


def test_results_hold_scores_of_images_and_of_patients():
    of = task()
    out_of_fold, held_out = predicted(of)
    rows = list(classification.score(of, KEY, "linear", out_of_fold, held_out))
    value = {(r["protocol"], r["split"]): (r["value"], r["n"]) for r in rows if r["metric"] == "auc"}
    name = "linear by patient (mean)"
    assert {protocol for protocol, _ in value} == {"linear", name}
    external = of.held_out["external"]
    of_folds = [
        sk.roc_auc_score(external.labels[::3], fold[:, 1].reshape(-1, 3).mean(1))
        for fold in held_out["external"]
    ]
    assert value[name, "external"] == (pytest.approx(np.mean(of_folds)), 6)
    assert value["linear", "external"][1] == 18
    assert value[name, "development"][1] == 8


def test_stored_predictions_are_read_by_patient_and_are_the_primary_ones(tmp_path):
    of = task("vote", classes=3)
    kept = Predictions(of)
    out_of_fold, held_out = predicted(of)
    kept.add("linear", out_of_fold, held_out)
    kept.write(tmp_path, "full", 0)
    path = files.path_of(tmp_path, "full", 0, "cells", "external")
    found = files.read(path, "linear by patient (vote)")
    assert len(found.groups) == len(np.unique(of.held_out["external"].groups)) == 6
    votes = np.eye(3)[np.mean(held_out["external"], 0).argmax(1)].reshape(6, 3, 3).mean(1)
    assert found.probabilities == pytest.approx(votes)
    assert found.labels.tolist() == of.held_out["external"].labels[::3].tolist()
    rows = list(classification.score(of, KEY, "linear", out_of_fold, held_out))
    assert (
        Records({"report": {"protocol": "linear"}}, rows, []).protocol("cells") == "linear by patient (vote)"
    )
    arrays = dict(np.load(path))
    np.savez(path, **{name: each for name, each in arrays.items() if name != "unit"})
    assert files.read(path, "linear by patient (vote)") is None


def test_volumes_of_a_patient_are_apart_and_an_image_without_one_is_alone():
    scan = np.array(["1", "1", "2"] * 8)
    scan[2] = ""
    of = task(unit="scan", scan=scan)
    units = of.units(of.development)
    assert len(set(units.tolist())) == 2 * 8
    assert units[0] == units[1] != units[2]


def test_the_dice_of_a_volume_counts_the_pixels_of_all_of_its_slices():
    rng = np.random.default_rng(0)
    truth, predicted = (rng.integers(0, 3, (5, 4, 4)).astype(np.uint8) for _ in range(2))
    slices = metrics.Segmentation(("background", "a", "b"))
    slices.add(truth, predicted)
    volumes = slices.of_units(np.array(["v1", "v0", "v1", "v0", "v0"]))
    as_volumes = metrics.Segmentation(("background", "a", "b"), surfaces=False)
    for rows in ([1, 3, 4], [0, 2]):  # a volume is an image whose slices lie side by side
        as_volumes.add(*(np.concatenate(each[rows], 1)[None] for each in (truth, predicted)))
    assert volumes.scores() == as_volumes.scores()
    assert {score.n for score in volumes.scores()} == {2}


def test_a_task_of_masks_is_scored_by_slice_and_by_volume():
    masks = np.zeros((12, 16, 16), np.uint8)
    masks[:, 4:9, 5:11] = 1
    data = dataclasses.replace(tiny.dataset(12), masks=masks).segmented(("background", "cell"))
    of = Task("cells", data, {"external": data}, aggregation=Aggregation("patient", "pixels"))
    rows = segmentation.baseline(StudySettings(), of, 0)
    n = {(row["protocol"], row["split"]): row["n"] for row in rows if row["metric"] == "dice"}
    by_patient = "pixel_colour by patient (pixels)"
    assert n["pixel_colour", "external"] == 12
    assert n[by_patient, "external"] == len(np.unique(data.groups)) == 6
    assert 2 * n[by_patient, "development"] == n["pixel_colour", "development"]  # two slices a patient
    assert not [
        row for row in rows if " by " in row["protocol"] and row["metric"].startswith(("hd95", "assd"))
    ]
    with pytest.raises(UserError, match="aggregate is 'mean' for a task of masks; expected none"):
        dataclasses.replace(of, aggregation=Aggregation("patient", "mean"))


def study_task(folder, names, is_mixed=True, **settings):
    """A task read as a study reads it, of four patients, of whom two have one image of the first name."""
    rng, lines = np.random.default_rng(0), ["image,label,patient"]
    for row in range(16):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{row}.png")
        patient = row // 4
        is_first = patient < 2 and (row % 4 == 0 or not is_mixed)
        lines.append(f"{row}.png,{names[0] if is_first else names[1]},P{patient}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    config = default()
    config.strategies, config.model.image_size = ("none",), 16
    classes = settings.pop("classes", ())
    source = {"kind": "manifest", "path": str(folder / "table.csv"), "classes": classes}
    config.tasks.t = {"development": source, "unit": "patient", **settings}
    resolved = resolve(config)
    loaded = {
        named: prepare.ReadSet(sources.load(named.source, data_dir=None, image_size=16), "", [])
        for named in prepare.named_sets(resolved, [])
    }
    return prepare.task_of(resolved, loaded, "t")


@pytest.mark.parametrize("rule", ["mean", "max", "vote"])
@pytest.mark.parametrize("names", [("malignant", "normal"), ("glioma", "no_tumor"), ("tumour", "healthy")])
def test_no_alphabet_says_which_of_two_classes_one_image_is_enough_for(tmp_path, names, rule):
    with pytest.raises(UserError) as error:
        study_task(tmp_path, names, aggregate=rule)
    line = str(error.value)
    assert (
        "tasks.t.unit=patient: 2 units have images of both classes, first: 'P0' of development; expected "
        in line
    )
    assert f"classes=({names[1]!r}, {names[0]!r})" in line
    of = study_task(tmp_path, names, aggregate=rule, classes=(names[1], names[0]))
    found = Units.of(of.units(of.development)).labels(of.development.truth, 2)
    assert [of.development.classes[label] for label in found] == [names[0], names[0], names[1], names[1]]


def test_units_of_one_class_each_need_no_order_but_for_the_largest_probability(tmp_path):
    names = ("malignant", "normal")
    assert study_task(tmp_path, names, is_mixed=False).development.classes == names
    with pytest.raises(
        UserError, match=r"tasks\.t\.aggregate=max takes one of two classes; expected classes="
    ):
        study_task(tmp_path, names, is_mixed=False, aggregate="max")
    assert study_task(tmp_path, names, is_mixed=False, aggregate="max", classes="normal,malignant")


SET = {"development": {"kind": "phantoms"}}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda: task(unit="scam", scan=np.array(["1"] * 24)),
            "tasks.cells.unit: development has no column 'scam'; did you mean 'scan'",
        ),
        (
            lambda: task("max", classes=3),
            "aggregate=max takes the second of two classes; expected mean or vote for 3",
        ),
        (
            lambda: TaskSettings.from_config({**SET, "unit": "patient", "aggregate": "maen"}, "tasks.t"),
            "tasks.t.aggregate is 'maen'; did you mean 'mean'",
        ),
        (
            lambda: TaskSettings.from_config({**SET, "aggregate": "max"}, "tasks.t"),
            "tasks.t.aggregate without tasks.t.unit",
        ),
    ],
)
def test_what_cannot_be_aggregated_is_refused_in_a_line(made, said):
    with pytest.raises(UserError) as error:
        made()
    assert said in str(error.value)
    assert "\n" not in str(error.value)
