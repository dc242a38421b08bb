"""Intensities come from metadata and from the set: properties over generated files."""

import itertools

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from dapt_jax.data import dicom, formats, intensity, pixels
from dapt_jax.data.decode import ImageStore, decode
from dapt_jax.data.intensity import Range, Samples, Statistics
from dapt_jax.data.plane import Plane, Window
from dapt_jax.errors import UserError
from tests import medical_files as write
from tests.test_data_decode import png_16_bit_colour

RNG = np.random.default_rng(0)
SHAPE = (12, 16)
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31 - 1)


def scene(seed: int, low: int, high: int, dtype=np.uint16) -> np.ndarray:
    """Values from low to high, both of which occur."""
    values = np.random.default_rng(seed).integers(low, high, SHAPE, endpoint=True)
    values.flat[:2] = low, high
    return values.astype(dtype)


def ramp(values, low, high):
    return np.rint(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def item(**elements) -> Dataset:
    made = Dataset()
    for name, value in elements.items():
        setattr(made, name, value)
    return made


def table(entries: np.ndarray, first: int, bits: int, packed: bool) -> Dataset:
    made = item(LUTDescriptor=[len(entries) % 65536, first, bits])
    made.add_new("LUTData", "OW", entries.astype(np.uint8 if packed else "<u2").tobytes())
    return made


# --- DICOM


@quick
@given(bits=st.integers(8, 15), seed=seeds)
def test_unsigned_values_without_a_window_span_the_depth_of_the_header(tmp_path, bits, seed):
    values = scene(seed, 0, 2**bits - 1)
    path = write.dicom(tmp_path / "a.dcm", values, BitsStored=bits, HighBit=bits - 1)
    np.testing.assert_array_equal(dicom.pixels(Plane(path)), values >> (bits - 8))


@quick
@given(
    depth=st.integers(8, 16), count=st.integers(2, 4096), first=st.integers(0, 300), down=st.booleans(), packed=st.booleans(),
    voi=st.booleans(), seed=seeds,
)  # fmt: skip
def test_tables_of_any_depth_direction_and_length_span_their_depth(
    tmp_path, depth, count, first, down, packed, voi, seed
):
    if packed:
        depth = 8
    entries = np.rint(np.linspace(0, 2**depth - 1, count)).astype(int)[:: -1 if down else 1]
    values = scene(seed, 0, 4095)
    name = "VOILUTSequence" if voi else "ModalityLUTSequence"
    path = write.dicom(
        tmp_path / "a.dcm",
        values,
        BitsStored=12,
        HighBit=11,
        **{name: Sequence([table(entries, first, depth, packed)])},
    )
    found = entries[(values.astype(int) - first).clip(0, count - 1)]
    shown = dicom.pixels(Plane(path))
    np.testing.assert_array_equal(shown, found >> (depth - 8))


@pytest.mark.parametrize("vr", ["SS", "US"])
@pytest.mark.parametrize("modality", [False, True])
def test_the_first_input_of_a_table_is_signed_where_its_inputs_are(tmp_path, vr, modality):
    values = scene(9, -1000, 1000, np.int16)
    entries = np.linspace(4095, 0, 2048).astype(int)
    made = Dataset()
    made.add_new("LUTDescriptor", vr, [2048, -1024 if vr == "SS" else 65536 - 1024, 12])
    made.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    name = "ModalityLUTSequence" if modality else "VOILUTSequence"
    path = write.dicom(tmp_path / "a.dcm", values, **{name: Sequence([made])})
    np.testing.assert_array_equal(dicom.pixels(Plane(path)), entries[values.astype(int) + 1024] >> 4)


def test_a_table_of_interest_after_a_negative_intercept_takes_signed_inputs(tmp_path):
    values = scene(10, 0, 2000)
    made = Dataset()
    made.add_new("LUTDescriptor", "US", [2048, 65536 - 1024, 12])
    made.add_new("LUTData", "OW", np.arange(0, 4096, 2).astype("<u2").tobytes())
    path = write.dicom(
        tmp_path / "a.dcm", values, RescaleSlope=1, RescaleIntercept=-1024, VOILUTSequence=Sequence([made])
    )
    np.testing.assert_array_equal(dicom.pixels(Plane(path)), (2 * values) >> 4)


@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize(("said", "held"), [(16, 12), (12, 16), (16, 8), (0, 12)])
def test_a_table_whose_descriptor_is_wrong_about_its_depth_spans_what_it_holds(tmp_path, said, held, vr):
    entries = np.linspace(0, 2**held - 1, 256).astype(np.uint16)
    made = item(LUTDescriptor=[256, 0, said])
    made.add_new("LUTData", vr, entries.tolist() if vr == "US" else entries.tobytes())
    path = write.dicom(tmp_path / "a.dcm", scene(0, 0, 255), VOILUTSequence=Sequence([made]))
    shown = dicom.pixels(Plane(path))
    assert shown.max() == 255
    assert shown.min() == 0


EMPTY = {
    "no values": {"WindowCenter": None, "WindowWidth": None},
    "centre alone": {"WindowCenter": 40},
    "width alone": {"WindowWidth": 40},
    "width 0": {"WindowCenter": 40, "WindowWidth": 0},
    "negative width": {"WindowCenter": 40, "WindowWidth": -300},
    "empty sequence": {"VOILUTSequence": Sequence([])},
    "empty modality sequence": {"ModalityLUTSequence": Sequence([])},
    "item without anything": {"VOILUTSequence": Sequence([Dataset()])},
    "item without data": {"VOILUTSequence": Sequence([item(LUTDescriptor=[256, 0, 16])])},
    "table of zeros": {"VOILUTSequence": Sequence([table(np.zeros(256, int), 0, 16, False)])},
    "empty rescale": {"RescaleSlope": None, "RescaleIntercept": None},
    "slope 0": {"RescaleSlope": 0, "RescaleIntercept": None},
    "identity": {"RescaleSlope": 1, "RescaleIntercept": 0},
    "empty padding": {"PixelPaddingValue": None},
    "empty shape": {"PresentationLUTShape": None},
}


@pytest.mark.parametrize("names", list(itertools.combinations(EMPTY, 2))[::4] + [(name,) for name in EMPTY])
def test_tags_that_say_nothing_change_nothing(tmp_path, names):
    values = scene(1, 0, 4095)
    elements = {key: value for name in names for key, value in EMPTY[name].items()}
    both = {"BitsStored": 12, "HighBit": 11}
    plain = write.dicom(tmp_path / "plain.dcm", values, **both)
    if {"centre alone", "width alone"} <= set(names):
        return
    path = write.dicom(tmp_path / "a.dcm", values, **both, **elements)
    np.testing.assert_array_equal(decode(path, 12), decode(plain, 12))


@pytest.mark.parametrize(
    ("centre", "width", "function", "expected"),
    [
        ([40, 300], [400, 1500], "LINEAR", (40 - 200, 40 + 199)),
        (40, 400, "LINEAR_EXACT", (-160, 240)),
        (40, 400, None, (40 - 200, 40 + 199)),
        (0.5, 0.5, "LINEAR", (0.25, 0.75)),
    ],
)
def test_windows_are_those_of_the_standard(tmp_path, centre, width, function, expected):
    values = scene(2, 0, 4095)
    path = write.dicom(
        tmp_path / "a.dcm", values, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=centre, WindowWidth=width,
        VOILUTFunction=function,
    )  # fmt: skip
    np.testing.assert_array_equal(dicom.pixels(Plane(path)), ramp(values.astype(int) - 1024, *expected))


def test_a_sigmoid_window_rises_smoothly_through_its_centre(tmp_path):
    values = np.arange(SHAPE[0] * SHAPE[1], dtype=np.uint16).reshape(SHAPE) * 20
    path = write.dicom(
        tmp_path / "a.dcm", values, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="SIGMOID"
    )
    expected = np.rint(255 / (1 + np.exp(-4 * (values - 2000.0) / 1000)))
    np.testing.assert_array_equal(dicom.pixels(Plane(path)), expected)


def enhanced(path, frames, shared=None, per_frame=(), **elements):
    data = {"SharedFunctionalGroupsSequence": Sequence([item(**(shared or {}))])}
    data["PerFrameFunctionalGroupsSequence"] = Sequence([item(**each) for each in per_frame])
    return write.dicom(path, frames, BitsStored=12, HighBit=11, **data, **elements)


def rescale(slope, intercept):
    return {
        "PixelValueTransformationSequence": Sequence([item(RescaleSlope=slope, RescaleIntercept=intercept)])
    }


def window(centre, width):
    return {"FrameVOILUTSequence": Sequence([item(WindowCenter=centre, WindowWidth=width)])}


@quick
@given(
    seed=seeds,
    own=st.booleans(),
    slope=st.sampled_from([1, 2.5]),
    intercept=st.integers(-1024, 0),
    empty=st.booleans(),
)
def test_a_frame_of_an_enhanced_object_is_as_the_classic_slice(tmp_path, seed, own, slope, intercept, empty):
    frames = np.stack([scene(seed + k, 0, 4095) for k in range(2)])
    both = {**rescale(slope, intercept), **window(40, 400)}
    # A frame's own groups go before shared ones, unless they hold nothing.
    nothing = {**rescale(None, None), **window(None, None)}
    shared, per_frame = (
        ({**rescale(9, 9), **window(1, 2)}, [both, both]) if own else (both, [nothing if empty else {}] * 2)
    )
    path = enhanced(tmp_path / "enhanced.dcm", frames, shared, per_frame)
    classic = write.dicom(
        tmp_path / "classic.dcm", frames[1], BitsStored=12, HighBit=11, RescaleSlope=slope, RescaleIntercept=intercept,
        WindowCenter=40, WindowWidth=400,
    )  # fmt: skip
    for asked in (None, Window(-160, 240)):
        found, expected = (
            dicom.pixels(Plane(file, index, window=asked)) for file, index in ((path, 1), (classic, None))
        )
        np.testing.assert_array_equal(found, expected)


@quick
@given(signed=st.booleans(), limit=st.booleans(), monochrome=st.sampled_from([1, 2]), seed=seeds)
def test_padding_is_part_of_no_range_and_black(tmp_path, signed, limit, monochrome, seed):
    values = scene(seed, 100, 1000, np.int16 if signed else np.uint16)
    padded = values.copy()
    mark = -2000 if signed else 63000
    padded[:4] = mark
    if limit:
        padded[0] = mark + 5
    more = {"PixelPaddingRangeLimit": mark + 10} if limit else {}
    kind = {"PhotometricInterpretation": f"MONOCHROME{monochrome}"}
    with_padding = write.dicom(tmp_path / "p.dcm", padded, PixelPaddingValue=mark, **more, **kind)
    without = write.dicom(tmp_path / "w.dcm", np.tile(values[4:], (2, 1)), **kind)
    shown = dicom.pixels(Plane(with_padding))
    assert (shown[:4] == 0).all()
    np.testing.assert_array_equal(shown[4:], dicom.pixels(Plane(without))[:8])


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME1", None, True),
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "LIN OD", False),
    ],
)
def test_the_presentation_shape_inverts_once(tmp_path, photometric, shape, inverted):
    values = scene(3, 0, 255, np.uint8)
    path = write.dicom(
        tmp_path / "a.dcm", values, PhotometricInterpretation=photometric, PresentationLUTShape=shape
    )
    np.testing.assert_array_equal(dicom.pixels(Plane(path)), 255 - values if inverted else values)


