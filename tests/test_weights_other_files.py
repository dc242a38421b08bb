"""Files in several parts, files that are something else, and files made to take memory: read, or one line that says what."""

import io
import json
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.data import hdf5
from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.weights import archive, identity, readers, sharded, tables, unreadable
from dapt_jax.weights.merge import merge
from dapt_jax.weights.paths import flatten
from tests.torch_files import Named, tensor, write_zip

FLAT = {f"layer{n}.weight": np.full((2, 3), n, np.float32) for n in range(6)}
CASES = Path(__file__).resolve().parents[2] / "shared" / "cases" / "hostile_weights"


def refused(path: Path) -> str:
    """The one line for a file that cannot be read."""
    with pytest.raises(UserError) as caught:
        dict(readers.read(path))
    line = str(caught.value)
    assert line.startswith(str(path))
    assert "\n" not in line
    return line


# ---- shards
# -----------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, count: int, form: str = "safetensors") -> Path:
    """An index and its files, each array in one of them."""
    stem = "model" if form == "safetensors" else "pytorch_model"
    where = {key: f"{stem}-{n % count + 1:05}-of-{count:05}.{form}" for n, key in enumerate(FLAT)}
    for file in set(where.values()):
        part = {key: FLAT[key] for key in FLAT if where[key] == file}
        if form == "safetensors":
            safetensors.numpy.save_file(part, folder / file)
        else:
            write_zip(
                folder / file,
                {k: tensor(a, k) for k, a in part.items()},
                {k: a.tobytes() for k, a in part.items()},
            )
    index = folder / f"{stem}.{form}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 144}, "weight_map": where}))
    return index


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("count", [1, 3])
def test_shards_with_an_index_are_read_as_one(tmp_path: Path, form: str, count: int) -> None:
    index = write_shards(tmp_path, count, form)
    for path in (index, tmp_path):
        read = readers.read(path)
        assert list(read) == list(FLAT)
        for key, array in FLAT.items():
            np.testing.assert_array_equal(read[key], array)
    assert read.path == index
    before = identity.digest_all(index, read.files)
    part = read.files[-1]
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert identity.digest_all(index, read.files) != before


def test_one_shard_alone_names_the_index(tmp_path: Path) -> None:
    write_shards(tmp_path, 3)
    line = refused(tmp_path / "model-00002-of-00003.safetensors")
    assert "one of 3 parts; expected the path of model.safetensors.index.json, or of the folder" in line


def test_a_shard_that_is_missing_or_lacks_an_array_is_named(tmp_path: Path) -> None:
    index = write_shards(tmp_path, 2)
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "aside")
    assert "'model-00002-of-00002.safetensors', which it names, is not beside it" in refused(index)
    safetensors.numpy.save_file(
        {"other": np.ones(1, np.float32)}, tmp_path / "model-00002-of-00002.safetensors"
    )
    assert "'layer1.weight' is not in 'model-00002-of-00002.safetensors', where the index has it" in refused(
        index
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    name=st.text(max_size=20)
    | st.sampled_from(["../w.bin", "/etc/passwd", "a/../../b", "..", ".", "", "a\\b", "C:x", "a\0b"])
)
def test_an_index_names_no_file_outside_its_folder(tmp_path_factory, name: str) -> None:
    folder = tmp_path_factory.mktemp("index")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    try:
        files = set(sharded.shards(index).values())
    except UserError:
        return
    assert files == {name}
    assert (folder / name).parent == folder
    assert (folder / name).resolve().parent == folder.resolve()


