"""Reading weight files: the formats, and what is refused."""

import collections
import io
import pickle
import struct
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.errors import UserError
from dapt_jax.weights import readers, torch_pickle

MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "float32": "Float",
    "float16": "Half",
    "float64": "Double",
    "int64": "Long",
    "uint8": "Byte",
    "bool": "Bool",
}


class Named:
    """Pickled as the global `module.name`, which need not exist."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    """Pickled as a call of `function` (a Named) with `args`, with a state to set if one is given."""

    def __init__(self, function: Named, *args, state=None):
        self.function, self.args, self.state = function, args, state


class Storage:
    """Pickled as a persistent id."""

    def __init__(self, *pid):
        self.pid = pid


class Writer(pickle._Pickler):  # the Python one: its save methods can be extended
    """Writes pickles that name classes of packages that are not installed."""

    def persistent_id(self, value):
        return value.pid if isinstance(value, Storage) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Named):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.args)
            self.write(pickle.REDUCE)
            if value.state is not None:
                self.save(value.state)
                self.write(pickle.BUILD)
        else:
            super().save(value, save_persistent_id)


def pickled(value) -> bytes:
    file = io.BytesIO()
    Writer(file, 2).dump(value)
    return file.getvalue()


def tensor(array: np.ndarray, key: str, *, strides=None, offset=0, shape=None, kind=None, view=()) -> Call:
    """What torch pickles for a tensor whose storage holds `array`, flat."""
    kind = Named("torch", f"{kind or STORAGES[array.dtype.name]}Storage")
    storage = Storage("storage", kind, key, "cpu", array.size, *view)
    shape = array.shape if shape is None else shape
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    ordered = Call(Named("collections", "OrderedDict"))
    return Call(Named("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, strides, False, ordered)


def write_zip(path: Path, content, runs: dict[str, bytes], order: bytes = b"little") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(content))
        archive.writestr("archive/byteorder", order)
        for key, data in runs.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
    return path


def write_old(path: Path, content, runs: dict[str, np.ndarray]) -> Path:
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickled(MAGIC), pickled(1001), pickled(machine), pickled(content), pickled(list(runs))]
    parts += [struct.pack("<q", array.size) + array.tobytes() for array in runs.values()]
    path.write_bytes(b"".join(parts))
    return path


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.standard_normal((4, 3, 2, 2)).astype(np.float32),
        "half": rng.standard_normal(5).astype(np.float16),
        "wide": rng.standard_normal((2, 3)),
        "count": np.array(7),
        "bytes": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }


def write(path: Path, form: str, wrap=lambda state: state) -> Path:
    flat = arrays()
    state = collections.OrderedDict((name, tensor(array, str(n))) for n, (name, array) in enumerate(flat.items()))
    if form == "zip":
        return write_zip(path, wrap(state), {str(n): array.tobytes() for n, array in enumerate(flat.values())})
    legacy = {name: tensor(array, str(n), view=(None,)) for n, (name, array) in enumerate(flat.items())}
    return write_old(
        path, wrap(collections.OrderedDict(legacy)), {str(n): array for n, array in enumerate(flat.values())}
    )


def assert_same(read, expected) -> None:
    assert list(read) == list(expected)
    for name, array in expected.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("form", ["zip", "old"])
def test_torch_files_are_read(tmp_path: Path, form: str) -> None:
    assert_same(torch_pickle.read(write(tmp_path / "a.pth", form)), arrays())


@pytest.mark.parametrize("form", ["zip", "old"])
def test_containers_are_searched_and_named(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "a.pth.tar", form, lambda state: {"epoch": 3, "arch": "x", "model": {"state_dict": state}})
    weights = readers.read(path)
    assert_same(weights, arrays())
    assert weights.origin == f"{path} ['model'] ['state_dict']"


def test_strides_and_offsets_are_followed(tmp_path: Path) -> None:
    run = np.arange(24, dtype=np.float32)
    transposed = tensor(run, "0", shape=(3, 2), strides=(1, 4), offset=5)
    read = torch_pickle.read(write_zip(tmp_path / "a.pt", {"t": transposed}, {"0": run.tobytes()}))
    np.testing.assert_array_equal(read["t"], [[5, 9], [6, 10], [7, 11]])
    assert read["t"].flags.c_contiguous


def test_views_of_the_old_format_are_followed(tmp_path: Path) -> None:
    run = np.arange(10, dtype=np.float32)
    path = write_old(tmp_path / "a.pt", {"t": tensor(run, "k", shape=(2, 2), view=(("v", 3, 4),))}, {"k": run})
    np.testing.assert_array_equal(torch_pickle.read(path)["t"], [[3, 4], [5, 6]])


def test_bfloat16_widens_exactly(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xC000, 0x3DCD], np.uint16)
    path = write_zip(tmp_path / "a.pt", {"t": tensor(bits, "0", kind="BFloat16")}, {"0": bits.tobytes()})
    read = torch_pickle.read(path)["t"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, (bits.astype(np.uint32) << 16).view(np.float32))


def test_big_endian_zip(tmp_path: Path) -> None:
    run = np.array([1.5, -2.0], np.float32)
    path = write_zip(tmp_path / "a.pt", {"t": tensor(run, "0")}, {"0": run.astype(">f4").tobytes()}, b"big")
    np.testing.assert_array_equal(torch_pickle.read(path)["t"], run)


HOSTILE = {
    "os.system": Call(Named("os", "system"), "true"),
    "builtins.eval": Call(Named("builtins", "eval"), "1"),
    "builtins.getattr": Call(Named("builtins", "getattr"), Named("collections", "OrderedDict"), "fromkeys"),
    "collections.OrderedDict.fromkeys": Named("collections", "OrderedDict.fromkeys"),
    "torch._utils._rebuild_tensor_v2.__globals__": Named("torch._utils", "_rebuild_tensor_v2.__globals__"),
    "torchvision.models.resnet.ResNet": Call(Named("torchvision.models.resnet", "ResNet")),
    "numpy.core.multiarray._reconstruct": Call(Named("numpy.core.multiarray", "_reconstruct"), 0),
}


@pytest.mark.parametrize("form", ["zip", "old"])
@pytest.mark.parametrize("name", HOSTILE)
def test_code_is_refused_by_name(tmp_path: Path, name: str, form: str) -> None:
    path = tmp_path / "evil.pth"
    content = {"a": HOSTILE[name]}
    write_zip(path, content, {}) if form == "zip" else write_old(path, content, {})
    with pytest.raises(UserError, match=rf"evil\.pth: the file asks for {name}; only arrays") as caught:
        torch_pickle.read(path)
    assert "\n" not in str(caught.value)


def test_state_set_on_containers_is_dropped(tmp_path: Path) -> None:
    run = np.ones(2, np.float32)
    poisoned = Call(Named("collections", "OrderedDict"), state={"items": Named("torch._utils", "_rebuild_tensor_v2")})
    path = write_zip(tmp_path / "a.pt", {"extra": poisoned, "t": tensor(run, "0")}, {"0": run.tobytes()})
    np.testing.assert_array_equal(torch_pickle.read(path)["t"], run)


@pytest.mark.parametrize(
    "lie",
    [{"shape": (3,), "strides": (1,)}, {"offset": 1}, {"shape": (10**6, 10**6), "strides": (0, 0)}, {"strides": (-1,)}],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path: Path, lie) -> None:
    run = np.ones(2, np.float32)
    path = write_zip(tmp_path / "a.pt", {"t": tensor(run, "0", **lie)}, {"0": run.tobytes()})
    with pytest.raises(UserError, match="asks for a tensor"):
        torch_pickle.read(path)


@pytest.mark.parametrize("form", ["zip", "old"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(fraction=st.floats(0, 0.99))
def test_a_file_cut_short_is_a_user_error(tmp_path_factory, form: str, fraction: float) -> None:
    path = write(tmp_path_factory.mktemp("cut") / "a.pth", form)
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(UserError, match=r"a\.pth"):
        readers.read(path)


def test_no_tensors_is_a_user_error(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.pt", {"epoch": 1, "weights": [1, 2]}, {})
    with pytest.raises(UserError, match="it holds 'epoch', 'weights'"):
        torch_pickle.read(path)


def test_safetensors_and_npz_are_read_whatever_their_suffix(tmp_path: Path) -> None:
    flat = {"a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
    safetensors.numpy.save_file(flat, tmp_path / "a.bin")
    np.savez(tmp_path / "b.npz", **flat)
    assert_same(readers.read(tmp_path / "a.bin"), flat)
    assert_same(readers.read(tmp_path / "b.npz"), flat)


def test_pickled_arrays_in_an_npz_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.array([{"x": 1}], object))
    with pytest.raises(UserError, match=r"a\.npz: not an \.npz of plain arrays"):
        readers.read(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".h5", ".bin", ".pth"])
def test_rubbish_is_a_user_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"not a weight file at all")
    with pytest.raises(UserError, match=r"a\."):
        readers.read(path)


@pytest.mark.parametrize("root", ["", "model_weights"])
@pytest.mark.parametrize(
    ("layer", "weight", "key"),
    [
        ("conv1_conv", "conv1_conv/kernel:0", "conv1_conv/kernel"),
        ("conv1_conv", "conv1_conv/kernel", "conv1_conv/kernel"),
        ("resnet50", "conv1_conv/kernel:0", "conv1_conv/kernel"),
        ("res2a_branch2a", "res2a_branch2a_W_1:0", "res2a_branch2a/kernel"),
        ("bn2a_branch2a", "bn2a_branch2a_running_std_1:0", "bn2a_branch2a/moving_variance"),
    ],
)
def test_keras_names(tmp_path: Path, root: str, layer: str, weight: str, key: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        top = file.create_group(root) if root else file
        top.attrs["layer_names"] = [layer.encode(), b"flatten"]
        top.create_group("flatten").attrs["weight_names"] = []
        group = top.create_group(layer)
        group.attrs["weight_names"] = [weight.encode()]
        group[weight] = np.ones((2, 2), np.float32)
    assert_same(readers.read(tmp_path / "a.h5"), {key: np.ones((2, 2), np.float32)})


def test_hdf5_of_another_kind_is_a_user_error(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.ones(2)
    with pytest.raises(UserError, match="layer_names"):
        readers.read(tmp_path / "a.h5")
