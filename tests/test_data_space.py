"""An image and its mask lie on one another in the patient, or are refused; values of masks mean one thing in a set."""

import contextlib
import itertools

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from dapt_jax import metrics
from dapt_jax.data import findings, formats, masks
from dapt_jax.data.framing import Framing
from dapt_jax.data.geometry import Geometry, Turn, turn_onto
from dapt_jax.data.manifest import load_manifest
from dapt_jax.data.masks import Placed
from dapt_jax.data.plane import Plane
from dapt_jax.errors import UserError
from tests import medical_files as write

RNG = np.random.default_rng(0)
SHAPE = (5, 6, 7)
AXES = [
    "".join(signs)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for signs in itertools.product(*order)
]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def image_of(values: np.ndarray, axes: str, zooms=(1.0, 1.0, 1.0), tilt=0.0) -> nibabel.Nifti1Image:
    """A volume [right, front, up] as a scanner with other axes, voxel sizes and a tilted patient stores it."""
    cosine, sine = np.cos(tilt), np.sin(tilt)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) @ np.diag(zooms)
    affine[:3, 3] = -30, 12, 5
    there = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    return nibabel.Nifti1Image(values, affine).as_reoriented(there)


def place_of(axes: str, axis: int, index: int) -> int:
    """The file's own index of a canonical slice."""
    letter = next(letter for letter in axes if letter in ("RL", "AP", "SI")[axis])
    return index if letter in "RAS" else SHAPE[axis] - 1 - index


@quick
@given(
    image_axes=st.sampled_from(AXES), mask_axes=st.sampled_from(AXES), axis=st.integers(0, 2), seed=st.integers(0, 9999),
    tilt=st.sampled_from([0.0, 0.3, -0.6]), zooms=st.sampled_from([(1.0, 1.0, 1.0), (0.5, 0.7, 3.0)]),
)  # fmt: skip
def test_a_mask_lies_on_its_image_however_each_is_stored(
    tmp_path, image_axes, mask_axes, axis, seed, tilt, zooms
):
    rng = np.random.default_rng(seed)
    marked = rng.integers(0, 3, SHAPE).astype(np.uint8)
    image_of(marked * 100.0, image_axes, zooms, tilt).to_filename(tmp_path / "i.nii")
    image_of(marked, mask_axes, zooms, tilt).to_filename(tmp_path / "m.nii")
    index = int(rng.integers(SHAPE[axis]))
    image = Plane(tmp_path / "i.nii", place_of(image_axes, axis, index), axis)
    mask = masks.place(Plane(tmp_path / "m.nii", place_of(mask_axes, axis, index), axis), image)
    assert isinstance(mask, Placed)
    np.testing.assert_array_equal(masks.read(mask) * 100, formats.samples(image).values)
    assert masks.extent(mask) == formats.extent(image)
    rest = [size for other, size in enumerate(zooms) if other != axis]
    np.testing.assert_allclose(formats.spacing(image), rest[::-1], rtol=1e-5)
    # The slice beside it lies elsewhere: refused, with both files and the slice that would be right.
    wrong = masks.place(
        Plane(tmp_path / "m.nii", place_of(mask_axes, axis, (index + 1) % SHAPE[axis]), axis), image
    )
    with pytest.raises(UserError) as caught:
        masks.read(wrong)
    for word in ("m.nii", "i.nii", f"the slice that lies there is {mask}"):
        assert word in str(caught.value)
    with pytest.raises(UserError, match="lies elsewhere"):
        masks.extent(wrong)


@pytest.mark.parametrize("change", ["flip", "shift", "tilt", "zoom", "uncoded"])
def test_a_mask_of_another_grid_is_refused_with_both_affines(tmp_path, change):
    image = image_of(np.zeros(SHAPE, np.float32), "RAS")
    affine = image.affine.copy()
    if change == "flip":
        affine[0] *= -1
    elif change == "shift":
        affine[1, 3] += 0.5
    elif change == "tilt":
        affine[:3, :3] = affine[:3, :3] @ np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    elif change == "zoom":
        affine[:3, :3] *= 1.2
    mask = nibabel.Nifti1Image(np.ones(SHAPE, np.uint8), affine)
    if change == "uncoded":
        mask.set_sform(affine, 0)
        mask.set_qform(affine, 0)
    image.to_filename(tmp_path / "i.nii")
    mask.to_filename(tmp_path / "m.nii")
    placed = masks.place(Plane(tmp_path / "m.nii", 2), Plane(tmp_path / "i.nii", 2))
    words = (
        r"m\.nii\[2\].*has no coordinates"
        if change == "uncoded"
        else r"m\.nii.*elsewhere.*i\.nii.*affine.*affine"
    )
    with pytest.raises(UserError, match=words):
        masks.read(placed)


