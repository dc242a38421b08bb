"""Random crops come from the file, whatever the stored size, and follow from (seed, view, row) alone."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dapt_jax.data import decode, file_crops
from dapt_jax.data.augment import Augment
from dapt_jax.data.concatenate import JoinedImages
from dapt_jax.data.decode import ImageStore
from dapt_jax.errors import UserError
from dapt_jax.training import image_batches
from dapt_jax.training.phases import Phase
from tests import tiny

CROP = Augment(crop=0.08, patch=12, crop_from=1000)
FULL = Phase("full", 2, ("*",), 1e-2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Twelve PNG files of noise, grey and colour in turn, from 60 x 80 pixels."""
    folder, rng = tmp_path_factory.mktemp("crops"), np.random.default_rng(0)
    paths = [folder / f"{number:02d}.png" for number in range(12)]
    for number, path in enumerate(paths):
        shape = (60 + number, 80) if number % 2 else (60 + number, 80, 3)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    return paths


def dataset(store):
    return dataclasses.replace(tiny.dataset(len(store), store.size), images=store)


def test_a_crop_is_the_one_that_pillow_cuts_from_the_file(files):
    stored = ImageStore.from_files(files, 16)
    cut = file_crops.batch(stored, CROP, range(12), 3, 5)
    assert cut.shape == (12, 12, 12, 3)
    for row, path in enumerate(files):
        whole = Image.open(path)
        rng = np.random.default_rng([3, 5, row, 49])
        top, left, bottom, right = file_crops.drawn_box((whole.height, whole.width), 0.08, rng)
        by_hand = whole.crop((left, top, right, bottom)).resize((12, 12), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(cut[row], np.asarray(by_hand.convert("RGB")))
    assert (cut != file_crops.batch(stored, CROP, range(12), 3, 6)).any((1, 2, 3)).all()
    assert (cut != file_crops.batch(stored, CROP, range(12), 4, 5)).any((1, 2, 3)).all()


def test_neither_the_memory_nor_the_other_rows_of_a_batch_change_a_crop(files):
    ample = ImageStore.from_files(files, 16)
    expected = file_crops.batch(ample, CROP, range(12), 0, 0)
    tight = ImageStore.from_files(files, 16, cache_bytes=20_000)
    for rows in (range(12), range(11, -1, -1), (7, 7)):
        np.testing.assert_array_equal(file_crops.batch(tight, CROP, rows, 0, 0), expected[list(rows)])
    kept = tight._pixels.for_crops
    assert 0 < len(kept) < 12  # 12 stored images take 9,216 bytes, and a picture 4,800 or more
    assert len(ample._pixels.for_crops) == 12
    assert decode.cached_bytes() >= sum(each.nbytes for each in ample._pixels.for_crops.values())
    assert file_crops.estimated_bytes(ample, 1000) == pytest.approx(12 * 2 * 80 * 65, rel=0.2)
    joined = JoinedImages([ample, tight], np.array([[1, 3], [0, 4]]), ("a", "b"))
    again = file_crops.batch(joined, CROP, (0, 1), 0, 0)
    assert (again[0] == again[0, ..., :1]).all()  # row 3 is grey
    assert not (again[1] == again[1, ..., :1]).all()


def test_the_short_side_of_a_picture_is_bounded_and_the_framing_is_kept(files):
    small = ImageStore.from_files(files, 16).for_crop(0, 30)
    by_hand = Image.open(files[0]).resize((40, 30), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(small, np.asarray(by_hand))
    middle = ImageStore.from_files(files, 16, crop=20, resize="crop").for_crop(0, 1000)
    np.testing.assert_array_equal(middle, np.asarray(Image.open(files[0]))[20:40, 30:50])


@settings(max_examples=50, deadline=None)
@given(st.tuples(st.integers(1, 300), st.integers(1, 300)), st.floats(0.01, 0.99), st.integers(0, 99))
def test_a_box_lies_inside_the_picture_and_has_an_allowed_area(extent, least, seed):
    top, left, bottom, right = file_crops.drawn_box(extent, least, np.random.default_rng(seed))
    assert 0 <= top < bottom <= extent[0]
    assert 0 <= left < right <= extent[1]
    if min(extent) > 50 and max(extent) <= 4 / 3 * min(extent):  # then a whole picture has an allowed ratio
        assert (bottom - top) * (right - left) >= 0.9 * least * extent[0] * extent[1]


def test_areas_and_places_are_uniform():
    rng = np.random.default_rng(0)
    boxes = np.array([file_crops.drawn_box((400, 400), 0.08, rng) for _ in range(2000)])
    sides = boxes[:, 2:] - boxes[:, :2]
    shares = np.sort(sides.prod(1) / 400**2)
    # Rectangles near the whole square fit for few ratios and are drawn again, so that their share is smaller.
    assert np.median(shares[shares < 0.5]) == pytest.approx(0.29, abs=0.02)
    ratios = np.log(sides[:, 1] / sides[:, 0])
    assert abs(ratios.mean()) < 0.02
    assert np.abs(ratios).max() < np.log(4 / 3) + 0.02
    room = 400 - sides
    assert (boxes[:, :2] / np.maximum(room, 1)).mean(0) == pytest.approx([0.5, 0.5], abs=0.03)


def test_training_reads_the_crops_of_its_epoch_and_the_device_does_not_crop_again(files):
    data = dataset(ImageStore.from_files(files, 16))
    augment = Augment(crop=0.08, crop_from=1000)
    run = tiny.make_run((FULL,), encoder=tiny.encoder(), data=data, batch_size=4, val=4, augment=augment)
    read = image_batches.reader(run, run.programs[0], None, None)
    rows = np.array([2, 5], np.int32)
    image = read(1, rows)["image"]
    np.testing.assert_array_equal(image, file_crops.batch(data.images, augment, rows, 0, 1))
    np.testing.assert_array_equal(np.asarray(augment(image, 0, 1, rows)), image)


def test_what_crops_of_files_cannot_serve_is_refused(files):
    augment = Augment(crop=0.08, crop_from=1000)
    make = lambda data: tiny.make_run((FULL,), encoder=tiny.encoder(), data=data, augment=augment)  # noqa: E731
    with pytest.raises(UserError, match="in one array; expected augment"):
        make(tiny.dataset())
    with pytest.raises(UserError, match=r"crop_from is 1000; expected crop above 0"):
        Augment(crop_from=1000)
    with pytest.raises(UserError, match="cuts images, not their masks"):
        file_crops.check(ImageStore.from_files(files, 16), True, "nuclei")


def test_a_phase_of_its_own_size_is_refused_where_crops_have_that_of_the_patch(files):
    phase = dataclasses.replace(FULL, image_size=14)
    make = functools.partial(
        tiny.make_run, (phase,), encoder=tiny.encoder(), data=dataset(ImageStore.from_files(files, 16)), val=4
    )
    line = r"image_size is 14: its random crops are cut from the files at augment\.patch=12 pixels"
    with pytest.raises(UserError, match=line):
        make(augment=CROP)
    read = image_batches.reader(
        run := make(augment=Augment(crop=0.08, crop_from=1000)), run.programs[0], None, None
    )
    assert read(1, np.array([2, 5], np.int32))["image"].shape == (2, 14, 14, 3)
