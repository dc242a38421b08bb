"""Image and mask go the same way, every draw depends on (seed, view, row), and each change is what it says."""

import colorsys
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.data import colour, warp
from dapt_jax.data.augment import Augment
from dapt_jax.errors import UserError

SIDE = 24
ROWS = np.arange(6, dtype=np.int32)
EVERYTHING = Augment(
    "dihedral", 0.2, rotate=40.0, scale=0.3, crop=0.3, elastic=0.05, grid=0.3, patch=16
)  # fmt: skip
MOVES = {
    "flip": Augment("dihedral"),
    "shift": Augment(shift=0.3),
    "rotate": Augment(rotate=90.0),
    "scale": Augment(scale=0.5),
    "crop": Augment(crop=0.2),
    "elastic": Augment(elastic=0.05),
    "grid": Augment(grid=0.5),
    "patch": Augment(patch=10),
    "all": EVERYTHING,
}


def blocks() -> np.ndarray:
    """Masks of a few large regions, uint8 [6, 24, 24], all different."""
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 4, (6, 4, 4)), np.ones((6, 6))).astype(np.uint8)


@pytest.mark.parametrize("augment", MOVES.values(), ids=MOVES)
def test_a_mask_goes_the_way_of_its_image(augment: Augment) -> None:
    masks = blocks()
    images = np.repeat(60.0 * masks[..., None], 3, -1).astype(np.float32)
    moved = np.asarray(augment(images, 3, 1, ROWS))[..., 0] / 60
    classes = np.asarray(augment.masks(masks, 3, 1, ROWS))
    assert classes.dtype == np.uint8
    assert moved.shape == classes.shape == (6, augment.size(SIDE), augment.size(SIDE))
    # Bilinear values are between classes along edges alone; elsewhere they are the class itself.
    inside = np.abs(moved - np.rint(moved)) < 1e-3
    assert inside.mean() > 0.5
    # Half way between classes 0 and 2 a value may be 1 by chance.
    assert (np.rint(moved)[inside] == classes[inside]).mean() > 0.998
    assert (classes[:, : SIDE // 2] != masks[:, : classes.shape[1], : classes.shape[2]][:, : SIDE // 2]).any()


def test_what_does_not_move_pixels_leaves_masks_alone_and_every_move_differs_by_view() -> None:
    masks = blocks()
    still = Augment(brightness=0.3, contrast=0.3, gamma=0.5, saturation=0.5, hue=0.2, erase=0.9)
    np.testing.assert_array_equal(still.masks(masks, 0, 0, ROWS), masks)
    for augment in MOVES.values():
        first, second = (np.asarray(augment.masks(masks, 0, view, ROWS)) for view in (0, 1))
        assert (first != second).any()
        np.testing.assert_array_equal(first[::-1], augment.masks(masks[::-1], 0, 0, ROWS[::-1]))


def test_settings_that_are_off_do_not_change_what_others_draw() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE, 3)).astype(np.uint8)
    old = Augment("dihedral", 0.2)
    for name, value in {"gamma": 1e-9, "hue": 1e-12}.items():
        with_more = dataclasses.replace(old, **{name: value})
        np.testing.assert_allclose(with_more(images, 0, 0, ROWS), old(images, 0, 0, ROWS), atol=2e-2)


def test_how_an_operation_is_done_makes_no_difference_where_it_is_not() -> None:
    how = {"magnitude": 15.0, "border": "zero", "erase_with": "zero"}
    nothing, images = Augment(**how), np.zeros((6, SIDE, SIDE, 3), np.uint8)
    assert nothing.is_identity
    assert nothing(images, 0, 0, ROWS).dtype == np.uint8
    assert Augment(patch=16, centre=True, **how).is_fixed
    for name, value in vars(
        Augment("dihedral", *[0.1] * 3, 10.0, *[0.1] * 4, 16, *[0.1] * 4, randaugment=1)
    ).items():
        if value != getattr(Augment(), name):
            does = Augment(**{**how, name: value})
            assert not does.is_fixed, name


