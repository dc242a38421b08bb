"""Files that are more than one 8-bit picture."""

import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

from dapt_jax.data import arrays, dicom, formats, nifti
from dapt_jax.data.decode import ImageStore, decode
from dapt_jax.data.plane import Plane, Window
from dapt_jax.data.sources import load
from dapt_jax.errors import UserError
from tests import medical_files as write

RNG = np.random.default_rng(0)
HOUNSFIELD = RNG.integers(-1000, 2000, (12, 16)).astype(np.int16)


def ramp(values, low, high):
    return np.rint(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


# --- windows


@pytest.mark.parametrize(
    ("text", "window"), [("-160,240", Window(-160, 240)), ("1%, 99%", Window(1, 99, True))]
)
def test_a_window_is_values_or_percentiles(text, window):
    assert Window.parse(text) == window
    assert Window.parse("") is None


@pytest.mark.parametrize("text", ["lung", "5", "240,-160", "1%,99", "-1%,50%", "1%,101%", "1.2.3,4"])
def test_another_window_is_refused(text):
    with pytest.raises(
        UserError, match=r"window=.*expected black and white as values '-160,240' or percentiles"
    ):
        Window.parse(text)


# --- DICOM


def test_dicom_values_are_rescaled_and_windowed_as_the_standard_says(tmp_path):
    stored = (HOUNSFIELD + 1024).astype(np.uint16)
    centre, width = 40, 400
    path = write.dicom(
        tmp_path / "ct.dcm",
        stored,
        RescaleSlope=1,
        RescaleIntercept=-1024,
        WindowCenter=centre,
        WindowWidth=width,
    )
    # PS3.3 C.11.2.1.2: linear between c - 0.5 - (w - 1) / 2 and c - 0.5 + (w - 1) / 2.
    low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    shown = dicom.pixels(Plane(path))
    assert np.abs(shown.astype(int) - ramp(HOUNSFIELD, low, high)).max() <= 1
    assert {0, 255} <= set(shown.ravel().tolist())
    np.testing.assert_array_equal(
        dicom.pixels(Plane(path, window=Window(-160, 240))), ramp(HOUNSFIELD, -160, 240)
    )  # a window of the config goes before the file's


def test_dicom_without_a_window_follows_the_rule_for_16_bits(tmp_path):
    stored = RNG.integers(0, 4096, (12, 16)).astype(np.uint16)
    stored[0, 0] = 4095
    np.testing.assert_array_equal(dicom.pixels(Plane(write.dicom(tmp_path / "a.dcm", stored))), stored >> 4)


def test_monochrome1_is_inverted(tmp_path):
    stored = RNG.integers(0, 256, (12, 16)).astype(np.uint8)
    bright = dicom.pixels(Plane(write.dicom(tmp_path / "2.dcm", stored)))
    dark = dicom.pixels(
        Plane(write.dicom(tmp_path / "1.dcm", stored, PhotometricInterpretation="MONOCHROME1"))
    )
    np.testing.assert_array_equal(bright, stored)
    np.testing.assert_array_equal(dark, 255 - stored)


def test_dicom_needs_no_suffix_and_colour_stays_colour(tmp_path):
    colour = RNG.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    path = write.dicom(tmp_path / "1.2.840.99", colour, SamplesPerPixel=3)
    np.testing.assert_array_equal(decode(path, 16), colour)
    assert formats.extent(path) == (16, 16)


def test_a_frame_of_several_has_to_be_named(tmp_path):
    frames = RNG.integers(0, 256, (3, 8, 10)).astype(np.uint8)
    path = write.dicom(tmp_path / "cine.dcm", frames)
    with pytest.raises(
        UserError, match=r"cine\.dcm: holds 3 frames, expected one image per file; name one, 0 to 2"
    ):
        decode(path, 8)
    np.testing.assert_array_equal(dicom.pixels(Plane(path, 1)), frames[1])
    with pytest.raises(UserError, match=r"no frame 3; it holds 3"):
        dicom.pixels(Plane(path, 3))


def test_a_dicom_without_pixels_or_with_an_unknown_syntax_or_cut_short_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"report\.dcm: a DICOM file without pixel data \(CT Image Storage\)"):
        decode(write.dicom(tmp_path / "report.dcm", None), 8)
    path = write.dicom(tmp_path / "odd.dcm", HOUNSFIELD, syntax="1.2.3.4.5")
    with pytest.raises(UserError, match=r"odd\.dcm: unknown transfer syntax 1\.2\.3\.4\.5"):
        decode(path, 8)
    path = write.dicom(tmp_path / "cut.dcm", HOUNSFIELD)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"cut\.dcm: its pixels cannot be read"):
        decode(path, 8)
    (tmp_path / "text.dcm").write_text("no DICOM")
    with pytest.raises(UserError, match=r"text\.dcm: not a DICOM file"):
        decode(tmp_path / "text.dcm", 8)


