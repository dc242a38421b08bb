"""Reading weight files: the formats, and what is refused."""

import collections
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.errors import UserError
from dapt_jax.weights import readers, torch_pickle
from tests.torch_files import Call, Named, New, tensor, write_old, write_zip


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


def test_views_of_the_old_format_are_followed(tmp_path: Path) -> None:
    run = np.arange(10, dtype=np.float32)
    path = write_old(tmp_path / "a.pt", {"t": tensor(run, "k", shape=(2, 2), view=(("v", 3, 4),))}, {"k": run})
    np.testing.assert_array_equal(torch_pickle.read(path)["t"], [[3, 4], [5, 6]])


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xC000, 0x3DCD], np.uint16)
    path = write_zip(tmp_path / "a.pt", {"t": tensor(bits, "0", kind="BFloat16")}, {"0": bits.tobytes()})
    read = torch_pickle.read(path)["t"]
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read.astype(np.float32), (bits.astype(np.uint32) << 16).view(np.float32))


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
    "some.package.Net": Call(Named("some.package", "Net")),
    "numpy.core.multiarray.fromfile": Call(Named("numpy.core.multiarray", "fromfile"), "x"),
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


def module(kind: str, parts=(), **parameters) -> New:
    """A part of a network as torch pickles it whole."""
    hooks = Call(Named("collections", "OrderedDict"))
    state = {
        "training": False,
        "_parameters": parameters,
        "_buffers": {},
        "_backward_hooks": hooks,
        "_modules": dict(parts),
    }
    return New(Named(*kind.rsplit(".", 1)), state)


def test_a_network_pickled_whole_is_read_as_its_state_dict(tmp_path: Path) -> None:
    run = np.arange(4, dtype=np.float32)
    conv = module("torch.nn.modules.conv.Conv2d", weight=tensor(run, "0"), bias=None)
    act = module("torch.nn.modules.activation.ReLU")
    block = module("torchxrayvision.models._DenseBlock", {"conv": conv, "act": act})
    path = write_zip(
        tmp_path / "a.pt", module("torchvision.models.resnet.ResNet", {"layer1": block}), {"0": run.tobytes()}
    )
    assert_same(readers.read(path), {"layer1.conv.weight": run})
    path = write_zip(tmp_path / "b.pt", {"epoch": 1, "model": block}, {"0": run.tobytes()})
    assert readers.read(path).origin == f"{path} ['model']"
    for kind in ("os.system", "torch.nn.parallel.DataParallel", "mine.Net", "torchvision.modelsevil.Net"):
        with pytest.raises(UserError, match=f"asks for {kind}"):
            readers.read(write_zip(tmp_path / "c.pt", module(kind, {"conv": conv}), {}))


def test_parts_within_parts_without_end_are_named_once(tmp_path: Path) -> None:
    run = np.ones(1, np.float32)
    part = module("torch.nn.modules.conv.Conv2d", weight=tensor(run, "0"))
    for _ in range(40):  # each holds the one before twice: 2^40 paths
        part = module("torch.nn.modules.container.Sequential", {"0": part, "1": part})
    weights = readers.read(write_zip(tmp_path / "a.pt", part, {"0": run.tobytes()}))
    assert 1 <= len(weights) <= 2


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
        torch_pickle.read(path)["t"]


@pytest.mark.parametrize("form", ["zip", "old"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(fraction=st.floats(0, 0.99))
def test_a_file_cut_short_is_a_user_error(tmp_path_factory, form: str, fraction: float) -> None:
    path = write(tmp_path_factory.mktemp("cut") / "a.pth", form)
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(UserError, match=r"a\.pth"):
        dict(readers.read(path))


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
    with pytest.raises(UserError, match="without named layers"):
        readers.read(tmp_path / "a.h5")
