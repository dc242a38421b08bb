"""Damaged and hostile files: one line that can be skipped, bounded memory, no link followed, no other program."""

import contextlib
import gzip
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit

from benchmarks import fuzz_images, fuzz_readers
from dapt_jax.data import arrays, dicom, formats, frames, hdf5_trial, limits, masks, nifti, pixels
from dapt_jax.data.decode import decode
from dapt_jax.data.manifest import load_manifest
from dapt_jax.data.plane import Plane
from dapt_jax.errors import UserError
from tests import medical_files as write
from tests.conftest import SHARED_DATA

pytestmark = pytest.mark.long

HOSTILE = SHARED_DATA.parent / "cases" / "hostile_images"
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.fixture
def small_limit():
    limits.set_decoded_bytes(1 << 20)
    yield
    limits.set_decoded_bytes(limits.DECODED_BYTES)


def line_of(source) -> str:
    with pytest.raises(UserError) as caught:
        decode(source, 8)
    line = str(caught.value)
    assert line.isprintable()
    assert str(source.path if isinstance(source, Plane) else source) in line
    return line


@pytest.mark.skipif(not HOSTILE.is_dir(), reason=f"no folder of hostile images at {HOSTILE}")
@pytest.mark.parametrize("path", sorted(HOSTILE.glob("*")), ids=lambda path: path.name)
def test_every_hostile_image_is_one_line(path):
    line_of(
        Plane(path, None if path.suffix in (".h5", ".png") else 0, key="a" if path.suffix == ".h5" else "")
    )


def test_mutated_files_of_every_image_format_are_read_or_one_line():
    """A short run of `python -m benchmarks.fuzz_readers --kind=images`."""
    outcomes, findings = fuzz_readers.fuzz("images", list(fuzz_images.SUFFIXES), 10, seed=7)
    assert not findings
    assert all(each.refused + each.read == 10 for each in outcomes.values())


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("deep\ndown"), AssertionError(), SystemError("\x1b[31m")]
)
@pytest.mark.parametrize("module", ["pixels", "dicom", "nifti", "arrays"])
def test_whatever_a_decoder_raises_is_one_line_that_can_be_skipped(tmp_path, monkeypatch, error, module):
    def fail(*_, **__):
        raise error

    names = {"pixels": "bad.png", "dicom": "bad.dcm", "nifti": "bad.nii", "arrays": "bad.npy"}
    bad = tmp_path / names[module]
    write.image(tmp_path / "good.bmp", GREY)
    if module == "pixels":
        write.image(bad, GREY)
        real = Image.open
        monkeypatch.setattr(
            Image, "open", lambda file, **k: fail() if Path(file.name).name == "bad.png" else real(file, **k)
        )
    elif module == "dicom":
        write.dicom(bad, GREY)
        monkeypatch.setattr("pydicom.pixels.pixel_array", fail)
    elif module == "nifti":
        write.nifti(bad, np.zeros((4, 4, 1), np.float32))
        monkeypatch.setattr("nibabel.load", fail)
    else:
        np.save(bad, GREY)
        monkeypatch.setattr("numpy.load", fail)
    index = "[0]" if module == "nifti" else ""
    (tmp_path / "manifest.csv").write_text(f"image,label\ngood.bmp,x\n{bad.name}{index},x\n")
    with pytest.raises(UserError, match=rf"1 of 2 images .*row 3: .*{bad.name}: .*cannot be read") as caught:
        load_manifest(tmp_path / "manifest.csv", image_size=8)
    assert str(caught.value).isprintable()
    assert load_manifest(tmp_path / "manifest.csv", image_size=8, on_bad_image="skip").skipped == 1


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a", "a.eps"])
def test_postscript_under_any_name_starts_no_program(tmp_path, monkeypatch, name):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / name
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n")
    assert "not an image that Pillow reads; expected PNG" in line_of(path)