def test_two_files_without_coordinates_share_their_indices(tmp_path):
    marked = RNG.integers(0, 3, SHAPE).astype(np.uint8)
    for name, values in (("i", marked.astype(np.float32)), ("m", marked)):
        made = nibabel.Nifti1Image(values, np.eye(4))
        made.set_sform(np.eye(4), 0)
        made.set_qform(np.eye(4), 0)
        made.to_filename(tmp_path / f"{name}.nii")
    image = Plane(tmp_path / "i.nii", 4)
    mask = masks.place(Plane(tmp_path / "m.nii", 4), image)
    np.testing.assert_array_equal(masks.read(mask), formats.samples(image).values)


def dicom_slice(path, values: np.ndarray, index: int, zooms) -> None:
    """A canonical volume's axial slice as DICOM: rows from the front, columns from the patient's right."""
    shown = values[:, :, index].T[::-1, ::-1]
    right, front = SHAPE[0] - 1, SHAPE[1] - 1
    ras = np.array([-30 + right * zooms[0], 12 + front * zooms[1], 5 + index * zooms[2]])
    write.dicom(
        path, np.ascontiguousarray(shown), ImagePositionPatient=[-ras[0], -ras[1], ras[2]],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[zooms[1], zooms[0]],
    )  # fmt: skip


@quick
@given(axes=st.sampled_from(AXES), index=st.integers(0, SHAPE[2] - 1))
def test_a_nifti_mask_lies_on_a_dicom_slice_by_its_position(tmp_path, axes, index):
    zooms = (0.5, 0.75, 2.0)
    marked = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.uint8)
    dicom_slice(tmp_path / "i.dcm", marked, index, zooms)
    image_of(marked, axes, zooms).to_filename(tmp_path / "m.nii.gz")
    mask = masks.place(Plane(tmp_path / "m.nii.gz", place_of(axes, 2, index)), tmp_path / "i.dcm")
    np.testing.assert_array_equal(masks.read(mask), formats.samples(tmp_path / "i.dcm").values)
    assert formats.spacing(tmp_path / "i.dcm") == (0.75, 0.5)
    with pytest.raises(
        UserError, match=rf"the slice that lies there is .*m\.nii\.gz\[{place_of(axes, 2, index)}\]"
    ):
        masks.read(
            masks.place(Plane(tmp_path / "m.nii.gz", place_of(axes, 2, (index + 1) % 7)), tmp_path / "i.dcm")
        )


def test_a_nifti_mask_of_a_radiograph_without_coordinates_is_refused(tmp_path):
    write.dicom(tmp_path / "i.dcm", np.zeros((6, 5), np.uint8))
    write.nifti(tmp_path / "m.nii", np.zeros((5, 6, 1), np.uint8))
    with pytest.raises(
        UserError, match=r"m\.nii\[0\]: how it lies on .*i\.dcm is not known .*i\.dcm has no coordinates"
    ):
        masks.read(masks.place(Plane(tmp_path / "m.nii", 0), tmp_path / "i.dcm"))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAL", "PIR"])
@pytest.mark.parametrize("suffix", ["png", "npy"])
def test_masks_without_coordinates_beside_slices_need_a_word_on_how_they_lie(tmp_path, axes, suffix):
    marked = RNG.integers(0, 3, SHAPE).astype(np.uint8)
    stored = image_of(marked * 100.0, axes)
    stored.to_filename(tmp_path / "i.nii.gz")
    own_axis = next(own for own, letter in enumerate(axes) if letter in "SI")
    drawn = np.take(np.rint(np.asarray(stored.dataobj) / 100).astype(np.uint8), 3, axis=own_axis)
    shown = formats.samples(Plane(tmp_path / "i.nii.gz", 3)).values / 100
    for name, values in (("stored", drawn), ("shown", shown.astype(np.uint8))):
        path = tmp_path / f"{name}.{suffix}"
        np.save(path, values) if suffix == "npy" else Image.fromarray(np.ascontiguousarray(values)).save(path)
        manifest = tmp_path / "manifest.csv"
        manifest.write_text(f"image,label,mask\ni.nii.gz[3],x,{path.name}\n")
        segments = ("background", "one", "two")
        with pytest.raises(
            UserError, match=rf"row 2: .*{name}\.{suffix}: how it lies on .*i\.nii\.gz\[3\] is not known"
        ):
            load_manifest(manifest, image_size=8, segments=segments)
        data = load_manifest(manifest, image_size=8, segments=segments, mask_orientation=name)
        np.testing.assert_array_equal(data.masks[0], Framing(8).mask(shown.astype(np.uint8)))
    with pytest.raises(UserError, match=r"mask_orientation='show'; did you mean 'shown'"):
        load_manifest(manifest, image_size=8, segments=segments, mask_orientation="show")


