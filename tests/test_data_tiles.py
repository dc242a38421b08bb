"""Images cut into tiles: how many, which pixels, what is left out, and what stays together."""

import numpy as np
import pytest
from PIL import Image

from dapt_jax.data import near_duplicates
from dapt_jax.data.decode import decode
from dapt_jax.data.pictures import DRAFT_MARGIN
from dapt_jax.data.plane import Plane
from dapt_jax.data.sources import load
from dapt_jax.data.tiles import Recent, Tile, Tiles
from dapt_jax.errors import UserError
from dapt_jax.inference import inputs, target_model
from tests import medical_files as write

RNG = np.random.default_rng(0)
HIGH, WIDE = 56, 88
CUT = {"tile_size": 16, "tile_stride": 8, "tile_picture": "28x40", "tile_margin": "0x4"}


def folder_of(root, *, numbers=("01", "02", "55"), extent=(HIGH, WIDE), lesion_extent=None):
    """Write photographs of noise with a bright square, of which the left half is black, and MA masks."""
    for number in numbers:
        part = "a. Training Set" if number < "55" else "b. Testing Set"
        colour = RNG.integers(0, 256, (*extent, 3)).astype(np.uint8)
        colour[:, : extent[1] // 2] = 0
        write.image(root / "1. Original Images" / part / f"IDRiD_{number}.png", colour)
        red = np.zeros((*(lesion_extent or extent), 3), np.uint8)
        red[..., 0] = 255 * (RNG.random(red.shape[:2]) < 0.3)
        masks = root / "2. All Segmentation Groundtruths" / part / "1. Microaneurysms"
        write.image(masks / f"IDRiD_{number}_MA.tif", red)
    return root


def read(root, **more):
    spec = {
        "kind": "idrid",
        "path": str(root),
        "lesions": ("microaneurysm",),
        "image_size": 16,
        **CUT,
        **more,
    }
    return load(spec, data_dir=None, image_size=8)


def test_the_published_crops_of_a_photograph_are_119_and_the_tests_are_ten():
    train = list(Tiles.parse(448, 112, "1120x2240", "0x96", 0.01).cut((2848, 4288), "IDRiD_01.jpg"))
    assert len(train) == ((1120 - 448) // 112 + 1) * ((2240 - 448) // 112 + 1) == 7 * 17 == 119
    assert len(set(train)) == 119
    assert max(tile.top for tile in train) == 1120 - 448
    assert max(tile.left for tile in train) == 2240 - 448
    assert len(list(Tiles.parse(448, 0, "1120x2240", "0x96").cut((2848, 4288), "IDRiD_55.jpg"))) == 10


def test_tiles_are_the_pixels_of_the_resized_picture_and_of_its_mask(tmp_path):
    data = read(folder_of(tmp_path))
    rows, columns = range(0, 28 - 16 + 1, 8), range(0, 40 - 16 + 1, 8)
    assert len(data) == 3 * len(rows) * len(columns) == 24
    with_seams = Image.open(data.images.source(0).path)
    inner = with_seams.crop((4, 0, WIDE - 4, HIGH))
    picture = np.asarray(inner.resize((40, 28), Image.Resampling.BILINEAR))
    lesion = Image.open(next((tmp_path / "2. All Segmentation Groundtruths").rglob("IDRiD_01_MA.tif")))
    marked = np.asarray(lesion.getchannel(0).crop((4, 0, WIDE - 4, HIGH)).resize((40, 28), Image.NEAREST)) > 0
    for row, (top, left) in enumerate([(top, left) for top in rows for left in columns]):
        inside = slice(top, top + 16), slice(left, left + 16)
        np.testing.assert_array_equal(data.images[row], picture[inside])
        np.testing.assert_array_equal(data.load_masks()[row], marked[inside])
        assert data.images.names[row].endswith(f"IDRiD_01.png@{top},{left}")
    # Pixels of 2 x 2 of the file, as the distances between surfaces count them.
    np.testing.assert_allclose(data.pixel_scale, [[2, 2]] * 24)
    np.testing.assert_array_equal(
        decode(data.images.source(1), 16), data.images[1], "one tile alone is read as in its set"
    )


def test_tiles_do_not_depend_on_whether_decoded_images_are_held(tmp_path):
    folder_of(tmp_path)
    spec = {"kind": "idrid", "path": str(tmp_path), "lesions": ("microaneurysm",), **CUT}
    held, again = (load(spec, data_dir=None, image_size=8, cache_bytes=most) for most in (1 << 20, 0))
    assert held.images.size == 8  # tiles of 16 px, resized as other images are
    rows = RNG.permutation(len(held))
    np.testing.assert_array_equal(held.images.batch(rows), again.images.batch(rows))
    np.testing.assert_array_equal(held.targets, again.targets)
    moved = load({**spec, "tile_margin": "0x8"}, data_dir=None, image_size=8, cache_bytes=0)
    assert len({data.fingerprint() for data in (held, again, moved)}) == 3


def test_dark_tiles_are_left_out_and_counted(tmp_path):
    folder_of(tmp_path)
    data = read(tmp_path, tile_min_brightness=0.01)
    means = read(tmp_path).images.batch(range(24)).mean((1, 2, 3)) / 255
    assert 0 < (means >= 0.01).sum() == len(data) < 24
    assert all(data.images[row].mean() >= 2.55 for row in range(len(data)))
    assert any("24 tiles of 3 images, 18 without those darker than 0.01" in note for note in data.notes)
    assert any("no tile holds the last rows and columns of an image, up to 4 and 0" in n for n in data.notes)
    with pytest.raises(UserError, match=r"all of its 24 tiles are darker than tile_min_brightness=0\.9"):
        read(tmp_path, tile_min_brightness=0.9)


def test_no_photograph_is_divided_and_tiles_that_look_alike_merge_none(tmp_path):
    folder_of(tmp_path)
    data = read(tmp_path)
    assert len(set(data.groups.tolist())) == 3
    for group in set(data.groups.tolist()):
        assert (data.groups == group).sum() == 8
    assert set(data.columns["split"][data.groups == data.groups[0]]) == {"train"}
    assert near_duplicates.merged(data).pairs == []
    photographs = sorted((tmp_path / "1. Original Images").rglob("*.png"))
    photographs[1].write_bytes(photographs[0].read_bytes())
    again = read(tmp_path)
    pairs = near_duplicates.merged(again).pairs
    assert len(pairs) == 6 * 6  # the tiles of one photograph that hold something, with those of the other
    assert {again.groups[row] for pair in pairs for row in pair} == set(again.groups[:16].tolist())
    assert len(set(near_duplicates.merged(again).groups.tolist())) == 2


def test_other_kinds_of_sets_are_cut_as_well(tmp_path):
    pixels = RNG.integers(0, 256, (20, 30)).astype(np.uint8)
    write.image(tmp_path / "all" / "x" / "1.png", pixels)
    write.image(tmp_path / "all" / "y" / "2.png", pixels[::-1])
    (tmp_path / "list.csv").write_text("image,label\nall/x/1.png,x\nall/y/2.png,y\n")
    for kind, path in (("folder", "all"), ("images", "all"), ("manifest", "list.csv")):
        spec = {"kind": kind, "path": path, "tile_size": 10, "image_size": 10}
        data = load(spec, data_dir=tmp_path, image_size=4)
        assert len(data) == 12
        np.testing.assert_array_equal(data.images[4][..., 0], pixels[10:20, 10:20])
    with pytest.raises(UserError, match="kind 'phantoms' has no key 'tile_size'"):
        load({"kind": "phantoms", "name": "a", "tile_size": 10}, data_dir=None, image_size=4)


def test_grey_tiles_of_16_bits_share_the_range_of_their_set(tmp_path):
    pixels = RNG.integers(0, 4000, (2, 20, 20)).astype(np.uint16)
    pixels[1] //= 8
    for number, each in enumerate(pixels):
        write.image(tmp_path / "x" / f"{number}.png", each)
    spec = {"kind": "images", "path": str(tmp_path), "image_size": 20}
    whole = load(spec, data_dir=None, image_size=4)
    tiles = load({**spec, "tile_size": 10, "image_size": 10}, data_dir=None, image_size=4)
    for picture in range(2):
        for number, (top, left) in enumerate(((0, 0), (0, 10), (10, 0), (10, 10))):
            expected = whole.images[picture][top : top + 10, left : left + 10]
            np.testing.assert_array_equal(tiles.images[4 * picture + number], expected)


def test_memory_is_bounded_and_what_several_threads_need_is_made_once():
    made = []
    recent = Recent(100)

    def make(key):
        return lambda: (made.append(key) or key, 40)

    assert [recent.get(key, make(key)) for key in "aabcba"] == list("aabcba")
    assert made == list("abca")
    assert recent.nbytes == 80
    assert recent.get("large", lambda: ("large", 1000)) == "large"
    assert recent.nbytes == 1000  # one is held whatever its size


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tile_size": 0}, "tile_stride is 8 without tile_size; expected tile_size=448 too"),
        ({"tile_picture": "1120"}, "tile_picture is '1120'; expected height x width in pixels"),
        ({"tile_picture": "10x40"}, "tile_picture is '10x40'; expected sides of at least tile_size, 16"),
        ({"tile_margin": "0x60"}, r"IDRiD_01\.png: 88 x 56 pixels, too few for a tile of 16 inside a margin"),
        ({"tile_picture": "", "tile_size": 64}, r"IDRiD_01\.png: 88 x 56 pixels, too few for a tile of 64"),
        ({"tile_min_brightness": 1.5}, "tile_min_brightness is 1.5; expected 0"),
        ({"tile_min_brightness": "dark"}, "tile_min_brightness is 'dark'; expected a number"),
        ({"tile_size": -1}, "tile_size is -1; expected a whole number from 0"),
        ({"tile_sise": 3}, "no key 'tile_sise'; did you mean 'tile_size'"),
        ({"crop": 20}, "tile_size is 16 and crop is 20; expected one of them"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(tmp_path, more, said):
    folder_of(tmp_path, numbers=("01",))
    with pytest.raises(UserError, match=said) as error:
        read(tmp_path, **more)
    assert "\n" not in str(error.value)


def test_a_damaged_photograph_counts_once_and_a_mask_of_other_size_is_refused(tmp_path):
    folder_of(tmp_path)
    file = next((tmp_path / "1. Original Images").rglob("IDRiD_02.png"))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"1 of 3 images named in .* cannot be read, first: .*IDRiD_02\.png"):
        read(tmp_path)
    spec = {"kind": "idrid", "path": str(tmp_path), "lesions": ("microaneurysm",), **CUT}
    kept = load(spec, data_dir=None, image_size=8, on_bad_image="skip")
    assert (len(kept), kept.skipped) == (16, 1)
    other = folder_of(tmp_path / "other", numbers=("01",), lesion_extent=(HIGH, WIDE - 2))
    with pytest.raises(UserError, match="86 x 56 pixels, its image 88 x 56; expected a mask as large"):
        read(other)


def test_a_large_jpeg_is_not_decoded_at_a_fraction(tmp_path):
    side = 16 * DRAFT_MARGIN * 4
    file = tmp_path / "large.jpg"
    Image.fromarray(RNG.integers(0, 256, (side, side, 3)).astype(np.uint8)).save(file)
    tile = decode(Plane(file, tile=Tile(8, 8, 16)), 16)
    np.testing.assert_array_equal(tile, np.asarray(Image.open(file))[8:24, 8:24])


def test_a_target_model_of_tiles_refuses_images_of_another_size(tmp_path):
    reading = target_model.Reading(16, tile_size=16)
    tiles = RNG.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    np.testing.assert_array_equal(inputs.from_array(tiles, reading), tiles)
    expected = (
        r"88 x 56 pixels, but the model was trained on tiles \(tile_size\) of 16 x 16; expected images cut"
    )
    with pytest.raises(UserError, match=expected):
        inputs.from_array(np.zeros((1, HIGH, WIDE, 3), np.uint8), reading)
    write.image(tmp_path / "1.png", np.zeros((HIGH, WIDE), np.uint8))
    with pytest.raises(UserError, match=rf"1\.png: {expected}"):
        inputs.from_paths([tmp_path / "1.png"], reading)
