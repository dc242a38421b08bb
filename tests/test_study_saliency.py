"""Occlusion saliency: where a prediction depends on an image, and how a page shows it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapt_jax.report import thumbnails
from dapt_jax.study import saliency


@given(st.integers(0, 6), st.integers(0, 6), st.integers(14, 40))
def test_saliency_of_a_linear_model_of_one_patch_is_in_that_patch_only(row, column, side):
    edges = np.linspace(0, side, saliency.GRID + 1).round().astype(int)
    weights = np.zeros((side, side))
    weights[edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = 1e-4
    image = np.full((side, side, 3), 10, np.uint8)
    image[weights > 0] = 250

    found = saliency.drops(lambda images: (images.mean(3) * weights).sum((1, 2)), image)
    expected = np.zeros((saliency.GRID, saliency.GRID))
    expected[row, column] = (250.0 - np.round(image.mean())) * weights.sum()
    assert found == pytest.approx(expected, abs=1e-6)


def test_every_pixel_is_hidden_once():
    image = np.random.default_rng(0).integers(0, 100, (17, 23, 3), np.uint8)
    image[0, 0] = 255
    hidden = (saliency.occluded(image, 5)[1:] != image).any(3)
    is_mean = (image == image.mean((0, 1)).round()).all(2)
    assert (hidden.sum(0) == np.where(is_mean, 0, 1)).all()


def test_colours_are_red_where_the_probability_falls_and_blue_where_it_rises():
    image = np.full((8, 8, 3), 100, np.uint8)
    drops = np.array([[0.4, 0.0], [0.0, -0.2]])
    drawn = thumbnails.heat(image, drops).astype(int)
    assert (drawn[:4, :4, 0] > drawn[:4, :4, 2]).all()
    assert (drawn[4:, 4:, 2] > drawn[4:, 4:, 0]).all()
    assert (drawn[:4, 4:] == 100).all()
    assert (drawn[4:, :4] == 100).all()
    assert (thumbnails.heat(image, np.zeros((2, 2))) == 100).all()
