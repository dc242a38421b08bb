"""The scores without labels, and those of dense features, agree with formulas written out for single images."""

import colorsys
import dataclasses
import fractions
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from dapt_jax.errors import UserError
from dapt_jax.transferability.alignment import alignment
from dapt_jax.transferability.ccfv import ccfv
from dapt_jax.transferability.gbc import gbc
from dapt_jax.transferability.inputs import in_double, masks_at
from dapt_jax.transferability.pixel_gbc import pixel_gbc
from dapt_jax.transferability.registry import SCORES, Sample, evaluate
from dapt_jax.transferability.robustness import Jitter, _hinges, jitter, pool, robustness
from dapt_jax.transferability.uniformity import uniformity

RNG = np.random.default_rng(0)
MAPS = RNG.normal(size=(2, 7, 3, 3, 5)) + 0.5
DISTANCES = {
    "cosine": lambda a, b: 1 - a @ b / np.sqrt(a @ a * (b @ b)),
    "l2": lambda a, b: np.mean((a - b) ** 2),
    "inverse_pearson": lambda a, b: 1 - np.corrcoef(a, b)[0, 1],
}


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("name", DISTANCES)
def test_robustness_is_the_hinge_written_out(name, pooled):
    a, b = (view.mean((1, 2)) if pooled else view.reshape(7, -1) for view in MAPS)
    d = DISTANCES[name]
    for negatives, margin in [(1, 0.5), (3, 0.0), (0, 0.1)]:
        losses = [
            max(0, d(a[i], b[i]) - d(a[i], b[(i + shift) % 7]) + margin)
            for i in range(7)
            for shift in range(1, (negatives or 6) + 1)
        ]
        found = robustness(MAPS, distance=name, margin=margin, negatives=negatives, pooled=pooled)
        np.testing.assert_allclose(found, np.mean(losses), rtol=1e-12)


def test_more_views_are_compared_pair_by_pair():
    views = np.concatenate([MAPS, MAPS[::-1] + 0.1])
    pairs = [robustness(views[list(pair)]) for pair in itertools.combinations(range(4), 2)]
    np.testing.assert_allclose(robustness(views), np.mean(pairs), rtol=1e-12)


@pytest.mark.parametrize("images", [6, 7])
def test_the_references_negatives_are_reproduced_on_request_and_avoided_otherwise(images):
    """Reverse the second view and shift it by two: with 7 images, image 4 is its own negative."""
    a, b = MAPS[:, :images].mean((2, 3))
    shifted = np.roll(b[::-1], 2, axis=0)
    d = DISTANCES["cosine"]
    want = [max(0, d(a[i], b[i]) - d(a[i], shifted[i]) + 0.5) for i in range(images)]
    np.testing.assert_allclose(
        robustness(MAPS[:, :images], reference_compatible=True), np.mean(want), rtol=1e-12
    )
    own = sum(np.array_equal(b[i], shifted[i]) for i in range(images))
    assert own == images % 2
    # Identical views of images that are all apart: only a negative that is no negative leaves the margin
    # whole.
    same = np.stack([np.eye(images)] * 2)
    assert robustness(same, margin=1.0) == pytest.approx(0)
    assert robustness(same, margin=1.0, reference_compatible=True) == pytest.approx(own / images)


def test_tokens_are_pooled_over_space_and_over_channels_only_on_request():
    tokens = MAPS.reshape(2, 7, 9, 5)
    np.testing.assert_array_equal(pool(tokens[0]), MAPS[0].mean((1, 2)))
    np.testing.assert_array_equal(pool(tokens[0], reference_compatible=True), tokens[0].mean(2))
    np.testing.assert_allclose(robustness(tokens), robustness(MAPS), rtol=1e-12)


def test_with_the_papers_margin_the_score_is_a_difference_of_means():
    a, b = MAPS.mean((2, 3))
    d = DISTANCES["l2"]
    near, far = (np.mean([d(a[i], b[(i + shift) % 7]) for i in range(7)]) for shift in (0, 1))
    assert robustness(MAPS, distance="l2", margin=50.0) == pytest.approx(near - far + 50)


