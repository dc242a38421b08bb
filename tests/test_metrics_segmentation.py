"""Scores of masks against MONAI's (see fixtures/make_segmentation_scores.py) and against all pairs of pixels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial import distance
from sklearn import metrics as skm

from dapt_jax import metrics
from dapt_jax.errors import UserError
from dapt_jax.metrics import pixels
from dapt_jax.metrics.segmentation import surface_distances
from tests.fixtures import parity
from tests.fixtures.make_segmentation_scores import FILE, SPACINGS

NAMES = ("background", "x", "y", "z")
small = hnp.arrays(np.uint8, (2, 3, 7, 6), elements=st.integers(0, 3))


@pytest.fixture(scope="module")
def monai():
    return dict(np.load(FILE))


def by_name(scores):
    return {score.metric: score for score in scores}


@pytest.mark.parametrize("spacing", SPACINGS)
def test_scores_of_every_image_are_monai_s(monai, spacing):
    scored = metrics.Segmentation(NAMES)
    scored.add(monai["truth"], monai["predicted"], spacing)
    which = SPACINGS.index(spacing)
    for metric, values in scored.per_image().items():
        theirs = monai[metric] if metric in monai else monai[f"{metric}_{which}"]
        theirs = np.where(np.isfinite(theirs), theirs, np.nan)  # one side empty: inf, both: nan
        np.testing.assert_allclose(values, theirs, rtol=1e-6, atol=1e-5, err_msg=metric)
        assert metric in ("dice", "iou") or 20 < np.isnan(values).sum() < 30


def test_means_cover_the_images_that_have_a_value_and_say_how_many(monai):
    found = by_name(metrics.segmentation(monai["truth"], monai["predicted"], NAMES))
    for metric, theirs in (("dice", monai["dice"]), ("hd95", monai["hd95_0"]), ("assd", monai["assd_0"])):
        values = np.where(np.isfinite(theirs), theirs, np.nan)
        for column, name in enumerate(NAMES[1:]):
            assert found[f"{metric}/{name}"].value == pytest.approx(np.nanmean(values[:, column]), rel=1e-5)
            assert found[f"{metric}/{name}"].n == np.isfinite(values[:, column]).sum()
        assert found[metric].value == pytest.approx(np.nanmean(values, 0).mean(), rel=1e-5)
        assert found[metric].classes == NAMES[1:]
        assert found[metric].n == np.isfinite(values).any(1).sum()


POOLED = ("mcc", "balanced_accuracy", "sensitivity", "specificity", "precision")


def test_pooled_scores_are_scikit_learn_s():
    """Of the pixels of all images; both curves over classes of probabilities, to which scores are rounded."""
    rng = np.random.default_rng(0)
    truth = (rng.random((3, 9, 8)) < 0.2).astype(np.uint8)
    probabilities = rng.beta(0.3, 0.5, (3, 9, 8, 1)) * 0.6 + 0.4 * truth[..., None]
    predicted = (probabilities[..., 0] >= 0.5).astype(np.uint8)
    names = tuple(f"{name}_pooled" for name in (*POOLED, "auc", "ap"))
    scored = metrics.Segmentation(("background", "x"), names=names)
    for at in range(3):
        part = slice(at, at + 1)
        scored.add(truth[part], predicted[part], probabilities=probabilities[part])
    found = {name: score.value for name, score in by_name(scored.scores()).items()}
    assert set(found) == {*names, *(f"{name}/x" for name in names)}
    flat, said = truth.ravel(), predicted.ravel()
    expected = {
        "mcc": skm.matthews_corrcoef(flat, said),
        "balanced_accuracy": skm.balanced_accuracy_score(flat, said),
        "sensitivity": skm.recall_score(flat, said),
        "specificity": skm.recall_score(1 - flat, 1 - said),
        "precision": skm.precision_score(flat, said),
    }
    for name, value in expected.items():
        assert found[f"{name}_pooled"] == pytest.approx(value, rel=1e-9), name
    rounded, exact = pixels.bins(probabilities).ravel(), probabilities.ravel()
    assert (np.diff(rounded[np.argsort(exact)]) >= 0).all()
    assert found["auc_pooled"] == pytest.approx(skm.roc_auc_score(flat, rounded), rel=1e-9)
    assert found["ap_pooled"] == pytest.approx(skm.average_precision_score(flat, rounded), rel=1e-9)
    assert found["auc_pooled"] == pytest.approx(skm.roc_auc_score(flat, exact), abs=1e-3)


def test_padding_counts_in_no_score():
    """Pictures within padding have the scores of the pictures alone, whatever masks and probabilities say around."""
    rng, pictures = np.random.default_rng(1), ((0, 2, 6, 7), (1, 0, 5, 9))
    truth, predicted = rng.integers(3, size=(2, 2, 6, 9), dtype=np.uint8)
    probabilities = rng.random((2, 6, 9, 2))
    every = tuple(name for name, each in metrics.METRICS.items() if each.of_masks)
    padded, alone = (metrics.Segmentation(("background", "x", "y"), names=every) for _ in range(2))
    padded.add(truth, predicted, probabilities=probabilities, inside=np.array(pictures))
    for image, (top, left, bottom, right) in enumerate(pictures):
        part = slice(image, image + 1), slice(top, bottom), slice(left, right)
        alone.add(truth[part], predicted[part], probabilities=probabilities[part])
    found = by_name(padded.scores())
    assert set(every) <= set(found)
    assert found == by_name(alone.scores())
    volumes = (each.of_units(np.array(["v", "v"])) for each in (padded, alone))
    assert len({str(each.scores()) for each in volumes}) == 1


def test_pooled_scores_without_what_they_need_are_undefined():
    names = ("precision_pooled", "sensitivity_pooled", "specificity_pooled", "mcc_pooled", "ap_pooled")
    scored = metrics.Segmentation(("background", "x"), names=names)
    scored.add(*np.zeros((2, 1, 4, 4), np.uint8), probabilities=np.zeros((1, 4, 4, 1)))
    found = {name: score.value for name, score in by_name(scored.scores()).items()}
    assert found["specificity_pooled"] == 1.0
    assert all(np.isnan(found[name]) for name in names if not name.startswith("spec"))


def test_the_joint_distance_is_the_modified_one_of_arxiv_2410_18677():
    stored = np.load(parity.FOLDER / "hidy2024_numbers.npz")
    found = [surface_distances(truth, predicted, np.ones(2))[2] for predicted, truth in stored["regions"]]
    np.testing.assert_allclose(found, stored["distances"], rtol=1e-6)


def surface(mask):
    padded = np.pad(mask, 1)
    inside = padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return np.argwhere(mask & ~inside)


@settings(max_examples=60, deadline=None)
@given(small, st.tuples(st.floats(0.2, 3), st.floats(0.2, 3)))
def test_distances_are_those_of_all_pairs_of_surface_pixels(pair, spacing):
    scored = metrics.Segmentation(NAMES)
    scored.add(*pair, spacing)
    found = scored.per_image()
    for image in range(3):
        for segment in range(3):
            first, second = (surface(masks[image] == segment + 1) * spacing for masks in pair)
            hd95, assd = found["hd95"][image, segment], found["assd"][image, segment]
            if not len(first) or not len(second):
                assert np.isnan([hd95, assd]).all()
                continue
            between = distance.cdist(first, second)
            there, back = between.min(1), between.min(0)
            assert hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
            assert assd == pytest.approx((there.sum() + back.sum()) / (len(there) + len(back)))


@settings(max_examples=60, deadline=None)
@given(small, st.integers(0, 3))
def test_batches_bit_fields_and_exchanged_sides_change_no_score(pair, cut):
    truth, predicted = pair
    whole = metrics.segmentation(truth, predicted, NAMES)
    batched = metrics.Segmentation(NAMES)
    batched.add(truth[:cut], predicted[:cut])
    batched.add(truth[cut:], predicted[cut:])
    bits = np.array([0, 1, 2, 4], np.uint8)
    others = {
        "batches": batched.scores(),
        "bit fields": metrics.segmentation(bits[truth], bits[predicted], NAMES, overlapping=True),
        "sides": metrics.segmentation(predicted, truth, NAMES),
        "turned": metrics.segmentation(np.rot90(truth, axes=(1, 2)), np.rot90(predicted, axes=(1, 2)), NAMES),
    }
    for what, scores in others.items():
        assert [(s.metric, s.n, s.classes) for s in scores] == [(s.metric, s.n, s.classes) for s in whole], (
            what
        )
        np.testing.assert_allclose([s.value for s in scores], [s.value for s in whole], err_msg=what)


@settings(max_examples=60, deadline=None)
@given(small)
def test_pooled_overlap_is_that_of_one_image_that_holds_all_pixels(pair):
    truth, predicted = pair
    pooled = by_name(metrics.segmentation(truth, predicted, NAMES))
    one = by_name(metrics.segmentation(truth.reshape(1, -1, 6), predicted.reshape(1, -1, 6), NAMES))
    for name in ("", "/x", "/y", "/z"):
        for metric in ("dice", "iou"):
            assert pooled[f"{metric}_pooled{name}"].value == pytest.approx(one[f"{metric}{name}"].value)
    for name in NAMES[1:]:
        dice, iou = (pooled[f"{metric}_pooled/{name}"].value for metric in ("dice", "iou"))
        assert dice == pytest.approx(2 * iou / (1 + iou))


def test_segments_that_overlap_are_scored_each_on_its_own():
    truth = np.array([[[0b11, 0b01, 0b00, 0b10]]], np.uint8)
    predicted = np.array([[[0b11, 0b10, 0b00, 0b10]]], np.uint8)
    found = by_name(
        metrics.segmentation(truth, predicted, ("background", "nucleus", "cell"), overlapping=True)
    )
    assert found["iou/nucleus"].value == pytest.approx(1 / 2)
    assert found["iou/cell"].value == pytest.approx(2 / 3)


def test_nothing_in_either_mask_is_agreement_but_has_no_distance():
    empty = np.zeros((2, 4, 4), np.uint8)
    found = by_name(metrics.segmentation(empty, empty, ("background", "x")))
    assert [found[name].value for name in ("dice", "iou", "dice_pooled", "iou_pooled")] == [1.0] * 4
    assert np.isnan(found["hd95"].value)
    assert (found["hd95"].n, found["hd95"].classes) == (0, ())
    nothing = metrics.Segmentation(("background", "x")).scores()
    assert all(np.isnan(score.value) and score.n == 0 for score in nothing)
    without = metrics.Segmentation(("background", "x"), surfaces=False)
    without.add(empty, empty)
    assert {score.metric.partition("/")[0] for score in without.scores()} == {
        "dice",
        "iou",
        "dice_pooled",
        "iou_pooled",
    }


def test_masks_that_cannot_be_compared_are_refused():
    truth = np.zeros((2, 4, 4), np.uint8)
    with pytest.raises(
        UserError, match=r"predicted masks are \(2, 4, 5\); expected the shape of the true ones"
    ):
        metrics.segmentation(truth, np.zeros((2, 4, 5), np.uint8), NAMES)
    with pytest.raises(UserError, match="a predicted mask holds the value 4; expected 0 to 3"):
        metrics.segmentation(truth, truth + 4, NAMES)
    with pytest.raises(UserError, match="a true mask holds the value 8; expected 0 to 7"):
        metrics.segmentation(truth + 8, truth, NAMES, overlapping=True)
    ranked = metrics.Segmentation(NAMES, names=("auc_pooled",))
    with pytest.raises(
        UserError, match=r"probabilities are \(2, 4, 4, 4\); expected \(2, 4, 4, 3\), one for each"
    ):
        ranked.add(truth, truth, probabilities=np.full((2, 4, 4, 4), 0.25))
    with pytest.raises(UserError, match="are not finite; expected numbers from 0 to 1"):
        ranked.add(truth, truth, probabilities=np.full((2, 4, 4, 3), np.nan))