def test_a_dicom_segmentation_lies_where_its_frames_say(tmp_path):
    zooms = (0.5, 0.75, 2.0)
    marked = RNG.integers(0, 2, SHAPE).astype(np.uint8)
    dicom_slice(tmp_path / "i.dcm", marked * 50, 2, zooms)

    def item(**elements):
        made = Dataset()
        for name, value in elements.items():
            setattr(made, name, value)
        return made

    frames, positions = [], []
    for index in (3, 2):  # in another order than the slices
        frames.append(marked[:, :, index].T[::-1, ::-1])
        ras = np.array([-30 + 4 * zooms[0], 12 + 5 * zooms[1], 5 + index * zooms[2]])
        positions.append(item(ImagePositionPatient=[-ras[0], -ras[1], ras[2]]))
    shared = item(
        PlaneOrientationSequence=Sequence([item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]),
        PixelMeasuresSequence=Sequence([item(PixelSpacing=[zooms[1], zooms[0]])]),
    )
    write.dicom(
        tmp_path / "m.dcm", np.stack(frames), SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence([item(PlanePositionSequence=Sequence([each])) for each in positions]),
    )  # fmt: skip
    mask = masks.place(Plane(tmp_path / "m.dcm", 1), tmp_path / "i.dcm")
    np.testing.assert_array_equal(masks.read(mask), marked[:, :, 2].T[::-1, ::-1])
    with pytest.raises(UserError, match="lies elsewhere"):
        masks.read(masks.place(Plane(tmp_path / "m.dcm", 0), tmp_path / "i.dcm"))


@given(st.booleans(), st.booleans(), st.booleans(), st.integers(2, 6), st.integers(2, 6))
def test_a_turn_and_its_inverse_move_array_and_coordinates_together(rows, columns, swap, height, width):
    turn = Turn(rows, columns, swap)
    grid = Geometry(np.array([1.0, 2, 3]), np.array([0.0, 2, 0]), np.array([0.0, 0, -3]))
    values = np.arange(height * width).reshape(height, width)
    turned, moved = turn.apply(values), grid.turned(values.shape, turn)
    np.testing.assert_array_equal(turn.inverse.apply(turned), values)
    for (row, column), value in np.ndenumerate(turned):
        old_row, old_column = divmod(value, width)
        np.testing.assert_allclose(
            moved.origin + row * moved.down + column * moved.across,
            grid.origin + old_row * grid.down + old_column * grid.across,
        )
    found = turn_onto(moved, turned.shape, grid, values.shape)
    np.testing.assert_array_equal(found.apply(turned), values)


# --- what values mean


@pytest.fixture
def segment(tmp_path):
    """Reads a set of masks that are saved by the functions given, one each."""

    def load(*savers, segments=("background", "lesion"), suffix="png"):
        rows = ["image,label,mask"]
        for number, save in enumerate(savers):
            write.image(tmp_path / f"{number}.png", np.arange(36, dtype=np.uint8).reshape(6, 6))
            save(tmp_path / f"{number}_m.{suffix}")
            rows.append(f"{number}.png,x,{number}_m.{suffix}")
        (tmp_path / "manifest.csv").write_text("\n".join(rows))
        # In memory at once, and later: both read the set as a set.
        at_once = load_manifest(tmp_path / "manifest.csv", image_size=6, segments=segments)
        later = load_manifest(tmp_path / "manifest.csv", image_size=6).segmented(segments)
        np.testing.assert_array_equal(at_once.masks, later.masks)
        return at_once.masks

    return load


def grey(values, **options):
    return lambda path: Image.fromarray(np.asarray(values, np.uint8)).save(path, **options)


MARKED = np.zeros((6, 6), np.uint8)
MARKED[2:4, 1:5] = 1


def test_255_is_one_for_the_whole_set_or_for_no_file(segment):
    np.testing.assert_array_equal(
        segment(grey(MARKED * 255), grey(MARKED * 0), grey(MARKED * 0 + 255))[0], MARKED
    )
    ignored = MARKED.copy()
    ignored[0, 0] = 255
    with pytest.raises(
        UserError, match=r"2 masks .*row 2: .*0_m\.png: holds the value 255.*pixels to ignore"
    ):
        segment(grey(MARKED * 255), grey(ignored))
    with pytest.raises(UserError, match=r"holds the value 255"):
        segment(grey(MARKED * 255), grey(MARKED))  # 0 and 255 here, 0 and 1 there


