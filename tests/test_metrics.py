"""Scores and losses against scikit-learn's and against the formula written out."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from dapt_jax import metrics
from dapt_jax.errors import UserError
from dapt_jax.losses.cross_entropy import BinaryCrossEntropy, CrossEntropy
from dapt_jax.metrics import lower_is_better
from dapt_jax.settings import default, resolve

NAMES = ("a", "b", "c")


def loss(objective, logits, labels):
    return np.asarray(objective(jnp.asarray(logits), jnp.asarray(labels)))


def chances(objective, logits):
    return np.asarray(objective.probabilities(jnp.asarray(logits)))


def scored(labels, probabilities, **more):
    return {score.metric: score for score in metrics.classification(labels, probabilities, NAMES, **more)}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_scores_equal_scikit_learn_s(seed):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(3), rng.integers(3, size=30)])
    probabilities = rng.dirichlet(np.ones(3), size=33)
    found = scored(labels, probabilities)
    auc = sk.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert found["auc"].value == pytest.approx(auc)
    precision = sk.average_precision_score(np.eye(3)[labels], probabilities, average="macro")
    assert found["ap"].value == pytest.approx(precision)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 2), min_size=1, max_size=8))
@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # scikit-learn's, of classes that are predicted but not there
def test_scores_of_decisions_equal_scikit_learn_s_whichever_classes_are_there(seed, labels):
    labels = np.array(labels)
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(3), size=len(labels))
    predicted = probabilities.argmax(1)
    found = scored(labels, probabilities, ordinal=True)
    assert found["balanced_accuracy"].value == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert found["accuracy"].value == pytest.approx(sk.accuracy_score(labels, predicted))
    assert found["f1"].value == pytest.approx(
        sk.f1_score(labels, predicted, average="macro", zero_division=np.nan)
    )
    assert found["mcc"].value == pytest.approx(sk.matthews_corrcoef(labels, predicted))
    present = np.union1d(labels, predicted)
    assert found["f1"].classes == tuple(NAMES[each] for each in present)
    for name, weights in (("kappa", None), ("kappa_quadratic", "quadratic")):
        if len(present) == 1:
            assert np.isnan(found[name].value)
        else:
            theirs = sk.cohen_kappa_score(labels, predicted, labels=[0, 1, 2], weights=weights)
            assert found[name].value == pytest.approx(theirs)


def test_quadratic_kappa_counts_the_distance_over_classes_that_nobody_has():
    # 1 - the mean squared distance over that of every label with every prediction (Cohen 1968).
    labels, predicted, names = np.array([0, 0, 1, 3]), np.array([0, 1, 3, 3]), ("a", "b", "c", "d")
    found = metrics.classification(labels, np.eye(4)[predicted], names, ordinal=True)
    (value,) = (score.value for score in found if score.metric == "kappa_quadratic")
    by_chance = ((labels[:, None] - predicted) ** 2).mean()
    assert value == pytest.approx(1 - ((labels - predicted) ** 2).mean() / by_chance)
    assert "kappa_quadratic" not in scored(labels[:3], np.eye(3)[predicted[:3] % 3])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000))
def test_multi_label_scores_equal_scikit_learn_s_over_what_is_known_and_name_what_is_not(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, np.nan], (6, 3), p=[0.4, 0.3, 0.3]).astype(np.float32)
    probabilities = rng.random((6, 3)).round(1)  # ties, and values at the threshold itself
    found = scored(labels, probabilities)
    expected = {"auc": {}, "ap": {}, "f1": {}, "accuracy": {}}
    for name, truth, chance in zip(NAMES, labels.T, probabilities.T, strict=True):
        truth, chance = truth[(known := ~np.isnan(truth))].astype(int), chance[known]
        if len(set(truth)) == 2:
            expected["auc"][name] = sk.roc_auc_score(truth, chance)
        if truth.any():
            expected["ap"][name] = sk.average_precision_score(truth, chance)
        if truth.any() or (chance > 0.5).any():
            expected["f1"][name] = sk.f1_score(truth, chance > 0.5)
        if len(truth):
            expected["accuracy"][name] = sk.accuracy_score(truth, chance > 0.5)
    for metric, of_class in expected.items():
        assert found[metric].classes == tuple(of_class)
        assert found[metric].value == pytest.approx(
            np.mean(list(of_class.values())) if of_class else np.nan, nan_ok=True
        )
        assert found[metric].n == (~np.isnan(labels)).any(1).sum()
    for name in NAMES:
        assert found[f"ap/{name}"].value == pytest.approx(expected["ap"].get(name, np.nan), nan_ok=True)


def test_the_names_of_scores_do_not_depend_on_the_data():
    # Folds are averaged name by name.
    rng = np.random.default_rng(0)
    of = lambda labels: list(scored(np.array(labels), rng.dirichlet(np.ones(3), len(labels)), ordinal=True))  # noqa: E731
    assert of([0, 1, 2, 2]) == of([1]) == of([0, 0])


def test_every_metric_can_be_the_report_s():
    labels, masks = np.array([0, 1, 2]), np.zeros((1, 2, 2), np.uint8)
    names = [*scored(labels, np.eye(3), ordinal=True)]
    names += [score.metric for score in metrics.segmentation(masks, masks, ("background", "a"))]
    config = default()
    for name in names:
        config.report.metric = name
        resolve(config)
    assert {name for name in names if lower_is_better(name)} == {"ece", "hd95", "hd95/a", "assd", "assd/a"}


def test_a_class_without_images_is_named_by_its_absence_and_not_counted():
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]])
    found = scored(labels, probabilities)
    assert found["auc"].value == 1.0
    assert found["auc"].classes == ("a", "b")
    assert np.isnan(found["auc/c"].value)
    assert found["balanced_accuracy"].classes == ("a", "b")


def test_missing_labels_are_left_out_class_by_class():
    labels = np.array([[1, 0, np.nan], [0, 1, 1], [1, np.nan, 0], [0, 0, 1]], np.float32)
    probabilities = np.random.default_rng(0).random((4, 3))
    found = scored(labels, probabilities)
    known = ~np.isnan(labels[:, 1])
    assert found["auc/b"].value == sk.roc_auc_score(labels[known, 1], probabilities[known, 1])
    assert found["auc/b"].n == 3


@pytest.mark.parametrize(
    ("labels", "probabilities", "line"),
    [
        ([0, 2, -1], np.eye(3), "a label is -1; expected class numbers from 0 to 2"),
        ([0, 2, 3], np.eye(3), "a label is 3; expected class numbers from 0 to 2"),
        ([[0, 1, -1.0]] * 3, np.eye(3), r"a label is -1\.0; expected 0, 1 or NaN for each class"),
        (
            [[0, 1]] * 3,
            np.eye(3),
            r"labels are \(3, 2\) and probabilities \(3, 3\) of 3 classes; expected one row",
        ),
        ([0, 2, 1], np.diag([1, np.nan, 1]), r"probabilities of row 1 are not finite \(1 of 3 rows\)"),
    ],
)
def test_labels_and_probabilities_that_do_not_fit_are_refused(labels, probabilities, line):
    with pytest.raises(UserError, match=line):
        scored(np.asarray(labels), probabilities)


def test_a_calibrated_predictor_has_no_calibration_error_and_an_overconfident_one_its_excess():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 200_000)
    labels = (rng.random(len(confidence)) > confidence).astype(int)
    assert metrics.calibration_error(labels, np.stack([confidence, 1 - confidence], 1)) < 0.01
    half = np.tile([0.9, 0.1], (1000, 1))
    assert metrics.calibration_error(np.arange(1000) % 2, half) == pytest.approx(0.4)


def test_losses_equal_scikit_learn_s_log_loss():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(50, 3)).astype(np.float32)
    labels = rng.integers(3, size=50).astype(np.int32)
    softmax = CrossEntropy(3)
    expected = sk.log_loss(labels, chances(softmax, logits), labels=[0, 1, 2])
    assert loss(softmax, logits, labels).mean() == pytest.approx(expected, rel=1e-5)
    one = BinaryCrossEntropy(1)
    binary = (labels > 0).astype(np.int32)
    expected = sk.log_loss(binary, chances(one, logits[:, :1])[:, 1])
    assert loss(one, logits[:, :1], binary).mean() == pytest.approx(expected, rel=1e-5)
    smooth = CrossEntropy(3, label_smoothing=0.3)
    by_hand = 0.7 * loss(softmax, logits, labels)
    by_hand += 0.1 * sum(loss(softmax, logits, np.full(50, k, np.int32)) for k in range(3))
    np.testing.assert_allclose(loss(smooth, logits, labels), by_hand, rtol=1e-5)


def test_missing_labels_take_no_part_in_the_loss():
    logits = np.array([[2.0, -1.0]], np.float32)
    both, first = np.array([[1, np.nan]], np.float32), np.array([[1]], np.float32)
    two, one = BinaryCrossEntropy(2, multi_label=True), BinaryCrossEntropy(1, multi_label=True)
    np.testing.assert_allclose(loss(two, logits, both), loss(one, logits[:, :1], first))
    assert np.isfinite(loss(two, logits, np.full((1, 2), np.nan, np.float32))).all()


def test_smoothing_out_of_range_is_refused():
    with pytest.raises(UserError, match="label_smoothing is 1"):
        CrossEntropy(3, label_smoothing=1.0)