def test_only_documented_formats_are_opened_whatever_their_name(tmp_path):
    documented = {"PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM"}
    assert set(pixels.FORMATS) == documented
    Image.init()
    for kind in ("TGA", "SGI", "PCX", "ICO", "DDS", "JPEG2000", "PDF"):
        path = tmp_path / f"{kind}.png"
        Image.fromarray(np.dstack([GREY] * 3)).save(path, format=kind)
        assert "not an image that Pillow reads" in line_of(path)


def test_a_mask_in_colour_takes_a_few_bytes_for_each_value(tmp_path):
    """Of a JPEG of 1 kB with 2,313 x 1,799 pixels it took 153 MB, for a limit of 64."""
    path = tmp_path / "mask.jpg"
    Image.fromarray(np.zeros((1000, 1000, 3), np.uint8)).save(path)
    tracemalloc.start()
    with contextlib.suppress(UserError):
        masks.read(Plane(path))
    assert tracemalloc.get_traced_memory()[1] < 6 * 3_000_000
    tracemalloc.stop()


# --- HDF5


def test_no_link_leads_out_of_an_hdf5_file(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["image"] = GREY
    (tmp_path / "secret.bin").write_bytes(bytes(256))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["outside"] = h5py.ExternalLink("other.h5", "/image")
        file["soft"] = h5py.SoftLink("/good")
        file["good"] = GREY
        file.create_dataset("raw", (16, 16), "u1", external=[(str(tmp_path / "secret.bin"), 0, 256)])
        layout = h5py.VirtualLayout((16, 16), "u1")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "image", (16, 16))
        file.create_virtual_dataset("virtual", layout)
    for key in ("outside", "soft"):
        assert f"no array {key!r}" in line_of(Plane(tmp_path / "a.h5", key=key))
    for key in ("raw", "virtual"):
        assert "kept in another file" in line_of(Plane(tmp_path / "a.h5", key=key))
    np.testing.assert_array_equal(arrays.values(Plane(tmp_path / "a.h5", key="good")), GREY)


def test_a_chunk_that_unpacks_to_more_than_the_limit_is_refused_before(tmp_path, small_limit):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        chunked = {"compression": "gzip", "compression_opts": 9}
        file.create_dataset("chunk", (8, 8), "u1", maxshape=(None, None), chunks=(4096, 4096), **chunked)[
            :
        ] = 1
        made = file.create_dataset("lies", (16, 16), "u1", chunks=(16, 16), **chunked)
        made.id.write_direct_chunk((0, 0), zlib.compress(bytes(64 << 20), 9))
    assert "a chunk of chunk takes" in line_of(Plane(tmp_path / "a.h5", key="chunk"))
    assert "unpacks to more than its 256 bytes" in line_of(Plane(tmp_path / "a.h5", key="lies"))