def alpha(values, colour=0):
    def save(path):
        pixels = np.full((6, 6, 4), colour, np.uint8)
        pixels[..., 3] = values
        Image.fromarray(pixels).save(path)

    return save


def test_a_mask_in_the_alpha_channel_is_read_from_there_in_every_file(segment):
    full, none = MARKED * 0 + 255, MARKED * 0
    for colour in (0, 255):
        found = segment(alpha(MARKED * 255, colour), alpha(full, colour), alpha(none, colour))
        np.testing.assert_array_equal(found, np.stack([MARKED, MARKED * 0 + 1, MARKED * 0]))
    with pytest.raises(
        UserError, match=r"1_m\.png: its mask is in its grey values, that of .*0_m\.png in its alpha"
    ):
        segment(alpha(MARKED * 255), grey(MARKED * 255))

    def both(path):
        pixels = np.repeat(MARKED[..., None] * 255, 4, -1)
        pixels[..., 3] = np.arange(36).reshape(6, 6)
        Image.fromarray(pixels).save(path)

    with pytest.raises(
        UserError, match=r"0_m\.png: both its grey values and its alpha channel hold something"
    ):
        segment(both)


def test_a_grey_mask_with_full_alpha_is_read_from_grey(segment):
    def save(path):
        Image.fromarray(np.dstack([MARKED * 255] * 3 + [MARKED * 0 + 255])).save(path)

    np.testing.assert_array_equal(segment(save)[0], MARKED)


def palette(values, colours):
    def save(path):
        image = Image.fromarray(np.asarray(values, np.uint8)).convert("P")
        image.putdata(np.asarray(values).ravel().tolist())
        image.putpalette([value for colour in colours for value in colour])
        image.save(path)

    return save


def test_a_palette_of_black_and_white_is_read_by_its_colours_and_others_by_index(segment):
    black, white, red = (0, 0, 0), (255, 255, 255), (200, 0, 0)
    np.testing.assert_array_equal(segment(palette(1 - MARKED, [white, black]))[0], MARKED)
    np.testing.assert_array_equal(segment(palette(MARKED, [black, white]))[0], MARKED)
    one_bit = lambda path: Image.fromarray(MARKED * 255).convert("1").save(path)  # noqa: E731
    mixed = (
        grey(MARKED * 255),
        one_bit,
        palette(MARKED, [black, white]),
        palette(1 - MARKED, [white, black]),
    )
    np.testing.assert_array_equal(segment(*mixed), [MARKED] * 4)
    np.testing.assert_array_equal(
        segment(palette(MARKED, [white, red]), palette(MARKED * 0, [white, red]))[0], MARKED
    )


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            [([[0, 1, 2]], "krg"), ([[0, 1, 1]], "kg")],
            r"1_m\.png: value 1 .* \(0, 200, 0\), but \(200, 0, 0\) in .*0_m\.png; expected one colour for each value",
        ),
        (
            [([[0, 1, 1]], "kr"), ([[0, 2, 2]], "kgr")],
            r"1_m\.png: value 2 .* \(200, 0, 0\), but value 1 in .*0_m\.png",
        ),
        ([([[1, 0, 0]], "rk")], r"0_m\.png: value 1 .* \(0, 0, 0\), but value 0 in the background"),
        ([([[0, 1, 2]], "krg"), ([[0, 2, 2]], "krg"), ([[0, 1, 1]], "kk"), ([[0, 1, 2]], "kkk")], ""),
    ],
)
def test_palettes_that_number_colours_anew_in_every_mask_are_refused(segment, masks, message):
    colours = {"k": (0, 0, 0), "r": (200, 0, 0), "g": (0, 200, 0)}
    masks = [
        (np.repeat(values, 6, 0).repeat(2, 1), [colours[each] for each in names]) for values, names in masks
    ]
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        found = segment(*(palette(*mask) for mask in masks), segments=("background", "a", "b"))
        np.testing.assert_array_equal(found, [values for values, _ in masks])