def test_memory_of_robustness_with_all_negatives_grows_with_the_images_not_with_their_pairs():
    n = 512
    views = np.random.default_rng(0).normal(size=(2, n, 4))
    lowered = in_double(_hinges.lower)(*views, np.arange(n), np.arange(1, n), np.array([0.5]), "cosine")
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 20 * views.nbytes  # pairs: 64 times


def test_robustness_keeps_its_invariances():
    rotation = np.linalg.qr(RNG.normal(size=(5, 5)))[0]
    pooled = MAPS.mean((2, 3))
    np.testing.assert_allclose(robustness(pooled @ rotation), robustness(pooled), rtol=1e-10)
    np.testing.assert_allclose(robustness(3 * pooled), robustness(pooled), rtol=1e-10)
    moved = robustness(pooled + 9.0, distance="inverse_pearson")
    np.testing.assert_allclose(moved, robustness(pooled, distance="inverse_pearson"), rtol=1e-6)


def images(n=3, size=8):
    return RNG.integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def test_views_depend_on_seed_view_and_row_alone_and_stay_within_range():
    pixels, rows = images(), np.arange(3)
    one = np.asarray(jitter(jnp.asarray(pixels), 0, 0, rows))
    assert one.min() >= 0
    assert one.max() <= 255
    again = np.asarray(jitter(jnp.asarray(pixels[::-1].copy()), 0, 0, rows[::-1].copy()))[::-1]
    np.testing.assert_allclose(one, again, atol=1e-3)
    assert np.abs(one - np.asarray(jitter(jnp.asarray(pixels), 0, 1, rows))).max() > 1
    assert np.abs(one - pixels).mean() < 40
    still = jitter(jnp.asarray(pixels), 0, 0, rows, limits=Jitter(0.0, 0.0, 0.0, 0.0))
    np.testing.assert_allclose(still, pixels, atol=1e-3)


def test_each_image_has_its_own_draw_but_not_in_the_references_way():
    same = jnp.asarray(np.repeat(images(1), 3, 0))
    own = np.asarray(jitter(same, 0, 0, np.arange(3)))
    assert np.abs(own[0] - own[1]).max() > 0.5
    shared = np.asarray(jitter(same / 255.0, 0, 0, np.arange(3), reference_compatible=True))
    np.testing.assert_array_equal(shared[0], shared[1])
    # What lies above 1 saturates there, as in the reference: unscaled images turn white.
    assert np.asarray(jitter(same + 2.0, 0, 0, np.arange(3), reference_compatible=True)).min() == 1


def test_the_hue_turns_as_in_the_standard_library():
    pixels = images(1, 4)
    found = (
        np.asarray(jitter(jnp.asarray(pixels), 3, 0, np.arange(1), limits=Jitter(0.0, 0.0, 0.0, 0.4)))[0]
        / 255
    )
    before = [colorsys.rgb_to_hsv(*pixel) for pixel in pixels[0].reshape(-1, 3) / 255]
    after = [colorsys.rgb_to_hsv(*pixel) for pixel in found.reshape(-1, 3).tolist()]
    turns = [(b[0] - a[0]) % 1 for a, b in zip(before, after, strict=True) if a[1] > 0.2]
    np.testing.assert_allclose(turns, turns[0], atol=1e-3)
    np.testing.assert_allclose(np.array(before)[:, 1:], np.array(after)[:, 1:], atol=1e-4)
    assert 0.01 < turns[0] < 0.99


