"""The inputs of ../shared/cases that came out wrong: intensities and space."""

from pathlib import Path

import numpy as np
import pytest

from dapt_jax.data import formats, intensity
from dapt_jax.data.decode import ImageStore, decode
from dapt_jax.data.plane import Plane, Window
from dapt_jax.data.sources import load
from dapt_jax.errors import UserError
from tests.conftest import SHARED_DATA

CASES = SHARED_DATA.parent / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"no folder of cases at {CASES}")


@pytest.mark.parametrize("window", [None, Window(-160, 240)])
def test_an_enhanced_frame_is_as_grey_as_the_classic_slice(window):
    classic, enhanced = (
        decode(Plane(CASES / "enhanced_ct" / f"{name}.dcm", index, window=window), 64)
        for name, index in (("classic", None), ("enhanced", 0))
    )
    assert np.abs(classic.astype(int) - enhanced).max() <= 1
    assert classic.max() == 255


@pytest.mark.parametrize("name", ["center_only", "empty_sequence", "empty_tags", "lut_without_data"])
def test_tags_without_a_value_count_as_absent(name):
    folder = CASES / "empty_window"
    np.testing.assert_array_equal(decode(folder / f"{name}.dcm", 64), decode(folder / "no_tags.dcm", 64))


def test_a_study_of_files_with_empty_windows_is_read_right():
    data = load(
        {"kind": "manifest", "path": str(CASES / "empty_window_study" / "manifest.csv")},
        data_dir=None,
        image_size=48,
    )
    assert not data.images.constant().any()
    (row,) = data.intensity_summary()
    assert row["origin"] == "depth in the header (12 bits)"
    assert row["images"] == len(data)


def test_one_scale_for_a_series_and_never_by_one_pixel():
    folder = CASES / "16bit"
    files = [folder / f"{name}.png" for name in ("max4000", "one_pixel_4200", "same_series_dark_max235")]
    store = ImageStore.from_files(files, 64)
    assert [int(store[index].max()) for index in range(3)] == [250, 255, 14]
    assert (store[0] != store[1]).any(-1).sum() <= 1
    bits10, bits14 = (decode(folder / f"bits{bits}.dcm", 64) for bits in (10, 14))
    assert np.abs(bits10.astype(int) - bits14).max() <= 1
    assert bits10.max() == 250


@pytest.mark.parametrize("name", ["stripped", "stripped_0_1"])
def test_background_does_not_set_the_range(name):
    shown = np.stack([decode(Plane(CASES / "small_foreground" / f"{name}.nii.gz", k), 64) for k in range(8)])
    stored = [
        formats.samples(Plane(CASES / "small_foreground" / f"{name}.nii.gz", k)).values for k in range(8)
    ]
    assert len(np.unique(shown)) >= 0.9 * len(np.unique(stored))


def test_a_slice_is_the_files_own_index():
    folder = CASES / "direction"
    for k in range(6):
        up, down = (
            formats.samples(Plane(folder / f"stored_{way}.nii.gz", k)).values for way in ("up", "down")
        )
        other = formats.samples(Plane(folder / "stored_up.nii.gz", 5 - k)).values
        assert (down == other).all() or (down == up).all()
    import nibabel

    stored = np.asarray(nibabel.load(folder / "stored_down.nii.gz").dataobj)
    found = formats.samples(Plane(folder / "stored_down.nii.gz", 1)).values
    np.testing.assert_array_equal(np.sort(found.ravel()), np.sort(stored[:, :, 1].ravel()))


def test_a_mask_elsewhere_in_the_world_is_refused_with_both_affines_and_one_in_place_is_read(tmp_path):
    import nibabel

    folder = CASES / "direction"
    spec = {"kind": "manifest", "segments": ("background", "tumour"), "crop": 32}
    with pytest.raises(UserError) as caught:
        load({**spec, "path": str(folder / "manifest.csv")}, data_dir=None, image_size=32)
    for word in (
        "mask_identity.nii.gz[0]",
        "image.nii.gz[0]",
        "[-1 0 0 0; 0 -1 0 0; 0 0 1 0]",
        "[1 0 0 0; 0 1 0 0; 0 0 1 0]",
    ):
        assert word in str(caught.value)
    rows = [f"{folder}/image.nii.gz[{k}],x,{folder}/mask_same.nii.gz[{k}]" for k in range(4)]
    path = tmp_path / "manifest.csv"
    path.write_text("\n".join(["image,label,mask", *rows]))
    data = load({**spec, "path": str(path)}, data_dir=None, image_size=32)
    image, mask = (
        np.asarray(nibabel.load(folder / f"{name}.nii.gz").dataobj) for name in ("image", "mask_same")
    )
    for k in range(4):
        pixels = data.images[k][..., 0]
        assert data.masks[k].sum() == mask[:, :, k].sum()
        inside, outside = pixels[data.masks[k] > 0].mean(), pixels[data.masks[k] == 0].mean()
        expected = image[:, :, k][mask[:, :, k] > 0].mean() - image[:, :, k][mask[:, :, k] == 0].mean()
        assert np.sign(inside - outside) == np.sign(expected)
        assert abs(inside - outside) > 50


def test_the_lines_of_a_summary_say_how_many_and_how():
    data = load(
        {"kind": "manifest", "path": str(CASES / "enhanced_ct" / "manifest.csv")},
        data_dir=None,
        image_size=48,
    )
    lines = [intensity.line(row) for row in data.intensity_summary()]
    assert lines == [
        f"2 images: black -160, white 239, by window of the file (first: {Path(CASES / 'enhanced_ct' / 'enhanced.dcm')}[0])"
    ]