def test_a_bilevel_or_white_at_zero_tiff_marks_what_is_white_or_what_is_stored(segment):
    import tifffile

    def tiff(values, photometric):
        return lambda path: tifffile.imwrite(path, values, photometric=photometric)

    np.testing.assert_array_equal(segment(tiff(MARKED, "miniswhite"), suffix="tif")[0], MARKED)
    np.testing.assert_array_equal(segment(tiff((1 - MARKED) * 255, "miniswhite"), suffix="tif")[0], MARKED)
    np.testing.assert_array_equal(
        segment(lambda path: Image.fromarray(MARKED * 255).convert("1").save(path), suffix="tif")[0], MARKED
    )


def test_jpeg_and_interpolation_are_named_with_the_values_in_between(segment, tmp_path):
    with pytest.raises(
        UserError, match=r"0_m\.jpg: a JPEG or lossy WebP file with [\d, ]+.* between black and white"
    ):
        segment(grey(RNG.integers(0, 2, (6, 6)) * 255, quality=30), suffix="jpg")
    smooth = np.asarray(
        Image.fromarray(MARKED * 255).resize((12, 12), Image.Resampling.BILINEAR).resize((6, 6))
    )
    with pytest.raises(UserError, match=r"between its classes it holds .*, as after JPEG or interpolation"):
        segment(grey(smooth))
    volume = np.zeros((5, 6, 2), np.float32)
    volume[2] = 0.5
    write.nifti(tmp_path / "m.nii", volume)
    with pytest.raises(UserError, match=r"between classes it holds 0\.5, as after interpolation"):
        masks.read(Plane(tmp_path / "m.nii", 0))
    volume[2] = 0.9999999
    np.testing.assert_array_equal(
        np.unique(masks.read(Plane(write.nifti(tmp_path / "n.nii", volume), 0))), [0, 1]
    )


@pytest.mark.parametrize(
    ("value", "word"), [(0, "all of its 2 masks are empty"), (1, "all of its 2 masks are full")]
)
def test_a_set_whose_masks_are_all_empty_or_full_is_told_of(segment, tmp_path, value, word):
    segment(grey(MARKED * 0 + value), grey(MARKED * 0 + value))
    segments = ("background", "lesion")
    dataset = load_manifest(tmp_path / "manifest.csv", image_size=6, segments=segments)
    assert any(word in line for line in findings.of_set(dataset))


def test_a_set_of_constant_images_is_named(tmp_path):
    rows = ["image,label"]
    for number in range(4):
        write.image(tmp_path / f"{number}.png", np.full((6, 6), 9 * number, np.uint8))
        rows.append(f"{number}.png,x")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    dataset = load_manifest(tmp_path / "manifest.csv", image_size=6)
    assert any("all 4 images are without content" in line for line in findings.of_set(dataset))


# --- millimetres


@pytest.mark.parametrize(("size", "crop"), [(12, None), (6, None), (8, 6)])
def test_distances_of_surfaces_are_in_millimetres_where_spacing_is_known(tmp_path, size, crop):
    zooms = (0.5, 2.0, 3.0)
    volume = np.zeros((12, 12, 2), np.uint8)
    volume[5:7, 5:7] = 1
    image = image_of(volume.astype(np.float32), "LPS", zooms)
    image.to_filename(tmp_path / "i.nii")
    image_of(volume, "LPS", zooms).to_filename(tmp_path / "m.nii")
    (tmp_path / "manifest.csv").write_text("image,label,mask\ni.nii[0],x,m.nii[0]\ni.nii[1],x,m.nii[1]\n")
    segments = ("background", "lesion")
    data = load_manifest(tmp_path / "manifest.csv", image_size=size, crop=crop, segments=segments)
    scale = (crop or 12) / size
    np.testing.assert_allclose(data.spacing, [[2.0 * scale, 0.5 * scale]] * 2)
    np.testing.assert_allclose(data.take([1]).spacing, data.spacing[1:])
    one, other = (np.zeros((1, size, size), np.uint8) for _ in range(2))
    one[0, 1, 1], other[0, 4, 1] = 1, 1
    scored = metrics.Segmentation(segments)
    scored.add(one, other, data.pixel_sizes([0]))
    assert scored.per_image()["hd95"].item() == pytest.approx(3 * 2.0 * scale)
    # One image without: pixels of the files for all.
    write.image(tmp_path / "p.png", np.zeros((12, 12), np.uint8))
    write.image(tmp_path / "pm.png", np.zeros((12, 12), np.uint8))
    with (tmp_path / "manifest.csv").open("a") as file:
        file.write("p.png,x,pm.png\n")
    mixed = load_manifest(tmp_path / "manifest.csv", image_size=size, segments=segments)
    assert mixed.spacing is None
    np.testing.assert_allclose(mixed.pixel_sizes([0, 1]), np.full((2, 2), 12 / size))