def test_brightness_contrast_and_saturation_are_blends():
    pixels = images(1, 6) // 2 + 60  # far enough from the ends to clip nothing
    grey = pixels[0] @ np.array([0.299, 0.587, 0.114])
    for place, other in enumerate([0.0, grey.mean(), grey[..., None]]):
        limits = Jitter(*[0.1 if number == place else 0.0 for number in range(4)])
        found = np.asarray(jitter(jnp.asarray(pixels), 1, 0, np.arange(1), limits=limits))[0]
        factors = (found - other) / (pixels[0] - other + 1e-9)
        kept = np.abs(pixels[0] - other) > 5
        np.testing.assert_allclose(factors[kept], factors[kept][0], rtol=1e-3)
        assert 0 < abs(factors[kept][0] - 1) <= 0.1001


def test_alignment_and_uniformity_follow_their_sums():
    a, b = (view / np.linalg.norm(view, axis=1, keepdims=True) for view in MAPS.mean((2, 3)))
    np.testing.assert_allclose(alignment(MAPS.mean((2, 3))), np.mean(np.sum((a - b) ** 2, 1)), rtol=1e-12)
    pairs = [np.exp(-2 * np.sum((a[i] - a[j]) ** 2)) for i, j in itertools.combinations(range(7), 2)]
    np.testing.assert_allclose(uniformity(3 * a), np.log(np.mean(pairs)), rtol=1e-10)
    assert uniformity(np.ones((4, 2))) == pytest.approx(0, abs=1e-9)
    assert uniformity(np.array([[1.0, 0], [-1, 0]])) == pytest.approx(-8)


def masks(n=4, size=8):
    found = np.zeros((n, size, size), int)
    found[:, : size // 2, : size // 2], found[:, size // 2 :, size // 2 :] = 1, 2
    return found


@pytest.mark.parametrize(("size", "side"), [(8, 4), (9, 3), (300, 19), (100, 13), (7, 7), (30, 8), (5, 1)])
def test_every_place_of_a_map_has_the_class_of_the_pixel_at_its_centre(size, side):
    """Also where the side of the images is no multiple of that of the map: 300 pixels are 19 places of stride 16."""
    pixels = np.arange(size**2).reshape(1, size, size)
    found = masks_at(pixels, side)
    centres = [
        math.floor(fractions.Fraction(size, side) * (k + fractions.Fraction(1, 2))) for k in range(side)
    ]
    np.testing.assert_array_equal(found, pixels[np.ix_([0], centres, centres)])


def test_pixel_gbc_of_all_pixels_is_gbc_of_the_pixels():
    """Orthogonal whitening aside: with one component, a rotation cannot matter."""
    truth = masks()[:, :, :4] % 2
    maps = truth[..., None] + RNG.normal(size=(*truth.shape, 1))
    assert np.bincount(truth.ravel()).tolist() == [64, 64]
    np.testing.assert_allclose(
        pixel_gbc(maps, truth, pixels=64), gbc(maps.reshape(-1, 1), truth.ravel()), rtol=1e-9
    )
    apart = pixel_gbc(maps + 9 * truth[..., None], truth)
    assert pixel_gbc(maps, truth) < apart <= 0


def test_classes_have_equal_shares_of_the_pixels():
    """A class of few pixels counts as much as the background: its overlap does not change when background is added."""
    truth = np.zeros((3, 8, 8), int)
    truth[:, :2, :2] = 1
    maps = RNG.normal(size=(3, 8, 8, 2))
    assert -2 <= pixel_gbc(maps, truth, pixels=8) < 0


def test_ccfv_follows_the_formula_pair_by_pair():
    truth = masks()
    maps = RNG.normal(size=(4, 8, 8, 3)) + truth[..., None]
    levels, at = (maps[:, ::2, ::2], maps), (truth[:, ::2, ::2], truth)
    want = 0.0
    for features, names in zip(levels, at, strict=True):
        distances = []
        for label in (1, 2):
            found = []
            for i, j in itertools.combinations(range(4), 2):
                x, y = features[i][names[i] == label], features[j][names[j] == label]
                s, t = np.cov(x.T), np.cov(y.T)
                root = scipy.linalg.sqrtm(s @ t + 0j)
                squared = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s + t) - 2 * np.trace(root).real
                found.append(np.sqrt(max(squared, 0)))
            distances.append(np.mean(found))
        v = [np.mean(features[i].reshape(-1, 3), 0) for i in range(4)]
        energy = np.mean([1 / np.sqrt(np.sum((a - b) ** 2) + 1e-3) for a, b in itertools.combinations(v, 2)])
        want += np.log(energy / np.mean(distances))
    np.testing.assert_allclose(ccfv(levels, at, samples=(1000,)), want, rtol=1e-5)