@pytest.mark.parametrize(
    ("storage", "what"),
    [("SegmentationStorage", "a segmentation: a mask"), ("RTDoseStorage", "a radiotherapy dose")],
)
def test_a_dicom_object_whose_pixels_are_no_picture_is_no_image_but_may_be_a_mask(tmp_path, storage, what):
    frames = (RNG.random((2, 8, 10)) < 0.5).astype(np.uint8)
    uid = getattr(pydicom.uid, storage)
    path = write.dicom(tmp_path / "other.dcm", frames, SOPClassUID=uid)
    for plane in (path, Plane(path, 1)):
        with pytest.raises(UserError, match=rf"other\.dcm: a DICOM object that holds {what}, no picture"):
            decode(plane, 8)
    np.testing.assert_array_equal(dicom.values(Plane(path, 1)), frames[1])


@pytest.mark.parametrize("package", ["pydicom", "nibabel"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    path = write.dicom(tmp_path / "a.dcm", HOUNSFIELD)
    if package == "nibabel":
        path = write.nifti(tmp_path / "a.nii", np.zeros((2, 3, 4), np.float32))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"reading it takes {package}; pip install 'dapt_jax\[medical\]'"):
        decode(Plane(path, 0), 8)


# --- NIfTI


def oriented(axes: str) -> tuple[np.ndarray, np.ndarray]:
    """A volume [right, front, up] of (5, 6, 7) as a scanner with other axes stores it, and its affine."""
    canonical = np.arange(5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7)
    ornt = nibabel.orientations.axcodes2ornt(axes)
    start = nibabel.orientations.axcodes2ornt("RAS")
    there = nibabel.orientations.ornt_transform(start, ornt)
    image = nibabel.Nifti1Image(canonical, np.eye(4)).as_reoriented(there)
    return np.asarray(image.dataobj), image.affine


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAL"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slice_is_the_files_own_and_looks_the_same_however_the_scanner_stored_the_volume(
    tmp_path, axes, axis
):
    stored, affine = oriented(axes)
    path = write.nifti(tmp_path / f"{axes}.nii.gz", stored, affine)
    canonical = np.arange(5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7)
    own_axis = next(own for own, letter in enumerate(axes) if letter in ("RL", "AP", "SI")[axis])
    found = nifti.values(Plane(path, 2, axis=axis))
    # The same voxels as index 2 of the stored array ...
    np.testing.assert_array_equal(np.sort(found.ravel()), np.sort(np.take(stored, 2, axis=own_axis).ravel()))
    # ... shown as the canonical volume's slice is.
    place = 2 if axes[own_axis] in "RAS" else canonical.shape[axis] - 1 - 2
    np.testing.assert_array_equal(found, np.take(canonical, place, axis=axis).T[::-1, ::-1])
    assert formats.extent(Plane(path, 2, axis=axis)) == found.shape
    np.testing.assert_array_equal(list(nifti.slices(path, axis))[2].T[::-1, ::-1], found)
    flat = np.take(stored, 2, axis=own_axis)
    np.testing.assert_array_equal(nifti.as_shown(Plane(path, 2, axis=axis), flat), found)
    np.testing.assert_array_equal(nifti.as_stored(Plane(path, 2, axis=axis), found), flat)


def test_an_axial_slice_has_the_front_up_and_the_patients_right_on_the_left(tmp_path):
    volume = np.zeros((5, 6, 3), np.float32)
    volume[4, 5, 1] = 1  # the right front corner
    shown = nifti.pixels(Plane(write.nifti(tmp_path / "a.nii", volume), 1, window=Window(0, 1)))
    assert np.argwhere(shown == 255).tolist() == [[0, 0]]


