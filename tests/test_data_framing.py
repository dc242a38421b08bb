"""Pictures of any shape as squares: the aspect is kept where asked, masks follow, and the way back is exact."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dapt_jax.data.decode import ImageStore, decode, decode_mask
from dapt_jax.data.framing import RESIZES, Framing
from dapt_jax.data.manifest import load_manifest
from dapt_jax.errors import UserError
from dapt_jax.study import segmentation
from dapt_jax.study.overlays import Overlays

SIDES = st.integers(12, 90)


def disc(height: int, width: int, radius: int) -> np.ndarray:
    """A mask of a disc in the middle, uint8 [height, width]."""
    down, across = np.ogrid[:height, :width]
    return (np.hypot(down - height / 2 + 0.5, across - width / 2 + 0.5) < radius).astype(np.uint8)


def sides(mask: np.ndarray) -> tuple[int, int]:
    """Rows and columns in which something is marked."""
    return int(mask.any(1).sum()), int(mask.any(0).sum())


@given(SIDES, SIDES, st.sampled_from(RESIZES), st.sampled_from([0, 20]), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_a_mask_mapped_back_is_framed_to_itself(height, width, resize, crop, seed):
    framing = Framing(12, crop, resize)
    top, left, bottom, right = framing.inside((height, width))
    square = np.zeros((12, 12), np.uint8)
    square[top:bottom, left:right] = np.random.default_rng(seed).integers(0, 5, (bottom - top, right - left))
    whole = framing.restored(square, (height, width))
    assert whole.shape == (height, width)
    np.testing.assert_array_equal(framing.mask(whole), square)
    shown = framing.box((height, width))
    outside = np.ones((height, width), bool)
    outside[shown[0] : shown[2], shown[1] : shown[3]] = False
    assert not whole[outside].any()


@pytest.mark.parametrize("resize", ["pad", "crop"])
@pytest.mark.parametrize("shape", [(64, 128), (128, 64)])
def test_a_mask_of_whole_blocks_comes_back_to_the_pixel(resize, shape):
    """Blocks as large as a pixel of the square lose nothing on the way there, so the way back is exact."""
    framing = Framing(32, None, resize)
    block = int(framing.scale(shape)[0])
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, (shape[0] // block, shape[1] // block)).astype(np.uint8)
    mask = mask.repeat(block, 0).repeat(block, 1)
    back = framing.restored(framing.mask(mask), shape)
    top, left, bottom, right = framing.box(shape)
    np.testing.assert_array_equal(back[top:bottom, left:right], mask[top:bottom, left:right])


@pytest.mark.parametrize(("resize", "expected"), [("squash", 0.5), ("pad", 1), ("crop", 1)])
def test_a_disc_stays_round_where_the_aspect_is_kept(resize, expected):
    high, wide = sides(Framing(48, None, resize).mask(disc(96, 192, 40)))
    assert wide / high == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("resize", RESIZES)
def test_an_image_lies_on_its_mask(tmp_path, resize):
    """Also a JPEG that is decoded at a fraction of its size, of which 8 divides no side."""
    drawn = disc(405, 811, 150)
    Image.fromarray(drawn * 255).convert("RGB").save(tmp_path / "i.jpg", quality=95)
    Image.fromarray(drawn).save(tmp_path / "m.png")
    image = decode(tmp_path / "i.jpg", 48, resize=resize)[..., 0]
    mask = decode_mask(tmp_path / "m.png", 48, resize=resize)
    assert ((image > 127) != mask).mean() < 0.01
    np.testing.assert_allclose(image.mean() / 255, mask.mean(), atol=0.01)


def test_padding_is_black_and_the_picture_is_its_own_resize():
    picture = np.random.default_rng(0).integers(1, 256, (20, 40, 3), np.uint8)
    store = ImageStore.from_arrays(picture[None], 20, resize="pad")
    assert store.inside(0) == (5, 0, 15, 20)
    expected = np.asarray(Image.fromarray(picture).resize((20, 10), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(store[0][5:15], expected)
    assert not store[0][:5].any()
    assert not store[0][15:].any()


def manifest(folder, shape=(40, 80)):
    """Two pictures with masks, and no labels."""
    for number in range(2):
        Image.fromarray(disc(*shape, 10) * 90).convert("RGB").save(folder / f"{number}.png")
        Image.fromarray(disc(*shape, 10)).save(folder / f"m{number}.png")
    (folder / "manifest.csv").write_text("image,mask,patient\n0.png,m0.png,a\n1.png,m1.png,b\n")
    return folder / "manifest.csv"


@pytest.mark.parametrize(("resize", "pixel"), [("squash", (2, 4)), ("pad", (4, 4)), ("crop", (2, 2))])
def test_distances_are_in_pixels_of_the_files_whatever_the_resize(tmp_path, resize, pixel):
    data = load_manifest(manifest(tmp_path), image_size=20, segments=("background", "disc"), resize=resize)
    np.testing.assert_allclose(data.pixel_sizes([0, 1]), [pixel, pixel])
    np.testing.assert_allclose(data.take([1]).pixel_sizes([0]), [pixel])
    high, wide = sides(data.targets[0])
    assert high * pixel[0] == pytest.approx(20, abs=4)
    assert wide * pixel[1] == pytest.approx(20, abs=4)


def test_nothing_is_predicted_in_padding(tmp_path):
    data = load_manifest(manifest(tmp_path), image_size=20, segments=("background", "disc"), resize="pad")
    said = data.without_padding(np.ones((2, 20, 20), np.uint8), [0, 1])
    assert said[:, 5:15].all()
    assert said.sum() == 2 * 10 * 20


def test_scores_of_all_pixels_are_of_those_of_the_pictures(tmp_path):
    """Half of each square is padding: a mask that covers the pictures has a specificity of 0, not of a half."""
    data = load_manifest(manifest(tmp_path), image_size=20, segments=("background", "disc"), resize="pad")

    def everywhere(images):
        return np.ones(images.shape[:3], np.uint8), np.full((*images.shape[:3], 1), 0.9, np.float32)

    names = ("specificity_pooled", "precision_pooled", "auc_pooled", "ap_pooled")
    scored = segmentation._scored(data, everywhere, 2, Overlays(data, 0), names)
    found = {score.metric: score.value for score in scored.scores()}
    share = data.targets[:, 5:15].mean()
    expected = [0, share, 0.5, share]
    np.testing.assert_allclose([found[name] for name in names], expected)


def test_fingerprints_know_the_framing(tmp_path):
    prints = {
        resize: load_manifest(manifest(tmp_path), image_size=20, label="", resize=resize).fingerprint()
        for resize in RESIZES
    }
    assert len(set(prints.values())) == 3


def test_an_unknown_resize_names_the_nearest():
    with pytest.raises(UserError, match="resize is 'pda'; did you mean 'pad'"):
        dataclasses.replace(Framing(8), resize="pda")