@given(st.floats(0, 180), st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_rotation_keeps_distances_to_the_centre(degrees: float, seed: int) -> None:
    at = np.asarray(warp.identity(9, 9))
    moved = np.asarray(warp.turned(jnp.asarray(at), jax.random.key(seed), degrees, 0.0))
    np.testing.assert_allclose(np.linalg.norm(moved - 4, axis=0), np.linalg.norm(at - 4, axis=0), atol=1e-4)
    cosine = np.sum((moved - 4) * (at - 4), 0)[0, 0] / 32  # between where a corner was and is
    assert np.degrees(np.arccos(np.clip(cosine, -1, 1))) <= degrees + 0.1


@pytest.mark.parametrize("least", [0.1, 0.5, 0.9])
def test_a_resized_crop_is_a_rectangle_of_the_area_it_may_have(least: float) -> None:
    at = warp.identity(64, 64)
    for seed in range(30):
        rows, columns = np.asarray(warp.resized_crop(at, jax.random.key(seed), least))
        height, width = 64 * (rows[1, 0] - rows[0, 0]), 64 * (columns[0, 1] - columns[0, 0])
        assert least * 64**2 * 0.74 <= height * width <= 64**2 * 1.001  # a side is cut off at the image's
        assert 3 / 4 - 1e-3 <= width / height <= 4 / 3 + 1e-3
        assert -0.5 <= rows.min() <= rows.max() <= 63.5
        assert -0.5 <= columns.min() <= columns.max() <= 63.5


def test_a_grid_distortion_is_monotonic_and_keeps_the_corners() -> None:
    rows, columns = np.asarray(warp.grid_distortion(warp.identity(21, 31), jax.random.key(0), 0.9))
    assert (np.diff(rows, axis=0) > 0).all()
    assert (np.diff(columns, axis=1) > 0).all()
    np.testing.assert_allclose(
        [rows[0, 0], rows[-1, 0], columns[0, 0], columns[0, -1]], [0, 20, 0, 30], atol=1e-4
    )


def test_colours_are_those_of_hsv() -> None:
    pixels = np.random.default_rng(0).random((4, 5, 3)).astype(np.float32)
    turned = np.asarray(colour.turn_hue(jnp.asarray(pixels), 0.2))
    for before, after in zip(pixels.reshape(-1, 3), turned.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before.tolist())
        np.testing.assert_allclose(after, colorsys.hsv_to_rgb((hue + 0.2) % 1, saturation, value), atol=1e-5)
    grey = np.asarray(colour.saturate(jnp.asarray(pixels), 0.0))
    np.testing.assert_allclose(grey, np.repeat(grey[..., :1], 3, -1), atol=1e-6)


def test_erasing_takes_a_rectangle_with_its_probability() -> None:
    images = np.full((400, SIDE, SIDE, 3), 100, np.uint8)
    rows = np.arange(400, dtype=np.int32)
    changed = (np.asarray(Augment(erase=0.25)(images, 0, 0, rows)) != 100).any(-1)
    share = changed.any((1, 2)).mean()
    assert 0.18 < share < 0.32
    for mask in changed[changed.any((1, 2))]:
        across, down = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        assert mask.sum() >= 0.97 * (np.ptp(across) + 1) * (np.ptp(down) + 1)
        assert 0.005 < mask.mean() < 0.45


def test_a_patch_larger_than_the_image_is_refused() -> None:
    with pytest.raises(UserError, match=r"augment\.patch is 32; expected at most the side of the images, 24"):
        Augment(patch=32).size(24)
    with pytest.raises(UserError, match=r"rotate is 270\.0; expected 0"):
        Augment(rotate=270.0)


def test_patches_that_reach_beyond_the_image_show_its_edges_about_as_often_as_its_middle() -> None:
    columns = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, None, :, None], (400, 32, 32, 3))
    seen = {}
    for overhang in (0, 8):
        augment = Augment(patch=16, overhang=overhang)
        patches = np.asarray(augment(columns, 0, 0, np.arange(400)))
        np.testing.assert_array_equal(augment.masks(columns[..., 0], 0, 0, np.arange(400)), patches[..., 0])
        seen[overhang] = np.bincount(patches[:, 0, :, 0].astype(int).ravel(), minlength=32)
        steps = np.diff(patches[:, 0, :, 0])
        assert (np.abs(steps) == 1).all()  # mirrored about the first and last column
        assert (steps > 0).all() == (not overhang)
    edges = {overhang: counts[[0, -1]].max() / counts.max() for overhang, counts in seen.items()}
    assert edges[0] < 0.15
    assert seen[8][[0, -1]].min() > 0.35 * seen[8].max()
