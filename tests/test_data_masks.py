"""Masks of several files, of run lengths, of volumes; and how they must fit their images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dapt_jax.data import masks, pixels
from dapt_jax.data.decode import decode_mask
from dapt_jax.data.manifest import load_manifest
from dapt_jax.data.masks import Parts, Rle
from dapt_jax.data.plane import Plane
from dapt_jax.errors import UserError
from tests import medical_files as write

RNG = np.random.default_rng(0)
SHAPE = (7, 5)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return write.image(tmp_path_factory.mktemp("rle") / "a.png", np.zeros(SHAPE, np.uint8))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), share=st.floats(0, 1))
def test_run_lengths_give_back_the_mask_that_they_were_made_of(picture, seed, share):
    mask = np.random.default_rng(seed).random(SHAPE) < share
    np.testing.assert_array_equal(masks.read(Rle((write.run_lengths(mask),), picture, "row 2")), mask)
    split = [np.where(np.arange(SHAPE[1]) % 2 == odd, mask, False) for odd in (0, 1)]
    both = Rle(tuple(map(write.run_lengths, split)), picture, "row 2")  # a row per finding
    np.testing.assert_array_equal(masks.read(both), mask)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("3 2 1", r"t\.csv: row 4: 3 run lengths; expected pairs"),
        ("3 -2", r"t\.csv: row 4: 2 run lengths; expected pairs of a gap and a length, none negative"),
        ("3 two", r"t\.csv: row 4: run lengths '3 two'; expected whole numbers"),
        ("30 6", r"t\.csv: row 4: run lengths end at pixel 36, the image has 35"),
    ],
)
def test_wrong_run_lengths_name_the_table_and_the_row(picture, runs, message):
    with pytest.raises(UserError, match=message):
        masks.read(Rle((runs,), picture, "t.csv: row 4"))


def test_parts_are_merged_or_become_bits(tmp_path):
    left, right = RNG.random((2, *SHAPE)) < 0.4
    paths = [
        write.image(tmp_path / f"{name}.png", part.astype(np.uint8) * 255)
        for name, part in (("left", left), ("right", right))
    ]
    image = write.image(tmp_path / "image.png", np.zeros(SHAPE, np.uint8))
    merged = Parts(((paths[0], 1), (paths[1], 1)), like=image)
    np.testing.assert_array_equal(masks.read(merged), left | right)
    bits = masks.read(Parts(((paths[0], 1), (paths[1], 2)), like=image))
    np.testing.assert_array_equal(bits, left + 2 * right)
    assert masks.read(Parts((), like=image)).shape == SHAPE
    assert masks.extent(Parts((), like=image)) == SHAPE
    assert list(masks.files(merged)) == paths
    odd = write.image(tmp_path / "odd.png", np.zeros((5, 5), np.uint8))
    with pytest.raises(UserError, match=r"odd\.png: 5 x 5 pixels, but .*left\.png is 5 x 7 pixels"):
        masks.read(Parts(((paths[0], 1), (odd, 1)), like=image))


def test_a_part_may_be_coloured_or_have_a_palette_and_a_threshold(tmp_path):
    marked = RNG.random(SHAPE) < 0.5
    red = np.zeros((*SHAPE, 3), np.uint8)
    red[..., 0] = marked * 200
    path = write.image(tmp_path / "red.tif", red)
    np.testing.assert_array_equal(masks.read(Parts(((path, 1),), like=path)), marked)
    drawn = Image.fromarray(np.where(marked, 255, 0).astype(np.uint8))
    drawn.save(tmp_path / "drawn.gif")
    np.testing.assert_array_equal(
        masks.read(Parts(((tmp_path / "drawn.gif", 1),), like=path, above=127)), marked
    )


def test_a_part_that_jpeg_has_changed_is_refused_unless_a_threshold_says_what_is_marked(tmp_path):
    rows, columns = np.mgrid[:64, :64]
    marked = (rows - 32) ** 2 + (columns - 32) ** 2 < 20**2
    path = write.image(tmp_path / "m.jpg", marked.astype(np.uint8) * 255, quality=75)
    with pytest.raises(
        UserError, match=r"m\.jpg: a JPEG or .* between black and white, .*saved losslessly, as PNG"
    ):
        masks.read(Parts(((path, 1),), like=path))
    assert (masks.read(Parts(((path, 1),), like=path, above=127)) == marked).mean() > 0.999
    drawn = Image.fromarray(marked.astype(np.uint8) * 255)
    drawn.save(tmp_path / "kept.webp", lossless=True)
    np.testing.assert_array_equal(masks.read(Parts(((tmp_path / "kept.webp", 1),), like=path)), marked)
    drawn.save(tmp_path / "changed.webp", quality=75)
    drawn.save(tmp_path / "moving.webp", quality=75, save_all=True, append_images=[drawn], exif=b"Exif\0\0x")
    for name in ("changed", "moving"):
        with pytest.raises(UserError, match=rf"{name}\.webp: "):
            masks.read(Parts(((tmp_path / f"{name}.webp", 1),), like=path))
    frame = b"ANMF" + (40).to_bytes(4, "little") + bytes(16)
    for kind, lossy in ((b"VP8 ", True), (b"VP8L", False)):
        (tmp_path / "frame.webp").write_bytes(
            b"RIFF\0\0\0\0WEBP" + frame + kind + (16).to_bytes(4, "little") + bytes(16)
        )
        assert pixels._is_lossy_webp(tmp_path / "frame.webp") is lossy
    empty = write.image(tmp_path / "empty.jpg", np.zeros((64, 64), np.uint8))
    assert not masks.read(Parts(((empty, 1),), like=path)).any()


def test_a_slice_and_a_matlab_array_are_masks(tmp_path):
    volume = RNG.integers(0, 4, (6, 5, 3)).astype(np.uint8)
    path = write.nifti(tmp_path / "gt.nii.gz", volume)
    np.testing.assert_array_equal(masks.read(Plane(path, 1)), volume[:, :, 1].T[::-1, ::-1])
    assert decode_mask(Plane(path, 1), 4).shape == (4, 4)
    path = write.matlab(tmp_path / "1.mat", tumorMask=volume[:, :, 0] > 1)
    np.testing.assert_array_equal(masks.read(Plane(path, key="cjdata/tumorMask")), volume[:, :, 0] > 1)
    path = write.nifti(tmp_path / "odd.nii.gz", (volume * 0.5).astype(np.float32))
    with pytest.raises(
        UserError, match=r"odd\.nii\.gz\[1\]: mask values 0\.0 to 1\.5, expected classes from 0 to 255"
    ):
        masks.read(Plane(path, 1))


@pytest.fixture
def manifest(tmp_path):
    def make(*shapes_and_values):
        rows = ["image,label,mask"]
        for number, (shape, value) in enumerate(shapes_and_values):
            write.image(tmp_path / f"{number}.png", np.zeros((8, 6), np.uint8))
            write.image(tmp_path / f"{number}_mask.png", np.full(shape, value, np.uint8))
            rows.append(f"{number}.png,x,{number}_mask.png")
        path = tmp_path / "manifest.csv"
        path.write_text("\n".join(rows))
        return path

    return make


SEGMENTS = ("background", "cytoplasm", "nucleus")


@pytest.mark.parametrize("segments", [(), SEGMENTS])
def test_a_mask_of_another_size_than_its_image_is_refused_with_its_row(manifest, segments):
    path = manifest(((8, 6), 1), ((6, 8), 1), ((4, 3), 1))
    with pytest.raises(
        UserError,
        match=r"2 masks named in .*manifest\.csv cannot be used, first: row 3: .*1_mask\.png: 8 x 6 pixels, its image 6 x 8",
    ):
        load_manifest(path, image_size=8, segments=segments)


def test_a_mask_value_outside_the_segments_is_refused_with_its_row(manifest):
    path = manifest(((8, 6), 2), ((8, 6), 3))
    with pytest.raises(
        UserError,
        match=r"first: row 3: .*1_mask\.png: holds the value 3, expected 0 to 2 for the segments background, cytoplasm, nu",
    ):
        load_manifest(path, image_size=8, segments=SEGMENTS)


def test_masks_of_a_set_to_be_segmented_are_in_memory_and_values_of_one_name_are_one(manifest):
    path = manifest(((8, 6), 2), ((8, 6), 1), ((8, 6), 0))
    data = load_manifest(path, image_size=8, segments=("background", "cell", "cell"))
    assert data.segments == ("background", "cell")
    assert data.load_masks().shape == (3, 8, 8)
    assert data.load_masks()[:, 0, 0].tolist() == [1, 1, 0]
    lazily = load_manifest(path, image_size=8)
    assert not lazily.segments
    assert lazily.load_masks()[:, 0, 0].tolist() == [2, 1, 0]


def test_an_image_without_a_mask_is_refused_only_where_masks_are_the_target(tmp_path, manifest):
    path = manifest(((8, 6), 2), ((8, 6), 1))
    path.write_text(path.read_text().replace("1_mask.png", ""))
    assert load_manifest(path, image_size=8).masks[1] is None
    with pytest.raises(UserError, match=r"manifest\.csv: 1 of 2 images have no mask, first: row 3: 1\.png"):
        load_manifest(path, image_size=8, segments=SEGMENTS)


def test_a_rotated_photograph_is_as_large_as_it_is_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((8, 6, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    write.image(tmp_path / "m.png", np.zeros((6, 8), np.uint8))
    path = tmp_path / "manifest.csv"
    path.write_text("image,label,mask\na.jpg,x,m.png\n")
    assert load_manifest(path, image_size=8).load_masks().shape == (1, 8, 8)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_mask_without_the_orientation_of_its_image_is_refused_unless_it_is_said_how_it_lies(
    tmp_path, orientation, suffix
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((32, 32), np.uint8)
    stored[2:10, 4:22] = 255
    options = {"tiffinfo": {0x0112: orientation}} if suffix == "tif" else {"exif": exif}
    write.image(tmp_path / f"i.{suffix}", np.repeat(stored[..., None], 3, 2), **options)
    shown = pixels.upright(stored, orientation)
    write.image(tmp_path / "stored.png", stored)
    write.image(tmp_path / "shown.png", shown)
    write.image(tmp_path / "tagged.png", stored, exif=exif)
    path, segments = tmp_path / "manifest.csv", ("background", "lesion")
    for name in ("stored", "shown", "tagged"):
        path.write_text(f"image,label,mask\ni.{suffix},x,{name}.png\n")
        if name != "tagged":
            said = rf"row 2: .*{name}\.png: how it lies on .*i\.{suffix} is not known .*EXIF orientation {orientation}"
            with pytest.raises(UserError, match=said):
                load_manifest(path, image_size=32, segments=segments)
        data = load_manifest(
            path, image_size=32, segments=segments, mask_orientation="" if name == "tagged" else name
        )
        np.testing.assert_array_equal(data.masks[0] > 0, shown > 0)
        assert ((data.images[0][..., 0] > 128) == (shown > 0)).mean() > 0.99