def test_intensities_span_percentiles_of_the_whole_volume_unless_a_window_is_given(tmp_path):
    volume = RNG.gamma(2, 100, (9, 8, 7)).astype(np.float32)
    path = write.nifti(tmp_path / "mr.nii.gz", volume)
    low, high = np.percentile(volume, (1, 99))
    cut = volume[:, :, 3].T[::-1, ::-1]
    np.testing.assert_array_equal(nifti.pixels(Plane(path, 3)), ramp(cut, low, high))
    np.testing.assert_array_equal(nifti.pixels(Plane(path, 3, window=Window(0, 500))), ramp(cut, 0, 500))


def test_a_volume_that_is_written_again_is_read_again(tmp_path):
    path = write.nifti(tmp_path / "a.nii", np.zeros((4, 4, 2), np.float32))
    assert nifti.values(Plane(path, 0)).max() == 0
    write.nifti(path, np.ones((4, 4, 3), np.float32))
    assert nifti.values(Plane(path, 0)).min() == 1


def test_a_nifti_of_wrong_rank_or_cut_short_or_without_the_slice_is_one_line(tmp_path):
    path = write.nifti(tmp_path / "time.nii.gz", np.zeros((3, 4, 5, 6), np.float32))
    with pytest.raises(
        UserError, match=r"time\.nii\.gz: a NIfTI image of rank 4 \[3, 4, 5, 6\]; expected .* rank 3"
    ):
        decode(Plane(path, 0), 8)
    with pytest.raises(UserError, match=r"flat\.nii: a NIfTI image of rank 2"):
        decode(Plane(write.nifti(tmp_path / "flat.nii", np.zeros((3, 4), np.float32)), 0), 8)
    path = write.nifti(tmp_path / "v.nii", np.zeros((3, 4, 5, 1), np.float32))
    with pytest.raises(UserError, match=r"v\.nii: no slice 5; it holds 5, numbered from 0"):
        decode(Plane(path, 5), 8)
    with pytest.raises(UserError, match=r"v\.nii: holds 5 slices, expected one image per file"):
        decode(path, 8)
    cut = write.nifti(tmp_path / "cut.nii.gz", RNG.random((30, 30, 30)).astype(np.float32))
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"cut\.nii\.gz: cannot be read"):
        decode(Plane(cut, 0), 8)


# --- arrays


def test_pictures_of_a_npy_file_are_read_one_by_one(tmp_path):
    stack = RNG.integers(0, 256, (4, 10, 12)).astype(np.uint8)
    np.save(tmp_path / "a.npy", stack)
    np.save(tmp_path / "b.npy", stack[:, None])
    shutil.copy(tmp_path / "a.npy", tmp_path / "C.NPY")
    for name in ("a.npy", "b.npy", "C.NPY"):
        store = ImageStore.from_files([Plane(tmp_path / name, index) for index in (2, 0)], 10, crop=10)
        np.testing.assert_array_equal(store[0][..., 1], stack[2][:, 1:11])
        assert store.names[1].endswith(f"{name}[0]")
        assert formats.extent(Plane(tmp_path / name, 1)) == (10, 12)


@pytest.mark.parametrize("name", ["1.mat", "1.MAT"])
def test_matlab_arrays_come_upright(tmp_path, name):
    values = RNG.integers(0, 3000, (6, 9)).astype(np.int16)
    path = write.matlab(tmp_path / name, image=values)
    np.testing.assert_array_equal(arrays.values(Plane(path, key="cjdata/image")), values)
    assert formats.extent(Plane(path, key="cjdata/image")) == (6, 9)


