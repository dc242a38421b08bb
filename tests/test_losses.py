"""Losses of classes against closed formulas, and what holds of each whatever the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.errors import UserError
from dapt_jax.losses import LOSSES, SEGMENTATION_LOSSES, make, make_segmentation
from dapt_jax.losses.asymmetric import AsymmetricLoss
from dapt_jax.losses.cross_entropy import BinaryCrossEntropy, CrossEntropy
from dapt_jax.losses.focal import FocalLoss

ONE_OF = (CrossEntropy(4), FocalLoss(4), make("ordinal", classes=5))
SEVERAL = tuple(LOSSES[name](4, multi_label=True) for name in ("bce", "focal", "asymmetric"))


def draw(seed, *, several=False, shape=(6, 4)):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=shape, scale=3).astype(np.float32)
    labels = rng.integers(2, size=shape) if several else rng.integers(4, size=shape[0])
    return logits, labels.astype(np.float32 if several else np.int32)


def loss(objective, logits, labels):
    return objective(jnp.asarray(logits), jnp.asarray(labels))


def sigmoid(z):
    return 1 / (1 + np.exp(-np.asarray(z, float)))


@given(st.integers(0, 10_000), st.sampled_from([0.0, 1.0, 2.0, 3.5]), st.sampled_from([0.0, 0.25, 0.8]))
@settings(deadline=None, max_examples=25)
def test_focal_loss_by_its_formula(seed, gamma, alpha):
    logits, labels = draw(seed, several=True)
    p, t = sigmoid(logits), labels
    p_t, alpha_t = np.where(t == 1, p, 1 - p), np.where(t == 1, alpha, 1 - alpha) if alpha else 1.0
    found = loss(FocalLoss(4, multi_label=True, gamma=gamma, alpha=alpha), logits, labels)
    np.testing.assert_allclose(
        found, (-alpha_t * (1 - p_t) ** gamma * np.log(p_t)).mean(1), rtol=2e-4, atol=1e-6
    )
    logits, labels = draw(seed)
    p = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(1, keepdims=True)
    own = p[np.arange(6), labels]
    found = loss(FocalLoss(4, gamma=gamma), logits, labels)
    np.testing.assert_allclose(found, -((1 - own) ** gamma) * np.log(own), rtol=2e-4, atol=1e-5)


@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0.0, 4.0]),
    st.sampled_from([0.0, 0.05, 0.2]),
)
@settings(deadline=None, max_examples=25)
def test_asymmetric_loss_by_its_formula(seed, positive, negative, margin):
    logits, labels = draw(seed, several=True)
    p = sigmoid(logits)
    shifted = np.maximum(p - margin, 0)
    each = labels * (1 - p) ** positive * np.log(p) + (1 - labels) * shifted**negative * np.log(1 - shifted)
    chosen = AsymmetricLoss(4, True, gamma_positive=positive, gamma_negative=negative, margin=margin)
    np.testing.assert_allclose(loss(chosen, logits, labels), -each.mean(1), rtol=2e-4, atol=1e-6)


def test_without_their_powers_focal_and_asymmetric_loss_are_cross_entropy():
    logits, labels = draw(0)
    np.testing.assert_array_equal(
        loss(FocalLoss(4, gamma=0.0), logits, labels), loss(CrossEntropy(4), logits, labels)
    )
    logits, labels = draw(0, several=True)
    plain = loss(BinaryCrossEntropy(4, multi_label=True), logits, labels)
    flat = AsymmetricLoss(4, True, gamma_negative=0.0, margin=0.0)
    np.testing.assert_allclose(loss(flat, logits, labels), plain, rtol=1e-6)
    np.testing.assert_array_equal(loss(FocalLoss(4, True, gamma=0.0), logits, labels), plain)


@given(st.integers(0, 10_000), st.integers(2, 7))
@settings(deadline=None, max_examples=25)
def test_grades_by_their_thresholds(seed, classes):
    """The loss is the mean of K - 1 binary cross-entropies; probabilities are a distribution, whatever the logits."""
    rng = np.random.default_rng(seed)
    objective = make("ordinal", classes=classes)
    logits = rng.normal(size=(8, classes - 1), scale=4).astype(np.float32)
    labels = rng.integers(classes, size=8).astype(np.int32)
    above = labels[:, None] > np.arange(classes - 1)
    p = sigmoid(logits)
    expected = -np.where(above, np.log(p), np.log(1 - p)).mean(1)
    np.testing.assert_allclose(loss(objective, logits, labels), expected, rtol=1e-4, atol=1e-6)
    found = np.asarray(objective.probabilities(jnp.asarray(logits)))
    assert found.shape == (8, classes)
    assert found.min() >= 0
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    falling = -np.sort(-logits, axis=1)
    np.testing.assert_allclose(
        np.asarray(objective.probabilities(jnp.asarray(falling)))[:, ::-1].cumsum(1)[:, -2::-1],
        sigmoid(falling),
        atol=1e-5,
    )  # the probability of a grade above k is the k-th sigmoid


@pytest.mark.parametrize("objective", [*ONE_OF, *SEVERAL], ids=lambda each: f"{each.name}-{each.multi_label}")
def test_sure_answers_cost_little_and_no_gradient_is_lost_at_extremes(objective):
    several = objective.multi_label
    _, labels = draw(1, several=several)
    grades = labels[:, None] > np.arange(4) if objective.name == "ordinal" else None
    targets = labels if several else np.eye(4)[labels] if grades is None else grades
    for size in (10.0, 1e4):
        sure = jnp.asarray(np.where(targets, size, -size), jnp.float32)
        right, wrong = loss(objective, sure, labels), loss(objective, -sure, labels)
        assert float(right.max()) < 1e-3 < float(wrong.min())
        for logits in (sure, -sure, 0 * sure):
            assert np.isfinite(jax.grad(lambda z: loss(objective, z, labels).sum())(logits)).all()


@pytest.mark.parametrize("objective", SEVERAL, ids=lambda each: each.name)
def test_missing_and_uncertain_labels_take_no_part_in_any_loss(objective):
    logits, labels = draw(2, several=True)
    labels[0, 1], labels[0, 2] = np.nan, -1
    kept = loss(type(objective)(2, multi_label=True), logits[:, [0, 3]], labels[:, [0, 3]])
    np.testing.assert_allclose(loss(objective, logits, labels)[0], kept[0], rtol=1e-6)
    gradient = jax.grad(lambda z: loss(objective, z, labels).sum())(jnp.asarray(logits))
    np.testing.assert_array_equal(np.asarray(gradient)[0, 1:3], 0)


@pytest.mark.parametrize("objective", SEVERAL, ids=lambda each: each.name)
def test_losses_are_linear_in_the_target(objective):
    """So a target that is the mean of what would be drawn has the mean of the losses."""
    logits, labels = draw(3, several=True)
    low, high = (loss(objective, logits, np.full_like(labels, each)) for each in (0, 1))
    np.testing.assert_allclose(
        loss(objective, logits, np.full_like(labels, 0.7)), 0.3 * low + 0.7 * high, rtol=1e-4
    )


def test_targets_of_uncertain_labels_are_drawn_between_their_bounds():
    objective = BinaryCrossEntropy(3, multi_label=True, uncertain=(0.55, 0.85))
    labels = np.full((2000, 3), -1, np.float32)
    labels[:, 0], labels[5, 1] = 1, np.nan
    found = np.asarray(
        objective.sample_targets(jnp.asarray(labels), jax.random.split(jax.random.key(0), 2000))
    )
    np.testing.assert_array_equal(found[:, 0], 1)
    assert np.isnan(found[5, 1])
    drawn = found[:, 2]
    assert 0.55 <= drawn.min() < 0.56 < 0.84 < drawn.max() <= 0.85
    assert drawn.mean() == pytest.approx(0.7, abs=0.01)
    assert abs(np.corrcoef(np.delete(found[:, 1:], 5, 0).T)[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("classes", "settings", "message"),
    [
        (3, {"name": "hinge"}, "unknown loss 'hinge'"),
        (3, {"name": "focl"}, "did you mean 'focal'"),
        (3, {"name": "bce"}, "has one of 3 classes; expected 'ce' or 'focal'"),
        (3, {"name": "asymmetric"}, "has one of 3 classes"),
        (3, {"name": "ce", "multi_label": True}, "independent; expected 'asymmetric', 'bce' or 'focal'"),
        (3, {"name": "ordinal", "multi_label": True}, "several labels; expected 'bce'"),
        (3, {"name": "focal", "params": {"gamma": -1.0}}, "gamma is -1.0; expected 0 or more"),
        (
            3,
            {"name": "asymmetric", "params": {"margin": 1.0}, "multi_label": True},
            "margin is 1.0; expected 0 to",
        ),
        (
            3,
            {"name": "focal", "params": {"alpha": 0.25}},
            r"alpha is 0\.25; expected 0\.0, since an image has one",
        ),
        (3, {"smoothing": float("nan")}, "label_smoothing is nan"),
        (
            3,
            {"params": {"gamma": 3.0}},
            "gamma is 3.0; expected 2.0, since loss 'ce' has no gamma; 'focal' has",
        ),
        (3, {"params": {"gama": 3.0}}, "unknown parameter 'gama' of a loss; did you mean 'gamma'"),
    ],
)
def test_losses_that_do_not_go_with_the_labels_are_refused(classes, settings, message):
    with pytest.raises(UserError, match=message):
        make(classes=classes, **settings)


def test_how_many_outputs_a_loss_has():
    assert make(classes=2) == CrossEntropy(2)
    assert make(classes=2, single_logit=True) == BinaryCrossEntropy(1)
    assert make("bce", classes=2).outputs == make("asymmetric", classes=2).outputs == 1
    assert make("ordinal", classes=5).outputs == 4
    assert make(classes=2, multi_label=True, single_logit=True) == BinaryCrossEntropy(2, multi_label=True)


def test_a_parameter_that_a_loss_lacks_may_stay_at_its_default():
    assert make("ce", {"gamma": 2.0, "margin": 0.05, "label_smoothing": 0.1}, classes=3) == CrossEntropy(
        3, label_smoothing=0.1
    )
    assert make_segmentation("ce", {"smoothing_constant": 1.0}, classes=("no", "yes")).outputs == 1
    with pytest.raises(UserError, match=r"smoothing_constant is 0\.5; expected 1\.0, since loss 'ce' has no"):
        make_segmentation("ce", {"smoothing_constant": 0.5}, classes=("no", "yes"))
    with pytest.raises(UserError, match=r"smoothing_constant is 0\.0; expected more than 0"):
        make_segmentation("dice", {"smoothing_constant": 0.0}, classes=("no", "yes"))


def test_two_losses_of_one_name_are_refused():
    with pytest.raises(TypeError, match="two losses are called 'ce'"):
        type("Other", (CrossEntropy,), {}, name="ce")
    assert LOSSES["ce"] is CrossEntropy
    assert set(SEGMENTATION_LOSSES) == {"ce", "dice", "dice_ce", "dice_squared", "tversky"}