NO_INDEX = [
    *("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "[" * 5000),
    '{"weight_map": {"a": "b", "a": "c"}}',
]


@pytest.mark.parametrize("text", NO_INDEX)
def test_an_index_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.index.json").write_text(text)
    assert "index of" in refused(tmp_path / "a.index.json")


# ---- what is something else
# -------------------------------------------------------------------------------------------


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        made.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 102530333\n"
OTHERS = {
    "model.safetensors": (
        LFS,
        "a pointer of Git LFS, not the file itself, which has 102,530,333 bytes: run git lfs pull",
    ),
    "resnet50.pth": (b"\n<!DOCTYPE html>\n<html><title>Sign in</title>", "a web page, not a file"),
    "w.pth": (b"\xef\xbb\xbf<html lang=en>", "a web page, not a file"),
    "w.npz": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a storage server's refusal"),
    "w.h5": (b"\x1f\x8b\x08" + bytes(20), "packed by gzip"),
    "old.pth": (tar(), "a tar archive"),
    "model.ckpt.index": (
        b"x" * 40 + bytes.fromhex("57fb808b247547db"),
        "a part of the TensorFlow checkpoint 'model.ckpt'",
    ),
    "model.ckpt-250228.data-00000-of-00001": (
        bytes(100),
        "a part of the TensorFlow checkpoint 'model.ckpt-250228'",
    ),
    "model.ckpt.meta": (b"\x0a\x10graph", "a part of the TensorFlow checkpoint 'model.ckpt'"),
    "saved_model.pb": (b"\x08\x01", "a part of the TensorFlow checkpoint"),
    "m.onnx": (b"\x08\x07\x12", "not an ONNX file (it ends inside a number)"),
    "flax_model.msgpack": (b"\x81\xa6params", "parameters of Flax"),
    "m.tflite": (b"\x1c\0\0\0TFL3", "a TensorFlow Lite model"),
    "m.npy": (b"\x93NUMPY\x01\0", "a single NumPy array"),
    "m.bin": (b"GGUF\x03\0\0\0", "a GGUF file"),
    "notes.json": (b"{}", "a text (.json)"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str) -> None:
    content, said = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    assert said in refused(tmp_path / name)


def test_folders_and_names_of_tensorflow_are_told(tmp_path: Path) -> None:
    for name in ("checkpoint", "model.ckpt-1.index", "model.ckpt-1.meta", "model.ckpt-1.data-00000-of-00001"):
        (tmp_path / name).write_bytes(b"x")
    assert "a folder of a TensorFlow checkpoint, as SimCLR has them: convert it" in refused(tmp_path)
    assert "a TensorFlow checkpoint, as SimCLR has them: convert it" in refused(tmp_path / "model.ckpt-1")
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "saved_model.pb").write_bytes(b"x")
    assert "a SavedModel of TensorFlow" in refused(hub)


def test_zip_files_of_other_kinds_are_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as file:
        file.writestr("m/data.pkl", b"\x80\x02}.")
        file.writestr("m/constants.pkl", b"\x80\x02).")
    assert "a TorchScript program; expected a state_dict" in refused(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as file:
        file.writestr("folder/resnet50.pth", b"x")
    assert "a zip archive that holds 'folder/resnet50.pth': unpack it first" in refused(tmp_path / "w.zip")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    content=st.binary(max_size=300),
    name=st.sampled_from(["w.pth", "w", "w.index", "w.bin", "w.safetensors", "w.ckpt"]),
)
def test_any_bytes_are_arrays_or_one_line(tmp_path_factory, content: bytes, name: str) -> None:
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(content)
    refused(path)
    assert "\n" not in unreadable.identify(path, content)


# ---- layouts of RadImageNet
# -------------------------------------------------------------------------------------------

DENSE = Classifier(registry.build("densenet121").truncate("stage1/layer1"), 2)


@pytest.mark.parametrize("prefix", ["backbone.0.", "0.", "", "features.", "module.features.", "net.encoder."])
def test_radimagenets_densenet_is_read_behind_any_name_of_its_features(prefix: str) -> None:
    scheme = next(each for each in tables.schemes("densenet121") if each.name == "features of torchvision")
    shapes = {path: leaf.shape for tree in DENSE.abstract() for path, leaf in flatten(tree).items()}
    entries = {
        path: entry for path, entry in tables.table(scheme, DENSE).items() if not path.startswith("head/")
    }
    source = {
        prefix + entry.key: entry.restore(np.full(shapes[path], 3, np.float32))
        for path, entry in entries.items()
    }
    assert prefix + "conv0.weight" in source
    params, _, report = merge(DENSE, source, seed=0, head="new")
    assert params["stem"]["conv"]["kernel"].flat[0] == 3
    assert len(report.loaded) == len(entries)


@pytest.mark.parametrize(
    ("layer", "weight"),
    [("conv1/{}", "conv1/{}/x:0"), ("densenet121", "conv1/{}/x:0"), ("conv1/{}", "model/conv1/{}/x")],
)
def test_the_slashes_in_keras_2s_names_of_densenets_stem_are_read(
    tmp_path: Path, layer: str, weight: str
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        names: dict[str, list[str]] = {}
        for kind in ("conv", "bn"):
            names.setdefault(layer.format(kind), []).append(weight.format(kind))
        names["bn"] = ["bn/x:0"]  # the last norm, which has the name of the stem's without its layer
        file.attrs["layer_names"] = list(names)
        for group, weights in names.items():
            made = file.require_group(group)
            made.attrs["weight_names"] = weights
            for each in weights:
                made[each] = np.ones(1, np.float32)
    assert set(readers.read(tmp_path / "a.h5")) == {"conv1_conv/x", "conv1_bn/x", "bn/x"}


# ---- memory
# -----------------------------------------------------------------------------------------------------------


def keras(path: Path, make) -> Path:
    """A Keras file of one array."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = ["conv"]
        group = file.create_group("conv")
        group.attrs["weight_names"] = ["kernel"]
        make(group)
    return path


def test_a_chunk_that_is_larger_than_its_array_counts(tmp_path: Path) -> None:
    def make(group) -> None:
        made = group.create_dataset(
            "kernel", (10,), "u1", chunks=(1 << 29,), maxshape=(None,), compression="gzip"
        )
        made.id.write_direct_chunk((0,), zlib.compress(bytes(1 << 10)))

    size = (1 << 29) + 10 + hdf5.chunk_list_bytes((10,), (1 << 29,))
    assert f"unpack to {size:,}; expected at most twice" in refused(keras(tmp_path / "a.h5", make))
    case = CASES / "h_chunk_512m_written.h5"
    if case.exists():
        assert f"unpack to {size:,}" in refused(case)


def test_a_chunk_that_unpacks_to_more_than_it_declares_is_refused(tmp_path: Path) -> None:
    def make(group) -> None:
        made = group.create_dataset("kernel", (10,), "u1", chunks=(10,), compression="gzip")
        packer = zlib.compressobj()
        packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(600)) + packer.flush()
        made.id.write_direct_chunk((0,), packed)

    assert "damaged" in refused(keras(tmp_path / "a.h5", make))


def test_more_chunks_than_a_file_can_have_are_refused_before_the_library_lists_them(tmp_path: Path) -> None:
    path = keras(
        tmp_path / "a.h5", lambda group: group.create_dataset("kernel", (1 << 20,), "u1", chunks=(1,))
    )
    assert "expected at most twice the file's size" in refused(path)


def test_an_array_packed_by_a_plug_in_is_refused_by_number(tmp_path: Path) -> None:
    path = keras(
        tmp_path / "a.h5",
        lambda group: group.create_dataset("kernel", (64,), "u1", chunks=(64,), scaleoffset=0),
    )
    with h5py.File(path, "r") as file:
        assert hdf5.check(file["conv/kernel"], path) == 128 + hdf5.chunk_list_bytes((64,), (64,))
    data = path.read_bytes()
    known = b"\x06\x00"  # the number of scale-offset, as the message of the filters has it
    for at in [n for n in range(len(data)) if data.startswith(known, n)]:
        path.write_bytes(data[:at] + b"\x01\x7d" + data[at + 2 :])
        try:
            with h5py.File(path, "r") as file:
                hdf5.check(file["conv/kernel"], path)
        except UserError as error:
            if "is packed by filter 32001" in str(error):
                return
        except Exception:
            continue
    pytest.fail("no filter of that number was refused")


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "zip64"])
def test_a_zip_file_of_more_members_than_any_model_has_is_refused_before_it_is_listed(
    tmp_path: Path, declared: bool
) -> None:
    count = archive.MEMBERS + 1
    record = (
        struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    )
    body = b"PK\x03\x04" + bytes(40) + record * count
    size = len(record) * count
    if declared:
        tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, size, 44, 0)
    else:
        tail = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, 44)
        tail += struct.pack("<4sIQI", b"PK\x06\x07", 0, len(body), 1)
        tail += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "a.npz").write_bytes(body + tail)
    assert f"a zip file of {count:,} members; expected at most {archive.MEMBERS:,}" in refused(
        tmp_path / "a.npz"
    )


@pytest.mark.parametrize(
    "text",
    ['"{n:x}":{{"dtype":"U8","shape":[],"data_offsets":[0,0]}}', '"{n:x}":[]'],
    ids=["arrays", "lists"],
)
def test_a_safetensors_header_of_more_arrays_than_any_model_has_is_refused(tmp_path: Path, text: str) -> None:
    count = archive.MEMBERS * 12 if text.endswith("[]") else archive.MEMBERS * 4
    header = ("{" + ",".join(text.format(n=n) for n in range(count)) + "}").encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    line = refused(tmp_path / "a.safetensors")
    assert "of more than 30,000 arrays" in line or "a safetensors header of" in line


# ---- links ------------------------------------------------------------------------------------------------------------


def test_an_orbax_folder_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "orbax"
    folder.mkdir()
    (folder / "_METADATA").write_text("{}")
    (tmp_path / "secret").write_text("x")
    (folder / "manifest.ocdbt").symlink_to(tmp_path / "secret")
    assert "manifest.ocdbt in it leads to another folder; expected files, not links" in refused(folder)


def test_an_orbax_folder_that_declares_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "good", {"x": np.ones((3, 4), np.float32)})
    assert readers.read(tmp_path / "good")["x"].sum() == 12
    for name in ("shape", "chunks"):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        path = tmp_path / name / "x" / ".zarray"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: [200_000, 200_000]}))
        assert "bytes that unpack to 160,000,000,000" in refused(tmp_path / name)


def test_a_network_pickled_by_name_alone_is_refused(tmp_path: Path) -> None:
    assert "asks for my.models.Net" in refused(write_zip(tmp_path / "a.pt", Named("my.models", "Net"), {}))