def test_bad_arrays_are_one_line(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"objects\.npy: holds pickled objects, which can run code"):
        decode(Plane(tmp_path / "objects.npy", 0), 8)
    np.save(tmp_path / "line.npy", np.zeros(5))
    with pytest.raises(UserError, match=r"line\.npy: an array \[5\], expected a picture"):
        decode(tmp_path / "line.npy", 8)
    np.save(tmp_path / "stack.npy", np.zeros((3, 4, 4)))
    with pytest.raises(
        UserError, match=r"stack\.npy\[3\]: no picture 3|stack\.npy: no picture 3; it holds 3"
    ):
        decode(Plane(tmp_path / "stack.npy", 3), 8)
    (tmp_path / "old.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(UserError, match=r"old\.mat: not an HDF5 file .*; save it in MATLAB with -v7\.3"):
        decode(Plane(tmp_path / "old.mat", key="image"), 8)
    path = write.matlab(tmp_path / "1.mat", image=np.zeros((4, 4)))
    with pytest.raises(UserError, match=r"1\.mat: no array 'cjdata/imag'; did you mean 'cjdata/image'\?"):
        decode(Plane(path, key="cjdata/imag"), 8)


# --- pages, and the manifest


def test_a_page_of_a_tiff_has_to_be_named(tmp_path):
    pages = [RNG.integers(0, 256, (9, 9)).astype(np.uint8) for _ in range(3)]
    first, *others = map(Image.fromarray, pages)
    first.save(tmp_path / "stack.tif", save_all=True, append_images=others)
    np.testing.assert_array_equal(decode(Plane(tmp_path / "stack.tif", 2), 9)[..., 0], pages[2])
    with pytest.raises(UserError, match=r"stack\.tif: no frame 3; it holds 3"):
        decode(Plane(tmp_path / "stack.tif", 3), 9)


def test_a_window_applies_to_16_bit_png(tmp_path):
    values = RNG.integers(0, 5000, (9, 9)).astype(np.uint16)
    path = write.image(tmp_path / "a.png", values)
    np.testing.assert_array_equal(
        decode(Plane(path, window=Window(100, 1100)), 9)[..., 0], ramp(values, 100, 1100)
    )


def test_a_manifest_names_slices_frames_pages_and_dicom(tmp_path):
    volume = RNG.integers(0, 100, (9, 9, 4)).astype(np.int16)
    write.nifti(tmp_path / "scan.nii.gz", volume)
    write.nifti(tmp_path / "drawn.nii.gz", (volume > 50).astype(np.uint8))
    rows = [
        "image,label,mask,split",
        *(f"scan.nii.gz[{index}],x,drawn.nii.gz[{index}],train" for index in (0, 3)),
    ]
    path = tmp_path / "manifest.csv"
    path.write_text("\n".join(rows))
    spec = {"kind": "manifest", "path": str(path), "window": "0,100"}
    for axis, view in ((2, volume[:, :, 3].T), (1, volume[:, 3, :].T), (0, volume[3].T)):
        spec_of = {**spec, "axis": axis, "segments": ("background", "bright"), "crop": min(view.shape)}
        data = load(spec_of, data_dir=None, image_size=min(view.shape))
        top, left = ((side - min(view.shape)) // 2 for side in view.shape)
        shown = view[::-1, ::-1][top : top + min(view.shape), left : left + min(view.shape)]
        np.testing.assert_array_equal(data.images[1][..., 0], ramp(shown, 0, 100))
        np.testing.assert_array_equal(data.load_masks()[1], shown > 50)
    assert len(set(data.groups)) == 1  # slices of a volume stay together
    path.write_text("\n".join([*rows, "scan.nii.gz[1],x,drawn.nii.gz[1],test"]))
    with pytest.raises(UserError, match=r"image scan\.nii\.gz is in splits 'train' and 'test' \(rows 2, 4\)"):
        load(spec, data_dir=None, image_size=9)
    path.write_text("\n".join([*rows, "scan.nii.gz[4],x,drawn.nii.gz[3],train"]))
    with pytest.raises(
        UserError, match=r"1 of 3 images .* first: row 4: .*scan\.nii\.gz: no slice 4; it holds 4"
    ):
        load(spec, data_dir=None, image_size=9)
    with pytest.raises(UserError, match=r"axis=3; expected 0 \(sagittal\)"):
        load({**spec, "axis": 3}, data_dir=None, image_size=9)


def test_a_folder_of_dicom_is_windowed_on_request(tmp_path):
    write.dicom(tmp_path / "x" / "a.dcm", HOUNSFIELD[:, :12])
    spec = {"kind": "folder", "path": str(tmp_path), "window": "-160,240"}
    data = load(spec, data_dir=None, image_size=12)
    np.testing.assert_array_equal(data.images[0][..., 0], ramp(HOUNSFIELD[:, :12], -160, 240))


def test_importing_the_formats_imports_neither_package():
    code = "import sys, dapt_jax.data.sources; assert not {'pydicom', 'nibabel', 'tensorflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
