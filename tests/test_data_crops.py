"""Crops at test time: which pixels they are, and that training on patches is scored on patches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.data import crops
from dapt_jax.data.augment import Augment
from dapt_jax.runtime import sharding
from dapt_jax.study import classification
from dapt_jax.training import steps
from dapt_jax.training.phases import Phase
from tests import tiny


@given(st.integers(1, 20), st.integers(0, 7), st.integers(0, 7))
@settings(deadline=None, max_examples=25)
def test_ten_crops_are_the_corners_and_the_middle_and_the_same_mirrored(side, more_down, more_across):
    height, width = side + more_down, side + more_across
    images = np.arange(2 * height * width * 3).reshape(2, height, width, 3)
    found = list(crops.ten(images, side))
    corners = [
        (0, 0),
        (0, more_across),
        (more_down, 0),
        (more_down, more_across),
        (more_down // 2, more_across // 2),
    ]
    assert [tuple(crop[0, 0, 0] // 3) for crop in found[:5]] == [
        (down * width + across,) * 3 for down, across in corners
    ]
    assert {crop.shape for crop in found} == {(2, side, side, 3)}
    mirrored = [crop[:, :, ::-1] for crop in found[5:]]
    # A corner of the mirrored image is the other corner of the image; the middle may be half a pixel off.
    for one, other in zip((1, 0, 3, 2), mirrored, strict=False):
        np.testing.assert_array_equal(found[one], other)


def test_the_patch_in_the_middle_is_what_a_phase_without_augmentation_sees():
    images = np.random.default_rng(0).integers(0, 256, (3, 21, 21, 3)).astype(np.uint8)
    rows = np.arange(3, dtype=np.int32)
    for side in (10, 11, 21):
        middle = Augment(patch=side, centre=True)
        assert middle.is_fixed
        np.testing.assert_array_equal(middle(images, 5, 7, rows), crops.centre(images, side))
    run = tiny.make_run(
        [tiny.HEAD, tiny.FULL], encoder=tiny.encoder(), data=tiny.dataset(size=24), augment=Augment("dihedral", patch=16),
        cache="auto",
    )  # fmt: skip
    assert [program.augment.size(24) for program in run.programs] == [16, 16]
    assert run.programs[0].augment == steps.eval_transform(run.programs[0].model, run.programs[1].augment)
    assert run.cache_decision(run.programs[0]).views == 1


def test_a_random_crop_is_resized_to_the_patch():
    """A crop of nearly everything, at the patch's size, is the image made smaller: no part of it is cut away."""
    ramp = np.broadcast_to(np.linspace(0, 240, 24)[:, None, None], (4, 24, 24, 3)).astype(np.float32)
    rows = np.arange(4, dtype=np.int32)
    found = np.asarray(Augment(crop=0.999, patch=16)(ramp, 0, 0, rows))
    assert found.shape == (4, 16, 16, 3)
    # Areas from 0.999 to 1, but sides of 3:4 to 4:3 that are cut to the whole: a side is 0.86 of the image at
    # least.
    spans = found[:, -1, 0, 0] - found[:, 0, 0, 0]
    assert spans.min() > 0.8 * 240 * 23 / 24
    cut = np.asarray(Augment(patch=16)(ramp, 0, 0, rows))
    assert (cut[:, -1, 0, 0] - cut[:, 0, 0, 0]).max() < 0.7 * 240


@pytest.mark.parametrize("number", [1, 10])
def test_predictions_are_of_patches_and_means_over_their_crops(number):
    data = tiny.dataset(n=11, size=20)
    run = tiny.make_run(
        [Phase("full", 1, ("*",), 1e-2)], encoder=tiny.encoder(), data=data, augment=Augment(patch=16), val=3
    )
    model, objective = run.programs[0].model, run.programs[0].objective
    params, stats = model.init(0)
    found = classification.probabilities(run, params, stats, number, sharding.make_mesh(), data)
    images = data.images.batch(np.arange(11))
    squares = list(crops.ten(images, 16)) if number == 10 else [images[:, 2:18, 2:18]]
    forward = classification.forward_fn(model, None)
    expected = np.mean(
        [np.asarray(objective.probabilities(forward(params, stats, each))) for each in squares], 0
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
