"""Predictions of single images in a report: intervals over patients and DeLong's test, where they were kept."""

import numpy as np
import pytest
from sklearn import metrics as sk

from dapt_jax import formatting
from dapt_jax.errors import UserError
from dapt_jax.records import predictions as files
from dapt_jax.records.study_records import Records
from dapt_jax.report import build, predictions
from dapt_jax.statistics import delong
from tests import test_report_example as report_example

TASK = "tumour type"
ARMS = [("full", 0), ("full", 1), ("none", 0)]


def keep(workdir, images=60, patients=60, classes=2):
    """Leaves predictions of the external set for some arms of a study, and gives them back."""
    rng = np.random.default_rng(0)
    groups = np.array([f"p{k % patients:02}" for k in range(images)])
    labels = rng.permutation(np.arange(images) % classes)
    found = {}
    for name, seed in ARMS:
        logits = rng.normal(size=(images, classes)) + np.eye(classes)[labels] * (
            1.5 if name == "full" else 0.8
        )
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        found[name, seed] = chances
        folder = workdir / files.FOLDER / f"{name}-seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(
            folder / f"{TASK}-external.npz", label=labels, group=groups, **{"probability/linear": chances}
        )
    return labels, groups, found


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return report_example.write(tmp_path_factory.mktemp("study"), seeds=(0, 1), strategies=("none", "full"))


def rows_of(workdir):
    table = predictions.table(workdir, Records.read(workdir), TASK)
    return {
        (row[0].text, row[1].text): dict(zip(table.columns[5:], row[5:], strict=True)) for row in table.rows
    }


def test_no_predictions_no_table(study):
    assert predictions.table(study, Records.read(study), TASK) is None


def test_two_classes_and_one_image_per_patient(study):
    labels, _, chances = keep(study)
    rows = rows_of(study)
    assert list(rows) == [("none", "0"), ("full", "0"), ("full", "1")]
    area = {arm: sk.roc_auc_score(labels, values[:, 1]) for arm, values in chances.items()}
    for (name, seed), value in area.items():
        assert rows[name, str(seed)]["AUC"].text == f"{value:.3f}"
    none = rows["none", "0"]
    assert none["difference"].text == f"{area['none', 0] - area['full', 0]:+.3f}"
    both = delong(labels == 1, np.stack([chances["none", 0][:, 1], chances["full", 0][:, 1]]))
    assert none["p DeLong"].text == formatting.p_value(both.difference(0, 1).p)
    # The bootstrap's interval and DeLong's tell of the same spread.
    low, high = (float(part) for part in none["difference"].small.strip("[]").split(", "))
    theirs = both.difference(0, 1).difference
    assert low < area["none", 0] - area["full", 0] < high
    assert high - low == pytest.approx(theirs.high - theirs.low, rel=0.15)
    assert rows["full", "0"]["difference"].text == "reference"


def test_several_images_per_patient_widen_the_interval_and_have_no_delong_test(study):
    labels, _, chances = keep(study, images=120, patients=12)
    rows = rows_of(study)
    assert rows["none", "0"]["p DeLong"].text == formatting.NONE
    assert rows["none", "0"]["AUC"].text == f"{sk.roc_auc_score(labels, chances['none', 0][:, 1]):.3f}"


def test_several_classes_have_the_macro_auc(study):
    labels, _, chances = keep(study, classes=3)
    rows = rows_of(study)
    expected = sk.roc_auc_score(labels, chances["full", 1], multi_class="ovr")
    assert rows["full", "1"]["AUC"].text == f"{expected:.3f}"
    assert rows["none", "0"]["p DeLong"].text == formatting.NONE


def test_missing_labels_are_left_out_and_undefined_classes_too():
    targets = np.array([[1, 0, np.nan], [0, 0, 1], [1, 0, 0], [0, 0, np.nan], [np.nan, 0, 1]])
    chances = np.random.default_rng(0).random((5, 3))
    found = files.Predictions(targets, np.arange(5), chances)
    by_hand = []
    for column in (0, 2):
        known = ~np.isnan(targets[:, column])
        by_hand.append(sk.roc_auc_score(targets[known, column], chances[known, column]))
    assert found.auc(np.arange(5)) == pytest.approx(np.mean(by_hand))
    assert np.isnan(found.auc(np.array([3, 3])))
    assert found.positive is None


def test_predictions_of_other_images_are_not_compared(study):
    labels, groups, chances = keep(study)
    path = study / files.FOLDER / "none-seed0" / f"{TASK}-external.npz"
    np.savez(path, label=labels, group=groups[::-1], **{"probability/linear": chances["none", 0]})
    none = rows_of(study)["none", "0"]
    assert none["AUC"].text != formatting.NONE
    assert (none["difference"].text, none["p DeLong"].text) == (formatting.NONE, formatting.NONE)


def test_a_class_that_a_head_never_saw_is_named_below_the_table(study):
    labels, groups, chances = keep(study, classes=3)
    path = files.path_of(study, "full", 0, TASK, "external")
    seen = {"linear": np.tile([True, False, True], (len(labels), 1))}
    names = ("a", "blast", "c")
    files.write(path, labels, groups, groups, {"linear": chances["full", 0]}, seen, names)
    note = predictions.table(study, Records.read(study), TASK).note
    assert "On external, images whose head had seen no blast in training do not count for that class." in note
    expected = [sk.roc_auc_score(labels == column, chances["full", 0][:, column]) for column in (0, 2)]
    assert rows_of(study)["full", "0"]["AUC"].text == f"{np.mean(expected):.3f}"


def test_the_report_shows_them(study):
    keep(study)
    build(study)
    for name in ("report.html", "report.md"):
        text = (study / name).read_text()
        assert "AUC over the patients of each run, linear" in text
        assert "two-sided DeLong test" in text


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"label": [0]}, "no array 'group'"),
        ({"label": [0], "group": ["a"], "probability/linear": [0.5]}, "expected one row for each image"),
        (
            {"label": [2], "group": ["a"], "probability/linear": [[0.5, 0.5]]},
            "labels 2 to 2; expected classes from 0 to 1",
        ),
        (
            {"label": [0], "group": np.array(["a"], object), "probability/linear": [[0.5, 0.5]]},
            "not an .npz of arrays",
        ),
    ],
)
def test_a_file_that_is_not_so_is_named(tmp_path, arrays, said):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=said) as error:
        files.read(path, "linear")
    assert str(path) in str(error.value)


def test_a_file_of_another_protocol_or_torn_is_not_read(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, label=[0], group=["a"], **{"probability/linear": [[0.5, 0.5]]})
    assert files.read(path, "finetune") is None
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"not an \.npz of arrays"):
        files.read(path, "linear")
