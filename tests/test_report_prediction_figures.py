"""Curves, reliability and confusion of stored predictions, against scikit-learn and by hand."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from dapt_jax import metrics, statistics
from dapt_jax.records import predictions as files
from dapt_jax.records.study_records import Records
from dapt_jax.report import build, by_source
from dapt_jax.report.prediction_figures import SplitPredictions
from dapt_jax.report.recommendation import arms_shown
from tests import test_report_example as report_example

TASK = "tumour type"
CLASSES = ("glioma", "meningioma", "pituitary")


def keep(workdir, strategies=("none", "full"), seeds=(0, 1), classes=3, n=60, sources=True):
    """Leaves predictions of both splits, and returns the labels and the probabilities of the external ones."""
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.arange(n) % classes)
    groups = np.array([f"p{row // 2}" for row in range(n)])
    source = np.array(["site A", "site B"])[np.arange(n) % 2]
    found = {}
    for name in strategies:
        for seed in seeds:
            logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
            chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            found[name, seed] = chances.astype(np.float32)
            for split in ("development", "external"):
                path = files.path_of(workdir, name, seed, TASK, split)
                given = {"classes": CLASSES[:classes], "sources": source if sources else None}
                files.write(path, labels, groups, groups, {"linear": chances}, **given)
    return labels, source, found


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    workdir = report_example.write(
        tmp_path_factory.mktemp("study"), seeds=(0, 1), strategies=("none", "full")
    )
    return workdir, *keep(workdir)


scored = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=40).filter(
    lambda rows: 0 < sum(positive for positive, _ in rows) < len(rows)
)


@settings(max_examples=60, deadline=None)
@given(scored, st.integers(0, 2**31))
def test_curves_go_through_the_points_of_scikit_learn_with_ties_and_weights(rows, seed):
    positive, scores = np.array(rows)[:, 0].astype(bool), np.array(rows)[:, 1] / 6
    weights = np.random.default_rng(seed).integers(1, 4, size=len(rows))
    rates = statistics.FALSE_POSITIVE_RATES
    alarms, hits, _ = sk.roc_curve(positive, scores, sample_weight=weights, drop_intermediate=False)
    ours = statistics.roc_curves(positive, scores, weights[None])[0]
    assert ours == pytest.approx(np.interp(rates, alarms, hits), abs=1e-9)
    precision, recall, _ = sk.precision_recall_curve(positive, scores, sample_weight=weights)
    ours = statistics.precision_curves(positive, scores, weights[None])[0]
    for at, value in zip(statistics.RECALLS, ours, strict=True):
        reached = np.flatnonzero(recall[:-1] >= at - 1e-9)[-1]  # thresholds rise: the last is the highest
        assert value == pytest.approx(precision[reached])


def test_a_draw_without_positives_has_no_curve_and_patients_are_drawn_whole():
    positive, scores = np.array([True, False, False]), np.array([0.9, 0.2, 0.1])
    weights = np.array([[1, 1, 1], [0, 1, 2]])
    assert np.isnan(statistics.roc_curves(positive, scores, weights)).all(1).tolist() == [False, True]
    assert np.isnan(statistics.precision_curves(positive, scores, weights)).all(1).tolist() == [False, True]
    drawn = statistics.patient_weights(np.array(["a", "b", "a", "c"]), 20)
    assert (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn[:, [0, 1, 3]].sum(1) == 3).all()


def test_reliability_by_hand():
    # Four images in the bin of .7 (three right), one in the top bin (wrong).
    confident = np.array([[0.7, 0.3]] * 4 + [[1.0, 0.0]])
    bins = metrics.Reliability.of(np.array([0, 0, 0, 1, 1]), confident, 10)
    assert bins.size.tolist() == [0, 0, 0, 0, 0, 0, 0, 4, 0, 1]
    assert (bins.confidence[7], bins.accuracy[7]) == (pytest.approx(0.7), 0.75)
    assert bins.error == pytest.approx((4 * 0.05 + 1) / 5)


def test_best_runner_up_and_unadapted_arms_are_drawn(tmp_path):
    records = Records.read(report_example.write(tmp_path))
    assert arms_shown(records, TASK)[-1] == "none"
    assert set(arms_shown(records, TASK)) == {"simplified", "hybrid", "none"}


def test_figures_say_the_scores_of_scikit_learn(study):
    workdir, labels, _, found = study
    pictures = SplitPredictions.read(workdir, Records.read(workdir), TASK, "external").pictures()
    by_name = {each.name: each for each in pictures}
    assert list(by_name) == ["roc", "precision_recall", "reliability", "confusion_full", "confusion_none"]
    of_full = [found["full", seed] for seed in (0, 1)]
    area = np.mean([sk.roc_auc_score(labels, each, multi_class="ovr") for each in of_full])
    precision = np.mean([sk.average_precision_score(np.eye(3)[labels], each) for each in of_full])
    error = np.mean([metrics.calibration_error(labels, each) for each in of_full])
    assert f"full {area:.3f}" in by_name["roc"].alt
    assert f"full {precision:.3f}" in by_name["precision_recall"].alt
    assert "chance 0.333" in by_name["precision_recall"].alt
    assert f"full {error:.3f}" in by_name["reliability"].alt
    recalls = np.mean([sk.recall_score(labels, each.argmax(1), average=None) for each in of_full], 0)
    for name, recall in zip(CLASSES, recalls, strict=True):
        assert f"{name} {recall:.2f}" in by_name["confusion_full"].alt
    for each in pictures:
        each.figure.savefig(io.BytesIO())


def test_two_classes_have_the_curve_of_the_second_and_several_labels_no_confusion(tmp_path):
    workdir = report_example.write(tmp_path, seeds=(0,), strategies=("full",))
    keep(workdir, ("full",), (0,), classes=2)
    read = SplitPredictions.read(workdir, Records.read(workdir), TASK, "external")
    assert read.columns == [1]
    assert "Positive: meningioma." in read.pictures()[0].caption
    path = files.path_of(workdir, "full", 0, TASK, "external")
    targets = np.array([[1, 0, np.nan], [0, 1, 1], [1, 1, 0], [0, 0, 0]])
    chances = {"linear": np.random.default_rng(0).random((4, 3))}
    files.write(path, targets, np.arange(4), np.arange(4).astype(str), chances)
    read = SplitPredictions.read(workdir, Records.read(workdir), TASK, "external")
    assert [each.name for each in read.pictures()] == ["roc", "precision_recall"]


def test_scores_by_source(study):
    workdir, labels, source, found = study
    records = Records.read(workdir)
    splits = [SplitPredictions.read(workdir, records, TASK, split) for split in ("development", "external")]
    table = by_source.table(splits)
    rows = {(row[0].text, row[1].text): dict(zip(table.flat, row, strict=True)) for row in table.rows}
    here = source == "site B"
    area = np.mean(
        [sk.roc_auc_score(labels[here], found["full", s][here], multi_class="ovr") for s in (0, 1)]
    )
    right = np.mean([(found["full", s][here].argmax(1) == labels[here]).mean() for s in (0, 1)])
    row = rows["external", "site B"]
    assert (row["images"].text, row["patients"].text) == ("30", "30")
    assert (row["full AUC"].text, row["full accuracy"].text) == (f"{area:.3f}", f"{right:.3f}")


def test_the_page_shows_them_and_a_workdir_without_predictions_has_no_such_part(study, tmp_path):
    workdir = study[0]
    build(workdir)
    page, text = (workdir / "report.html").read_text(), (workdir / "report.md").read_text()
    for said in ("Predictions, external", "Scores by source", "Confusion matrix of full"):
        assert said in page
        assert said in text
    assert "differ from the table's means over folds" in text
    assert len(page) < 5_000_000
    bare = report_example.write(tmp_path, seeds=(0,), strategies=("full",))
    build(bare)
    assert "Predictions, external" not in (bare / "report.html").read_text()