@pytest.mark.parametrize(
    ("photometric", "samples"), [("YBR_PARTIAL_420", 3), ("HSV", 3), ("ARGB", 3), ("CMYK", 3), ("", 1)]
)
def test_an_unknown_photometric_interpretation_is_refused_by_name(tmp_path, photometric, samples):
    values = np.zeros((8, 8, 3) if samples == 3 else (8, 8), np.uint8)
    path = write.dicom(
        tmp_path / "a.dcm", values, SamplesPerPixel=samples, PhotometricInterpretation=photometric
    )
    with pytest.raises(UserError, match=rf"a\.dcm: photometric interpretation {photometric or '.none.'}"):
        decode(path, 8)


@pytest.mark.parametrize("full", [False, True])
def test_ultrasound_in_ybr_becomes_rgb(tmp_path, full):
    grey = scene(4, 0, 255, np.uint8)
    colour = np.stack([grey, np.full_like(grey, 128), np.full_like(grey, 128)], -1)
    path = write.dicom(
        tmp_path / "a.dcm", colour, SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL" if full else "RGB"
    )
    shown = dicom.pixels(Plane(path))
    np.testing.assert_array_equal(shown, np.repeat(grey[..., None], 3, -1) if full else colour)


@pytest.mark.parametrize(("bits", "shift"), [(8, 0), (16, 8)])
def test_a_palette_spans_what_its_tables_hold(tmp_path, bits, shift):
    values = scene(5, 0, 255, np.uint8)
    entries = np.linspace(0, 2**bits - 1, 256).astype("<u2")
    elements = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        elements[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    shown = dicom.pixels(Plane(write.dicom(tmp_path / "a.dcm", values, **elements)))
    np.testing.assert_array_equal(shown[..., 0], entries[values] >> shift)


def test_series_of_one_modality_and_unit_share_a_range_of_rescaled_values(tmp_path):
    # PET: every slice has a slope of its own; the same activity has to be the same grey.
    activity = [scene(seed, 0, 1000).astype(float) for seed in range(3)]
    files = []
    for number, (values, slope) in enumerate(zip(activity, (0.5, 1.5, 4.0), strict=True)):
        stored = np.rint(values / slope).astype(np.uint16)
        files.append(
            write.dicom(
                tmp_path / f"{number}.dcm", stored, RescaleSlope=slope, RescaleIntercept=0, Modality="PT", Units="BQML",
                BitsStored=15, HighBit=14,
            )
        )  # fmt: skip
    store = ImageStore.from_files(files, 12, crop=12)
    (used,) = set(store.ranges())
    for index, values in enumerate(activity):
        expected = ramp(values, used.low, used.high)[:, 2:14]
        assert np.abs(store[index][..., 0].astype(int) - expected).max() <= 1 + 2 * 255 / 1000


def test_overlays_in_unused_bits_are_left_out(tmp_path):
    values = scene(6, 0, 4095)
    path = write.dicom(tmp_path / "a.dcm", values | 0x8000, BitsStored=12, HighBit=11)
    data = pydicom.dcmread(path)
    data.add_new(0x60000100, "US", 16)
    data.add_new(0x60000102, "US", 15)
    data.save_as(path)
    np.testing.assert_array_equal(dicom.pixels(Plane(path)), values >> 4)


@pytest.mark.parametrize("high", [12, 15])
@pytest.mark.parametrize("syntax", ["native", "run lengths"])
@pytest.mark.parametrize("signed", [False, True])
def test_values_in_the_upper_bits_are_the_same_picture_as_in_the_lower_ones(tmp_path, high, syntax, signed):
    values = scene(6, 0, 4095).astype(np.int16) - 2048 * signed
    values = values if signed else values.astype(np.uint16)
    options = {"BitsStored": 12, "WindowCenter": 500, "WindowWidth": 3000}
    lower = write.dicom(tmp_path / "lower.dcm", values, HighBit=11, **options)
    upper = write.dicom(tmp_path / "upper.dcm", values << (high - 11), HighBit=high, **options)
    if syntax == "run lengths":
        data = pydicom.dcmread(upper)
        data.compress(pydicom.uid.RLELossless)
        data.save_as(upper)
    np.testing.assert_array_equal(dicom.values(Plane(upper)), values)
    np.testing.assert_array_equal(dicom.pixels(Plane(upper)), dicom.pixels(Plane(lower)))


@pytest.mark.parametrize(("bits", "high"), [(12, 15), (12, 7), (12, 17)])
def test_a_high_bit_that_contradicts_the_values_is_refused_with_both_numbers(tmp_path, bits, high):
    path = write.dicom(tmp_path / "a.dcm", scene(6, 0, 4095), BitsStored=bits, HighBit=high)
    with pytest.raises(
        UserError, match=rf"a\.dcm: BitsStored {bits} with HighBit {high}: .*expected HighBit 11"
    ):
        dicom.pixels(Plane(path))


# --- PNG, TIFF, PGM, arrays


@quick
@given(
    bits=st.sampled_from(intensity.DEPTHS), suffix=st.sampled_from(["png", "tif", "npy"]), seed=seeds,
    spoilt=st.sampled_from(["no", "hot", "marker"]), order=st.permutations(range(4)),
)  # fmt: skip
def test_a_series_has_one_scale_whatever_one_file_of_it_holds(tmp_path, bits, suffix, seed, spoilt, order):
    top = 2**bits - 1
    series = [scene(seed + k, 0, top // (20 if k == 3 else 1)) for k in range(4)]
    clean = [values >> (bits - 8) for values in series]
    if spoilt != "no" and bits < 15:
        series[0][:2, : 2 if spoilt == "hot" else 9] = 65535
    paths = []
    for k, values in enumerate(series):
        path = tmp_path / f"{k}.{suffix}"
        np.save(path, values) if suffix == "npy" else Image.fromarray(values).save(path)
        paths.append(path)
    store = ImageStore.from_files([paths[k] for k in order], 12, crop=12)
    for place, k in enumerate(order):
        good = (series[k] == 65535) <= (bits == 16)
        found = store[place][..., 0]
        np.testing.assert_array_equal(found[good[:, 2:14]], clean[k][:, 2:14][good[:, 2:14]])
    assert len(set(store.ranges())) == 1


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("suffix", ["png", "tif", "zlib.tif", "la.png"])
def test_colour_and_grey_with_alpha_of_16_bits_keep_12_bit_values(tmp_path, bits, suffix):
    values = RNG.integers(0, 2**bits, (*SHAPE, 3)).astype(np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "png":
        png_16_bit_colour(path, values)
    elif suffix == "la.png":
        values[..., 1] = 65535
        write.png_16_bits(path, values[..., :2])
    else:
        import tifffile

        tifffile.imwrite(path, values, photometric="rgb", compression="zlib" if "zlib" in suffix else None)
    found = formats.samples(path).values
    np.testing.assert_array_equal(found, values[..., 0] if suffix == "la.png" else values)
    expected = (values[..., :1] if suffix == "la.png" else values) >> (bits - 8)
    assert (decode(path, 12, crop=12) == expected[:, 2:14]).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiff_with_white_at_zero_is_inverted_at_every_depth(tmp_path, dtype):
    import tifffile

    values = scene(7, 0, 255, np.uint16)
    values = (values / 255).astype(dtype) if dtype == np.float32 else values.astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
    tifffile.imwrite(tmp_path / "b.tif", values, photometric="minisblack")
    np.testing.assert_array_equal(
        decode(tmp_path / "a.tif", 12, crop=12), 255 - decode(tmp_path / "b.tif", 12, crop=12)
    )


def test_a_grey_map_spans_the_greatest_value_of_its_header(tmp_path):
    values = scene(8, 0, 1000)
    (tmp_path / "a.pgm").write_bytes(b"P5 16 12 1023\n" + values.astype(">u2").tobytes())
    assert (
        np.abs(pixels.samples(Plane(tmp_path / "a.pgm")).shown()[0].astype(int) - ramp(values, 0, 1023)).max()
        <= 1
    )


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.0, 4000.0), (0.0, 0.003)])
def test_float_stacks_are_scaled_together(tmp_path, low, high):
    stacks = [
        np.linspace(low, low + (high - low) * share, 3 * 12 * 16).reshape(3, 12, 16) for share in (1, 0.5)
    ]
    for number, stack in enumerate(stacks):
        np.save(tmp_path / f"{number}.npy", stack.astype(np.float32))
    store = ImageStore.from_files(
        [Plane(tmp_path / f"{n}.npy", k) for n in range(2) for k in range(3)], 12, crop=12
    )
    (used,) = set(store.ranges())
    assert store[2].max() > 250
    for place, (n, k) in enumerate(itertools.product(range(2), range(3))):
        np.testing.assert_array_equal(
            store[place][..., 0], ramp(stacks[n][k].astype(np.float32), used.low, used.high)[:, 2:14]
        )


# --- the set


def test_the_range_is_the_sets_own_in_any_order_and_with_any_number_of_threads(tmp_path, monkeypatch):
    files = [tmp_path / f"{k}.npy" for k in range(9)]
    for k, path in enumerate(files):
        np.save(path, RNG.normal(k, 1, SHAPE))
    found = set()
    for workers, order in ((1, files), (3, files[::-1]), (8, files[4:] + files[:4])):
        monkeypatch.setattr("os.cpu_count", lambda workers=workers: workers)
        store = ImageStore.from_files(order, 12)
        store[workers]
        found |= {(used.low, used.high) for used in store.ranges()}
    assert len(found) == 1
    other = ImageStore.from_files(files[:3], 12)
    assert {(used.low, used.high) for used in other.ranges()} != found
    # A part of a set that was read keeps the scale of that set.
    assert set(store.take([0, 1]).ranges()) == set(store.ranges())
    assert store.take([0]).digest() != ImageStore.from_files(files[4:5], 12).digest()


def test_sets_whose_scales_differ_are_named_with_the_way_out(tmp_path):
    def set_of(name, top):
        files = [tmp_path / f"{name}{k}.png" for k in range(2)]
        for path in files:
            Image.fromarray(scene(0, 0, top)).save(path)
        store = ImageStore.from_files(files, 12)
        return intensity.summary(store.ranges(), store.names)

    two = {"development": set_of("d", 4095), "external": set_of("e", 16383)}
    (said,) = intensity.disagreements(two)
    for word in (
        "development has black 0, white 4095",
        "external has black 0, white 16383",
        "window='LOW,HIGH'",
    ):
        assert word in said
    assert not intensity.disagreements({"development": two["development"], "test": set_of("t", 4000)})


def test_window_set_goes_before_the_files_own_windows(tmp_path):
    values = [scene(k, 0, 4000) for k in range(2)]
    files = [
        write.dicom(tmp_path / f"{k}.dcm", values[k], WindowCenter=100 * (k + 1), WindowWidth=50)
        for k in range(2)
    ]
    store = ImageStore.from_files([Plane(path, window=Window.parse("set")) for path in files], 12, crop=12)
    np.testing.assert_array_equal(store[0][..., 0], values[0][:, 2:14] >> 4)


@pytest.mark.parametrize("form", ["L", "RGB", "RGBA", "LA", "P", "dicom", "palette"])
def test_a_window_applies_alike_however_the_same_grey_is_stored(tmp_path, form):
    """Radiographs of one set come as grey, as RGB with equal channels, with alpha or with a palette."""
    values = scene(6, 0, 255, np.uint8)
    path, elements = tmp_path / "a.dcm", {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        elements[f"{name}PaletteColorLookupTableData"] = np.arange(256).astype("<u2").tobytes()
    if form == "dicom":
        write.dicom(path, np.repeat(values[..., None], 3, -1), SamplesPerPixel=3)
    elif form == "palette":
        write.dicom(path, values, **elements)
    else:
        picture, path = Image.fromarray(values), tmp_path / "a.png"
        picture.convert("L" if form == "P" else form).save(path)
        if form == "P":
            picture.putpalette([level for level in range(256) for _ in range(3)])
            picture.save(path)
    write.image(tmp_path / "grey.png", values)
    window = Window.parse("50,200")
    shown = [decode(Plane(file, window=window), 12, crop=12) for file in (path, tmp_path / "grey.png")]
    np.testing.assert_array_equal(shown[0][..., 0], ramp(values, 50, 200)[:, 2:14])
    np.testing.assert_array_equal(*shown)
    assert (decode(Plane(path, window=Window.parse("5%,60%")), 12, crop=12) == 255).mean() > 0.3


@settings(max_examples=60, deadline=None)
@given(
    background=st.floats(0.5, 0.9995), value=st.sampled_from([0.0, -1024.0, -3.5, 40.0]), seed=seeds,
    kind=st.sampled_from([np.float32, np.int16]),
)  # fmt: skip
def test_the_background_never_sets_the_range(background, value, seed, kind):
    rng = np.random.default_rng(seed)
    foreground = rng.integers(100, 900, max(int(20_000 * (1 - background)), 10))
    values = np.concatenate([foreground, np.full(20_000 - len(foreground), value)]).astype(kind)
    low, high = intensity.foreground_span(values, intensity.PERCENTILES)
    assert high >= np.percentile(foreground, 98)
    assert low <= np.percentile(foreground, 2)
    assert low > np.percentile(foreground, 1) - (high - low) / 8
    shown = Range(low, high, "").apply(values)
    assert len(np.unique(shown)) >= 0.8 * len(np.unique(np.rint(ramp(values, low, high))))
    assert len(np.unique(shown)) > min(5, len(np.unique(foreground)) / 2)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, scale=st.floats(1e-6, 1e6), share=st.integers(0, 98))
def test_binned_percentiles_are_those_of_numpy(seed, scale, share):
    values = np.random.default_rng(seed).normal(0, scale, 3000).astype(np.float32)
    counted = Statistics()
    for part in np.array_split(values, 7):
        other = Statistics()
        other.add(part)
        counted.merge(other)
    found = counted.range("all", depth=False, window=Window(share, share + 2, percent=True))
    low, high = np.percentile(values, (share, share + 2), method="lower")
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-3)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(
        [np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.int64, np.float32, np.float64, bool]
    ),
    st.lists(st.floats(width=32), min_size=4, max_size=4),
)
def test_numbers_of_every_type_become_grey_without_a_warning(dtype, numbers):
    with np.errstate(all="ignore"):
        values = np.array(numbers).astype(dtype).reshape(2, 2)
    shown, used = intensity.integers_or_floats(values, "x").shown()
    assert shown.dtype == np.uint8
    assert shown.shape == values.shape
    assert np.isfinite([used.low, used.high]).all()
    finite = np.isfinite(values)
    order = np.argsort(values[finite], kind="stable")
    assert (np.diff(shown[finite][order].astype(int)) >= 0).all()


def test_nothing_finite_is_black_also_where_the_least_is_white():
    values = np.array([[np.nan, np.inf], [0.0, 1.0]])
    shown, _ = Samples(values, Range(0, 1, ""), inverted=True).shown()
    assert shown.tolist() == [[0, 0], [255, 0]]