def test_ccfv_of_known_gaussians_is_their_distance():
    """Two images, one class, means 3 apart and deviations 1 and 2: the distance is sqrt(9 + 1)."""
    x = RNG.normal(size=(1, 300, 300, 1))
    maps = np.concatenate([x, 3 + 2 * x])
    truth = np.ones(maps.shape[:3], int)
    energy = 1 / np.sqrt((maps[0].mean() - maps[1].mean()) ** 2 + 1e-3)
    assert ccfv((maps,), (truth,), samples=(90000,)) == pytest.approx(np.log(energy / np.sqrt(10)), abs=0.02)


def test_bad_input_is_one_line_or_a_reason():
    broken = MAPS.copy()
    broken[1, 4, 0, 0, 0] = np.inf
    lines = {
        "8 negatives asked of 7 images; expected 1 to 6, or 0 for all": lambda: robustness(MAPS, negatives=8),
        "unknown distance 'cosin'; did you mean 'cosine'": lambda: robustness(MAPS, distance="cosin"),
        "features of image 4 are not finite": lambda: robustness(broken),
        "expected two views or more": lambda: robustness(MAPS[:1]),
        r"masks have shape \(4, 5, 8\)": lambda: pixel_gbc(np.zeros((4, 8, 8, 2)), masks()[:, :5]),
        "no foreground class is in two images": lambda: ccfv((MAPS[0],), (np.zeros((7, 3, 3), int),)),
        "all 63 labels are one class": lambda: pixel_gbc(MAPS[0], np.zeros((7, 3, 3), int)),
        "features of image 0 have no direction": lambda: uniformity(np.zeros((3, 2))),
        r"features have shape \(6,\); expected 2 axes": lambda: uniformity(np.ones(6)),
        r"features have shape \(3,\); expected 2 axes": lambda: alignment(np.ones((2, 3))),
        r"features have shape \(0, 3\); expected 2 axes and one row": lambda: alignment(np.ones((2, 0, 3))),
    }
    for line, call in lines.items():
        with pytest.raises(UserError, match=line):
            call()
    empty = Sample(MAPS[0].mean((1, 2)), maps=(MAPS[0],), masks=(np.zeros((7, 3, 3), int),))
    found = evaluate(["pixel_gbc", "ccfv"], empty)
    assert all(np.isnan(outcome.value) and "expected" in outcome.reason for outcome in found.values())
    zero = evaluate(["robustness"], Sample(np.zeros((4, 2)), views=np.zeros((2, 4, 2))))["robustness"]
    assert np.isnan(zero.value)
    assert zero.reason == "undefined for these features"


def test_every_score_says_what_it_needs_and_is_computed_from_it():
    truth = np.broadcast_to(np.array([1, 1, 0])[:, None], (7, 3, 3))
    pooled = MAPS.mean((2, 3))
    y = np.arange(7) % 2
    full = Sample(pooled[0], y, MAPS, np.full((7, 4), 0.25), (MAPS[0],), (truth,))
    without = {"nothing": {}, "views": {"views": None}, "labels": {"labels": None}}
    found = evaluate(SCORES, full)
    assert {name for name, outcome in found.items() if outcome.reason} == {"nleep"}  # 10 components, 7 images
    for name, entry in SCORES.items():
        for need, change in without.items():
            reduced = evaluate([name], dataclasses.replace(full, **change))[name]
            if need == entry.needs and need != "nothing":
                assert reduced.reason.startswith("needs")