def test_a_png_that_claims_a_chunk_of_a_gigabyte_takes_no_more_than_it_has(tmp_path):
    write.image(tmp_path / "a.png", GREY)
    data = (tmp_path / "a.png").read_bytes()
    at = data.index(b"IDAT")
    (tmp_path / "a.png").write_bytes(data[: at - 4] + (1 << 30).to_bytes(4, "big") + data[at:])
    tracemalloc.start()
    with contextlib.suppress(UserError):
        pixels.samples(Plane(tmp_path / "a.png"))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_the_list_of_chunks_that_a_small_hdf5_file_declares_is_counted_as_memory(tmp_path):
    """25 million chunks without content: the library takes 2 to 4 kB for each, 60 GB in all."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("one", (5000, 5000), "u1", chunks=(1, 1))
        file.create_dataset("stack", (3, 5000, 5000), "u1", chunks=(1, 1, 1))
        file.create_dataset("usual", (3000, 512, 512), "u1", chunks=(1, 64, 64))
    assert (tmp_path / "a.h5").stat().st_size < 10_000
    assert "takes 95.8 GiB to read" in line_of(Plane(tmp_path / "a.h5", key="one"))
    assert "takes 95.8 GiB to read" in line_of(Plane(tmp_path / "a.h5", 1, key="stack"))
    with pytest.raises(UserError, match="the limit for decoded data"):
        arrays.scalar(tmp_path / "a.h5", "one")
    assert arrays.values(Plane(tmp_path / "a.h5", 2999, key="usual")).shape == (512, 512)


def test_a_chunk_that_claims_more_than_its_file_is_refused_before_it_is_allocated(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "a", data=np.arange(64, dtype="u2").reshape(8, 8), chunks=(8, 8), compression="gzip"
        )
        stored = file["a"].id.get_chunk_info(0).size
    whole = bytearray(path.read_bytes())
    entry = whole.index(b"TREE\x01") + 24  # the first of the list of chunks
    assert whole[entry : entry + 4] == struct.pack("<I", stored)
    whole[entry : entry + 4] = struct.pack("<I", 0x7F000000)
    path.write_bytes(whole)
    tracemalloc.start()
    assert "claim 2,130,706,432 bytes of a file of" in line_of(Plane(path, key="a"))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_a_file_on_which_the_library_hangs_is_refused_and_the_next_one_read(tmp_path, monkeypatch):
    for name in ("hangs", "good"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["image"] = GREY
    hdf5_trial._close()
    monkeypatch.setattr(hdf5_trial, "_START_SECONDS", 0)
    slow = (
        "import time; real = hdf5_trial._walk; "
        "hdf5_trial._walk = lambda p: time.sleep(60) if 'hangs' in str(p) else real(p); "
    )
    monkeypatch.setattr(
        hdf5_trial, "_CODE", hdf5_trial._CODE.replace("hdf5_trial.serve", slow + "hdf5_trial.serve")
    )
    assert "does not come to an end" in line_of(Plane(tmp_path / "hangs.h5", key="image"))
    np.testing.assert_array_equal(arrays.values(Plane(tmp_path / "good.h5", key="image")), GREY)
    hdf5_trial._close()


# --- the limit


def bomb_nifti(path, shape, dtype=np.int16):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header["dim"][:4] = (3, *shape)
    header["pixdim"][:4] = 1
    header["sform_code"], header["vox_offset"] = 1, 352
    header["srow_x"][0] = header["srow_y"][1] = header["srow_z"][2] = 1
    data = header.binaryblock + bytes(4)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def deflated(path, content: bytes) -> Path:
    write.dicom(path, GREY)
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(path)
    raw = path.read_bytes()
    start = 144 + int.from_bytes(raw[140:144], "little")
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    path.write_bytes(raw[:start] + packer.compress(content) + packer.flush())
    return path


def png_header(path, width, height) -> Path:
    write.image(path, GREY)
    raw = bytearray(path.read_bytes())
    raw[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    path.write_bytes(raw)
    return path


BOMBS = {
    "square.png": lambda path: png_header(path, 9000, 9000),
    "wide.png": lambda path: png_header(path, 1 << 20, 1),
    "a.npy": lambda path: np.lib.format.open_memmap(path, "w+", np.float64, (2000, 2000)),
    "a.h5": lambda path: h5py.File(path, "w").create_dataset(
        "image", (1 << 20, 1 << 20), "u1", chunks=(64, 64)
    ),
    "a.nii": lambda path: bomb_nifti(path, (3000, 3000, 1)),
    "a.nii.gz": lambda path: bomb_nifti(path, (300, 300, 300)),
    "a.dcm": lambda path: write.dicom(path, GREY, Rows=60000, Columns=60000),
    "deflated.dcm": lambda path: deflated(path, bytes(8 << 20)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_takes_more_than_the_limit_is_refused_before_it_is_decoded(tmp_path, small_limit, name):
    path = tmp_path / name
    made = BOMBS[name](path)
    if isinstance(made, h5py.Dataset):
        made.file.close()
    source = Plane(path, 0 if ".nii" in name else None, key="image" if name == "a.h5" else "")
    line = line_of(source)
    assert "takes" in line
    assert "GiB to read, and the limit for decoded data is 0.000977 GiB" in line


def tiff_of_pages(path, count):
    page = b"".join(
        struct.pack("<HHII", *entry)
        for entry in (
            (256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
            (277, 3, 1, 1), (278, 4, 1, 16), (279, 4, 1, 256),
        )
    )  # fmt: skip
    size = 2 + len(page) + 4
    nexts = [8 + size * (number + 1) for number in range(count - 1)] + [0]
    path.write_bytes(
        struct.pack("<2sHI", b"II", 42, 8)
        + b"".join(b"\t\0" + page + struct.pack("<I", each) for each in nexts)
    )


def test_a_file_of_countless_pages_or_frames_is_refused_without_counting_them(tmp_path):
    tiff_of_pages(tmp_path / "a.tif", 60_000)
    grey = Image.fromarray(GREY)
    grey.save(tmp_path / "b.gif")
    one = (tmp_path / "b.gif").read_bytes()
    start = one.index(b",", 13 + 3 * 256)
    (tmp_path / "b.gif").write_bytes(one[:start] + one[start:-1] * 20_000 + b";")
    for name in ("a.tif", "b.gif"):
        assert "more than 10,000 pages or frames" in line_of(Plane(tmp_path / name, 0))


def test_a_jpeg_of_countless_scans_is_refused_and_one_of_usual_scans_read(tmp_path):
    Image.fromarray(np.dstack([GREY] * 3)).save(tmp_path / "good.jpg", progressive=True)
    assert decode(tmp_path / "good.jpg", 8).shape == (8, 8, 3)
    good = (tmp_path / "good.jpg").read_bytes()
    start = good.index(b"\xff\xda")
    scan = good[start : good.index(b"\xff\xda", start + 2)]
    (tmp_path / "a.jpg").write_bytes(good[:start] + scan * 300 + good[start:])
    assert "a JPEG of more than 200 scans" in line_of(tmp_path / "a.jpg")


def test_the_size_of_a_png_is_checked_before_its_orientation_is_looked_for(tmp_path, small_limit):
    path = png_header(tmp_path / "a.png", 1, 80_000_000)
    with pytest.raises(UserError, match=r"takes .* GiB to read"):
        formats.extent(path)


@pytest.mark.parametrize("name", ["a\0b", "n" * 300])
@pytest.mark.parametrize("suffix", ["", ".png", ".dcm", ".nii", ".npy", ".h5", ".mat"])
def test_a_name_that_no_file_can_have_is_one_line_whatever_is_asked(tmp_path, name, suffix):
    source = Plane(tmp_path / f"{name}{suffix}", 0, key="x")
    for ask in (lambda each: decode(each, 8), masks.read, formats.extent):
        with pytest.raises(UserError):
            ask(source)


@pytest.mark.parametrize("header", [b"P5 #", b"P2\n1 1\n#", b"P6 1 " + b"\n#" * 40_000, b"P4 # "])
def test_a_header_of_endless_comments_is_refused(tmp_path, header):
    (tmp_path / "a.ppm").write_bytes(header + b"x" * (1 << 20))
    assert "header of more than 65,536 bytes" in line_of(tmp_path / "a.ppm")


def test_pages_and_frames_are_counted_as_pillow_counts_them(tmp_path):
    tiff_of_pages(tmp_path / "a.tif", 7)
    pictures = [Image.fromarray(np.roll(GREY, number)) for number in range(5)]
    for name in ("b.tif", "c.gif"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:])
    pictures[0].save(tmp_path / "d.tif", save_all=True, append_images=pictures[1:], big_tiff=True)
    for name, count in (("a.tif", 7), ("b.tif", 5), ("c.gif", 5), ("d.tif", 5)):
        with Image.open(tmp_path / name) as image, (tmp_path / name).open("rb") as file:
            assert image.n_frames == count
            assert (frames._frames if name == "c.gif" else frames._pages)(file) == count


def test_a_limit_too_low_to_read_anything_is_refused():
    with pytest.raises(UserError, match=r"a limit of 5 bytes"):
        limits.set_decoded_bytes(5)


def test_volumes_are_kept_only_as_far_as_the_limit_allows(tmp_path, small_limit):
    for number in range(6):
        write.nifti(tmp_path / f"{number}.nii", np.full((40, 40, 20), number, np.float32))
        assert nifti.values(Plane(tmp_path / f"{number}.nii", 0)).max() == number
    assert sum(volume.stored.nbytes for volume in nifti._volumes.values()) <= 1 << 19


def test_a_length_in_a_header_asks_for_no_more_memory_than_the_file_has(tmp_path):
    path = write.dicom(tmp_path / "a.dcm", GREY)
    raw = path.read_bytes()
    at = raw.index(b"\xe0\x7f\x10\x00OB")
    path.write_bytes(raw[: at + 8] + (0x7FFFFFF0).to_bytes(4, "little") + raw[at + 12 :])
    code = (
        "import resource, sys\nfrom pathlib import Path\nimport pydicom.pixels\nfrom dapt_jax.data import dicom\n"
        "from dapt_jax.data.plane import Plane\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    dicom.pixels(Plane(Path(sys.argv[1])))\nexcept Exception as error:\n    print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True, env=os.environ
    )
    *_, grown = said.stdout.split()
    assert int(grown) < 64
    assert not said.stderr


# --- damaged is not packed


def test_damaged_compressed_dicom_does_not_ask_for_a_package(tmp_path):
    path = write.dicom(tmp_path / "a.dcm", GREY)
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xe0 no JPEG at all \xff\xd9"])
    data["PixelData"].VR = "OB"
    data.save_as(path)
    assert "pip install" not in line_of(path)
    data.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
    data.save_as(path)
    assert "which no installed package unpacks; pip install" in line_of(path)
    assert dicom.extent(Plane(path)) == (16, 16)
    for syntax in (pydicom.uid.UID("1.2.840.10008.1.20"), pydicom.uid.MPEG2MPML):
        data.file_meta.TransferSyntaxUID = syntax
        data.save_as(path, implicit_vr=False, little_endian=True)
        assert f"no package unpacks images of transfer syntax {syntax.name}; export it" in line_of(path)


def test_a_folder_in_place_of_a_file_is_one_line(tmp_path):
    for suffix in (".png", ".dcm", ".nii", ".npy", ".h5"):
        (tmp_path / f"a{suffix}").mkdir()
        line_of(Plane(tmp_path / f"a{suffix}", key="x"))
        with pytest.raises(UserError):
            formats.extent(Plane(tmp_path / f"a{suffix}", key="x"))


@pytest.mark.parametrize("suffix", ["", ".png", ".dcm", ".nii", ".nii.gz", ".npy", ".h5", ".mat"])
def test_pipes_and_devices_under_any_name_are_one_line_at_once(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        source = Plane(tmp_path / f"{name}{suffix}", 0, key="x")
        assert "it is no file" in line_of(source)
        for ask in (formats.extent, formats.spacing, formats.geometry, masks.read):
            with pytest.raises(UserError, match="it is no file"):
                ask(source)


def test_a_header_of_npy_that_claims_to_be_long_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", GREY)
    raw = bytearray((tmp_path / "a.npy").read_bytes())
    raw[6], raw[8:12] = 2, (0x7FFFFFFF).to_bytes(4, "little")
    (tmp_path / "a.npy").write_bytes(raw)
    assert "a header of more than" in line_of(tmp_path / "a.npy")


def test_a_transfer_syntax_that_no_standard_names_is_unknown_rather_than_not_installed(tmp_path):
    path = write.dicom(tmp_path / "a.dcm", GREY, syntax="1.2.840.10008.9.9.9")
    assert "unknown transfer syntax 1.2.840.10008.9.9.9" in line_of(path)
