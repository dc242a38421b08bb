import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dapt_jax.data import formats
from dapt_jax.data.decode import ImageStore, decode, decode_mask
from dapt_jax.data.pixels import opened
from dapt_jax.errors import UserError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def png_16_bit_colour(path: Path, values: np.ndarray) -> Path:
    """Pillow cannot write these, but microscopes do."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_lossless_8_bit_files_keep_every_pixel(tmp_path, suffix):
    path = saved(Image.fromarray(COLOUR), tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(decode(path, 24), COLOUR)


def test_jpeg_is_what_pillow_reads(tmp_path):
    path = saved(Image.fromarray(COLOUR), tmp_path / "a.jpg", quality=90)
    with Image.open(path) as image:
        np.testing.assert_array_equal(decode(path, 24), np.asarray(image))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_grey_is_replicated_to_three_channels(tmp_path, suffix):
    pixels = decode(saved(Image.fromarray(GREY), tmp_path / f"a.{suffix}"), 24)
    assert pixels.shape == (24, 24, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.repeat(GREY[..., None], 3, axis=2))


@pytest.mark.parametrize("size", [7, 24, 50])
@pytest.mark.parametrize("mode", ["L", "1", "I;16"])
def test_grey_resizes_as_three_equal_channels_do(tmp_path, mode, size):
    image = Image.fromarray(GREY.astype(np.uint16)) if mode == "I;16" else Image.fromarray(GREY).convert(mode)
    path = saved(image, tmp_path / "a.png")
    colour = Image.fromarray(decode(path, 24)).resize((size, size), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode(path, size), np.asarray(colour))


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_to_nearly_the_same_pixels(tmp_path):
    y, x = np.mgrid[:256, :256] / 20
    smooth = 127 + 60 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)
    path = saved(Image.fromarray(smooth.astype(np.uint8)), tmp_path / "a.jpg", quality=95)
    with opened(path, 128) as half, opened(path, 129) as whole:
        assert (half.size, whole.size) == ((128, 128), (256, 256))
        fair = np.asarray(whole.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    off = np.abs(decode(path, 64) - fair)
    assert 0 < off.mean() < 0.5
    assert off.max() <= 4
    np.testing.assert_array_equal(
        decode(path, 65), np.asarray(whole.resize((65, 65), Image.Resampling.BILINEAR))
    )
    np.testing.assert_array_equal(decode(path, 64, crop=256), fair)  # a crop counts the file's own pixels


def test_alpha_is_dropped_and_not_blended(tmp_path):
    alpha = RNG.integers(0, 256, (24, 24, 1), dtype=np.uint8)
    path = saved(Image.fromarray(np.concatenate([COLOUR, alpha], axis=2)), tmp_path / "a.png")
    np.testing.assert_array_equal(decode(path, 24), COLOUR)


@pytest.mark.parametrize("options", [{}, {"transparency": bytes(range(256))}])
def test_a_palette_is_looked_up(tmp_path, options):
    image = Image.fromarray(COLOUR).quantize(64)
    path = saved(image, tmp_path / "a.png", **options)
    np.testing.assert_array_equal(decode(path, 24), np.asarray(image.convert("RGB")))


def test_bilevel_is_black_and_white(tmp_path):
    pixels = decode(saved(Image.fromarray(GREY > 100), tmp_path / "a.png"), 24)
    np.testing.assert_array_equal(pixels[..., 0], np.where(GREY > 100, 255, 0))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("top", "shift"), [(65535, 8), (4095, 4), (255, 0)])
def test_16_bit_grey_fills_the_8_bit_range_whatever_depth_the_scanner_used(tmp_path, suffix, top, shift):
    values = RNG.integers(0, top, (24, 24), endpoint=True).astype(np.uint16)
    values[0, 0] = top
    pixels = decode(saved(Image.fromarray(values), tmp_path / f"a.{suffix}"), 24)
    np.testing.assert_array_equal(pixels[..., 0], values >> shift)
    assert pixels.max() == 255


def test_16_bit_colour_keeps_the_upper_byte(tmp_path):
    values = RNG.integers(0, 65536, (24, 24, 3))
    pixels = decode(png_16_bit_colour(tmp_path / "a.png", values), 24)
    np.testing.assert_array_equal(pixels, values >> 8)


def test_signed_32_bit_integers_are_stretched_over_their_own_range(tmp_path):
    hounsfield = np.linspace(-1000, 3000, 24 * 24).astype(np.int32).reshape(24, 24)
    pixels = decode(saved(Image.fromarray(hounsfield), tmp_path / "a.tif"), 24)[..., 0]
    assert (pixels[0, 0], pixels[-1, -1]) == (0, 255)
    assert (np.diff(pixels.reshape(-1).astype(int)) >= 0).all()


def test_floats_from_0_to_1_are_not_stretched_and_others_are(tmp_path):
    half = np.full((24, 24), 0.5, np.float32)
    assert (decode(saved(Image.fromarray(half), tmp_path / "half.tif"), 24) == 128).all()
    wide = np.linspace(-3, 7, 24 * 24, dtype=np.float32).reshape(24, 24)
    pixels = decode(saved(Image.fromarray(wide), tmp_path / "wide.tif"), 24)
    assert (pixels[0, 0, 0], pixels[-1, -1, 0]) == (0, 255)
    assert (decode(saved(Image.fromarray(half + 9), tmp_path / "flat.tif"), 24) == 0).all()


def test_nan_becomes_black(tmp_path):
    values = np.full((24, 24), np.nan, np.float32)
    values[0] = 1
    pixels = decode(saved(Image.fromarray(values), tmp_path / "a.tif"), 24)
    assert (pixels[0] == 255).all()
    assert (pixels[1:] == 0).all()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, :16] = 255
    pixels = decode(saved(Image.fromarray(wide), tmp_path / "a.jpg", exif=exif, quality=95), 32)
    assert pixels[:14].min() > 240
    assert pixels[18:].max() < 15


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "lzw.tif", "16.tif"])
def test_the_size_in_the_header_is_that_of_the_decoded_image_in_every_orientation(
    tmp_path, orientation, suffix
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": {0x0112: orientation}} if suffix.endswith("tif") else {"exif": exif}
    options |= {"compression": "tiff_lzw"} if suffix.startswith("lzw") else {}
    wide = np.full((40, 80), 200, np.uint16 if suffix.startswith("16") else np.uint8)
    path = saved(Image.fromarray(wide), tmp_path / f"a.{suffix}", **options)
    assert (
        formats.extent(path)
        == formats.samples(path).values.shape
        == (wide.shape if orientation < 5 else (80, 40))
    )
    # The picture fills its own half of the padded square.
    shown = decode(path, 32, resize="pad").any(2)
    assert (shown.any(1).sum(), shown.any(0).sum()) == ((16, 32) if orientation < 5 else (32, 16))


def test_an_oblong_image_is_resized_whole(tmp_path):
    oblong = np.zeros((20, 60, 3), np.uint8)
    oblong[:, 30:] = 255
    pixels = decode(saved(Image.fromarray(oblong), tmp_path / "a.png"), 10)
    assert pixels.shape == (10, 10, 3)
    assert pixels[:, :4].max() == 0
    assert pixels[:, 6:].min() == 255


def test_crop_takes_the_centre_in_pixels_of_the_file(tmp_path):
    path = saved(Image.fromarray(COLOUR), tmp_path / "a.png")
    np.testing.assert_array_equal(decode(path, 8, crop=8), COLOUR[8:16, 8:16])
    np.testing.assert_array_equal(decode(path, 24, crop=0), COLOUR)
    np.testing.assert_array_equal(decode(path, 24, crop=999), COLOUR)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
@pytest.mark.parametrize("kept", [0.0, 0.05, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, suffix, kept):
    path = saved(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), tmp_path / f"a.{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=rf"{path}: .*PNG, JPEG, BMP or TIFF"):
        decode(path, 32)


def test_a_file_that_is_no_image_is_an_error_that_says_so(tmp_path):
    path = tmp_path / "notes.png"
    path.write_bytes(b"\0" * 128 + b"no image")
    with pytest.raises(UserError, match=r"notes\.png: not an image that Pillow reads; expected PNG"):
        decode(path, 32)
    with pytest.raises(UserError, match=r"none\.png: no such image file"):
        decode(tmp_path / "none.png", 32)
    with pytest.raises(UserError, match="cannot be read"):
        decode(tmp_path, 32)


def test_a_stack_of_frames_is_refused(tmp_path):
    frames = [Image.fromarray(GREY) for _ in range(3)]
    path = saved(frames[0], tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=r"stack\.tif: holds 3 frames, expected one image per file"):
        decode(path, 32)


def test_more_pixels_than_pillow_opens_is_one_line(tmp_path, monkeypatch):
    path = saved(Image.fromarray(COLOUR), tmp_path / "slide.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"slide\.png: more pixels .*tiles"):
        decode(path, 32)


def test_masks_keep_their_classes_through_resizing(tmp_path):
    classes = np.kron(np.array([[0, 1], [2, 1]], np.uint8), np.ones((15, 15), np.uint8))
    mask = decode_mask(saved(Image.fromarray(classes), tmp_path / "m.png"), 16)
    assert mask.shape == (16, 16)
    assert set(np.unique(mask)) == {0, 1, 2}
    assert (mask[0, 0], mask[-1, 0], mask[-1, -1]) == (0, 2, 1)


def test_a_palette_mask_is_read_by_index_and_a_0_255_mask_as_0_1(tmp_path):
    image = Image.fromarray(GREY % 3, mode=None).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    np.testing.assert_array_equal(decode_mask(saved(image, tmp_path / "p.png"), 24), GREY % 3)
    drawn = Image.fromarray(np.where(GREY > 90, 255, 0).astype(np.uint8))
    np.testing.assert_array_equal(decode_mask(saved(drawn, tmp_path / "b.png"), 24), GREY > 90)
    colour = saved(Image.merge("RGB", [drawn] * 3), tmp_path / "c.png")
    np.testing.assert_array_equal(decode_mask(colour, 24), GREY > 90)


def test_a_colour_picture_in_place_of_a_mask_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"m\.png: a colour image, expected a mask"):
        decode_mask(saved(Image.fromarray(COLOUR), tmp_path / "m.png"), 24)


@pytest.fixture
def files(tmp_path):
    images = RNG.integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
    return images, [saved(Image.fromarray(image), tmp_path / f"{i}.png") for i, image in enumerate(images)]


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_store_gives_the_same_pixels_cached_or_not_and_after_take(files, cache_bytes):
    images, paths = files
    store = ImageStore.from_files(paths, 12, cache_bytes=cache_bytes)
    assert len(store) == 6
    assert store.names == tuple(map(str, paths))
    np.testing.assert_array_equal(store.batch([3, 3, 0]), images[[3, 3, 0]])
    part = store.take([4, 2]).take([1])
    np.testing.assert_array_equal(part[0], images[2])
    assert part.names == (str(paths[2]),)


def test_a_cached_store_reads_each_file_once(files):
    images, paths = files
    store = ImageStore.from_files(paths, 12)
    assert store.verify() == []
    for path in paths:
        path.unlink()
    np.testing.assert_array_equal(store.take([5]).batch([0])[0], images[5])


def test_threads_read_the_same_pixels(files):
    images, paths = files
    store = ImageStore.from_files(paths, 12)
    seen: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: seen.append(store.batch(range(6)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert all((batch == images).all() for batch in seen)


def test_verify_names_every_bad_image(files):
    _, paths = files
    paths[1].write_bytes(b"")
    paths[4].write_bytes(paths[4].read_bytes()[:60])
    bad = ImageStore.from_files(paths, 12).verify(workers=2)
    assert [image.index for image in bad] == [1, 4]
    assert [image.name for image in bad] == [str(paths[1]), str(paths[4])]
    assert all(image.name in image.reason for image in bad)


def test_a_store_over_arrays_resizes_them_once():
    arrays = np.repeat(np.repeat(COLOUR[None, :8, :8], 4, axis=1), 4, axis=2)
    store = ImageStore.from_arrays(arrays, 16)
    assert store.size == 16
    assert store[0].shape == (16, 16, 3)
    assert store.names == ("array/000000",)
    with pytest.raises(ValueError, match="expected uint8"):
        ImageStore.from_arrays(arrays.astype(np.float32), 16)


def test_digest_follows_files_size_and_crop(files):
    _, paths = files
    before = ImageStore.from_files(paths, 12).digest()
    assert ImageStore.from_files(paths, 12).digest() == before
    assert ImageStore.from_files(paths, 13).digest() != before
    assert ImageStore.from_files(paths, 12, crop=8).digest() != before
    assert ImageStore.from_files(paths[::-1], 12).digest() != before
    saved(Image.fromarray(COLOUR), paths[0])
    assert ImageStore.from_files(paths, 12).digest() != before
