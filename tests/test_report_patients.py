"""How many patients would show a difference: its standard error is DeLong's, and the formula gives the power it names."""

import math
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from dapt_jax import statistics
from dapt_jax.records import predictions as files
from dapt_jax.records.study_records import Records
from dapt_jax.report import build, patients, predictions
from dapt_jax.report.recommendation import recommend
from tests import test_report_example as report_example

TASK = "tumour type"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    workdir = report_example.write(
        tmp_path_factory.mktemp("study"), seeds=(0, 1), strategies=("none", "full")
    )
    rng = np.random.default_rng(3)
    labels = np.arange(160) % 2
    found = {}
    for name, gain in (("none", 0.9), ("full", 1.2)):
        for seed in (0, 1):
            logits = rng.normal(size=160) + gain * labels
            chances = 1 / (1 + np.exp(-logits))
            found[name, seed] = chances
            path = files.path_of(workdir, name, seed, TASK, "external")
            names = np.array([f"p{row}" for row in range(160)])
            images = np.char.add(names, ".png")
            files.write(path, labels, names, images, {"linear": np.stack([1 - chances, chances], 1)})
    return workdir, labels, found


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30), st.integers(0, 99))
def test_weighted_areas_are_those_of_scikit_learn(rows, seed):
    positive, scores = np.array(rows)[:, 0].astype(bool), np.array(rows)[:, 1] / 5
    weights = np.random.default_rng(seed).integers(1, 4, size=len(rows))
    found = statistics.weighted_aucs(positive, scores, weights[None])[0]
    if 0 < positive.sum() < len(positive):
        assert found == pytest.approx(sk.roc_auc_score(positive, scores, sample_weight=weights))
    else:
        assert math.isnan(found)


def test_the_error_of_one_seed_is_delongs(study):
    workdir, labels, found = study
    records = Records.read(workdir)
    records.seeds = [0]
    error = patients.error_of_difference(workdir, records, TASK, "external", "full", "none")
    areas = statistics.delong(labels == 1, np.stack([found["full", 0], found["none", 0]]))
    theirs = areas.difference(0, 1).difference
    assert error.difference == pytest.approx(theirs.mean)
    assert error.patients == 160
    assert error.error == pytest.approx(theirs.half / 1.96, rel=0.2)


def test_images_that_name_no_patient_are_not_called_patients(study, tmp_path):
    workdir, labels, found = study
    shutil.copytree(workdir, tmp_path / "copy")
    for (name, seed), chances in found.items():
        path = files.path_of(tmp_path / "copy", name, seed, TASK, "external")
        own = np.array([f"cells/{row}.png" for row in range(160)])
        images = np.array([f"{row}.png" for row in range(160)])
        files.write(path, labels, own, images, {"linear": np.stack([1 - chances, chances], 1)})
    box = dict(recommend(Records.read(tmp_path / "copy"), TASK, tmp_path / "copy").lines)
    assert "Patients, external" not in box
    assert box["Images, external"].startswith("160 now, each drawn by itself; ")
    assert (
        "each image is drawn by itself"
        in predictions.table(tmp_path / "copy", Records.read(workdir), TASK).note
    )
    assert "by itself" not in predictions.table(workdir, Records.read(workdir), TASK).note


def test_the_error_above_chance_is_that_of_the_score_itself(study):
    workdir, labels, found = study
    records = Records.read(workdir)
    records.seeds = [0]
    error = patients.error_of_difference(workdir, records, TASK, "external", "full", 0.5)
    assert error.difference == pytest.approx(sk.roc_auc_score(labels, found["full", 0]) - 0.5)
    both = statistics.delong(labels == 1, np.stack([found["full", 0], found["none", 0]]))
    assert error.error == pytest.approx(math.sqrt(both.covariance[0, 0]), rel=0.2)


def test_the_number_of_patients_has_the_power_that_is_named():
    error = patients.PatientError(0.04, 0.03, 100)
    at_needed = 0.03 * math.sqrt(100 / error.needed)
    power = stats.norm.sf(1.959964 - 0.04 / at_needed)
    assert power == pytest.approx(patients.POWER, abs=1e-3)
    assert patients.PatientError(0.0, 0.03, 100).needed == math.inf


def test_the_box_says_how_many_more_and_nothing_without_predictions(study):
    workdir, _, _ = study
    records = Records.read(workdir)
    said = dict(recommend(records, TASK, workdir).lines)["Patients, external"]
    assert said.startswith("160 now; these seeds differ by ")
    assert "about " in said or "suffices" in said or "100 times" in said
    assert "Patients, external" not in dict(recommend(records, TASK).lines)
    (workdir / "predictions").rename(workdir / "moved")
    build(workdir)
    (workdir / "moved").rename(workdir / "predictions")
    assert "these seeds differ" not in (workdir / "report.md").read_text()
