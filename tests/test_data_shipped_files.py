"""The files that pydicom, nibabel and scikit-image ship."""

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import skimage
from PIL import Image
from pydicom.pixels import apply_windowing

from dapt_jax.data import dicom, formats, nifti
from dapt_jax.data.decode import decode
from dapt_jax.data.plane import Plane
from dapt_jax.data.sources import load
from dapt_jax.errors import UserError

PYDICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
NIBABEL_FILES = Path(nibabel.__file__).parent / "tests" / "data"
SKIMAGE_FILES = Path(skimage.__file__).parent / "data"


def shipped(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        pytest.skip(f"this release of the package does not ship {name}")
    return path


def test_pixels_that_no_installed_package_unpacks_are_one_line(tmp_path, monkeypatch):
    path = shipped(PYDICOM_FILES, "JPEG-lossy.dcm")

    def refuse(*_, **__):
        raise RuntimeError(
            "Unable to decompress because all plugins are missing dependencies:\n\tgdcm - requires gdcm"
        )

    monkeypatch.setattr("pydicom.pixels.pixel_array", refuse)
    with pytest.raises(
        UserError, match=r"packed as JPEG.*no installed package unpacks; pip install"
    ) as caught:
        decode(path, 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm"]
)
def test_grey_files_that_pydicom_ships_are_shown_as_pydicom_windows_them(name):
    path = shipped(PYDICOM_FILES, name)
    data = pydicom.dcmread(path)
    rescaled = pydicom.pixels.apply_modality_lut(data.pixel_array, data)
    shown = dicom.pixels(Plane(path))
    if "WindowCenter" in data:
        windowed = apply_windowing(rescaled, data).astype(float)
        assert np.corrcoef(windowed.ravel(), shown.ravel().astype(float))[0, 1] > 0.9999
    else:
        assert np.corrcoef(rescaled.ravel().astype(float), shown.ravel().astype(float))[0, 1] > 0.999
    assert shown.shape == (data.Rows, data.Columns) == formats.extent(path)


@pytest.mark.parametrize(
    "name", ["SC_rgb_rle.dcm", "SC_ybr_full_422_uncompressed.dcm", "examples_palette.dcm"]
)
def test_colour_files_that_pydicom_ships_are_read(name):
    pixels = dicom.pixels(Plane(shipped(PYDICOM_FILES, name)))
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtplan.dcm", "a DICOM file without pixel data"),
        ("MR_truncated.dcm", "its pixels cannot be read"),
        ("no_meta.dcm", "not a DICOM file"),
        ("SC_rgb_rle_2frame.dcm", "holds 2 frames"),
    ],
)
def test_bad_files_that_pydicom_ships_are_one_line(name, message):
    path = shipped(PYDICOM_FILES, name)
    with pytest.raises(UserError, match=message) as caught:
        decode(path, 16)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_every_file_that_pydicom_ships_is_a_picture_or_one_line():
    files = sorted(file for file in PYDICOM_FILES.glob("*.dcm") if file.is_file())
    shown, lines = [], {}
    for path in files:
        try:
            shown.append(dicom.pixels(Plane(path, 0)))
        except UserError as error:
            lines[path] = str(error)
    if not files:
        pytest.skip("this release of pydicom ships no files")
    assert all(
        pixels.dtype == np.uint8 and pixels.max() > 127 for pixels in shown
    )  # nothing comes out nearly black
    assert all(line.startswith(str(path)) and "\n" not in line for path, line in lines.items())
    assert len(shown) > len(lines)


def test_volumes_that_nibabel_ships_are_read():
    path = shipped(NIBABEL_FILES, "anatomical.nii")
    whole = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    found = nifti.values(Plane(path, 12))
    np.testing.assert_allclose(found, whole[:, :, 12].T[::-1, ::-1], rtol=1e-6)
    assert decode(Plane(path, 12), 32).std() > 10
    with pytest.raises(UserError, match=r"example4d\.nii\.gz: a NIfTI image of rank 4"):
        decode(Plane(shipped(NIBABEL_FILES, "example4d.nii.gz"), 0), 8)
    pair = decode(shipped(NIBABEL_FILES, "0.dcm"), 16)
    assert pair.shape == (16, 16, 3)


def test_pages_that_scikit_image_ships_are_read():
    path = shipped(SKIMAGE_FILES, "multipage.tif")
    with Image.open(path) as image:
        image.seek(1)
        second = np.asarray(image.convert("RGB"))
    side = min(second.shape[:2])
    height, width = second.shape[:2]
    top, left = (height - side) // 2, (width - side) // 2
    found = decode(Plane(path, 1), side, crop=side)
    np.testing.assert_array_equal(found, second[top : top + side, left : left + side])


def test_planar_pages_that_pillow_does_not_know_are_one_line():
    with pytest.raises(UserError, match=r"multipage_rgb\.tif: not an image that Pillow reads"):
        decode(Plane(shipped(SKIMAGE_FILES, "multipage_rgb.tif"), 1), 8)


@pytest.mark.parametrize("name", ["retina.jpg", "microaneurysms.png", "cell.png", "ihc.png"])
def test_pictures_that_scikit_image_ships_are_read(name):
    path = shipped(SKIMAGE_FILES, name)
    with Image.open(path) as image:
        assert formats.extent(path) == image.size[::-1]
    assert decode(path, 32).std() > 5


def test_a_stack_of_faces_that_scikit_image_ships_is_read():
    path = shipped(SKIMAGE_FILES, "lfw_subset.npy")
    faces = np.load(path)
    found = decode(Plane(path, 7), faces.shape[1])[..., 0]
    np.testing.assert_array_equal(found, np.rint(faces[7] * 255).astype(np.uint8))


def test_files_that_the_packages_ship_are_read_through_the_one_door(tmp_path):
    files = {
        "ct.dcm": shipped(PYDICOM_FILES, "CT_small.dcm"),
        "mr": shipped(PYDICOM_FILES, "MR_small.dcm"),
        "head.nii": shipped(NIBABEL_FILES, "anatomical.nii"),
        "pages.tif": shipped(SKIMAGE_FILES, "multipage.tif"),
        "eye.jpg": shipped(SKIMAGE_FILES, "retina.jpg"),
    }
    for name, file in files.items():
        (tmp_path / name).symlink_to(file)
    cells = ["ct.dcm", "mr", "head.nii[3]", "head.nii[9]", "pages.tif[1]", "eye.jpg"]
    path = tmp_path / "manifest.csv"
    path.write_text("image,label\n" + "".join(f"{cell},{number % 2}\n" for number, cell in enumerate(cells)))
    data = load({"kind": "manifest", "path": str(path)}, data_dir=None, image_size=24)
    assert all(image.std() > 2 for image in data.images.batch(range(6)))
    assert len(set(data.groups)) == 5
