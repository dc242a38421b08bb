"""Reading weight files: the formats, and what is refused."""

import collections
import json
import pickle
import zipfile
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
from tests.torch_files import Call, Named, New, pickled, tensor, write_old, write_zip


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
    state = collections.OrderedDict(
        (name, tensor(array, str(n))) for n, (name, array) in enumerate(flat.items())
    )
    if form == "zip":
        return write_zip(
            path, wrap(state), {str(n): array.tobytes() for n, array in enumerate(flat.values())}
        )
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
    path = write(
        tmp_path / "a.pth.tar", form, lambda state: {"epoch": 3, "arch": "x", "model": {"state_dict": state}}
    )
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
    path = write_old(
        tmp_path / "a.pt", {"t": tensor(run, "k", shape=(2, 2), view=(("v", 3, 4),))}, {"k": run}
    )
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
    poisoned = Call(
        Named("collections", "OrderedDict"), state={"items": Named("torch._utils", "_rebuild_tensor_v2")}
    )
    path = write_zip(tmp_path / "a.pt", {"extra": poisoned, "t": tensor(run, "0")}, {"0": run.tobytes()})
    np.testing.assert_array_equal(torch_pickle.read(path)["t"], run)


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": (3,), "strides": (1,)},
        {"offset": 1},
        {"shape": (10**6, 10**6), "strides": (0, 0)},
        {"strides": (-1,)},
    ],
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


# ---- Keras 3
# ----------------------------------------------------------------------------------------------------------


def write_keras3(file: h5py.File, layers: dict[str, tuple[str, int]], named: bool = True) -> None:
    """The layout of Keras 3: `layers/CLASS_N/vars/NUMBER`, the layer's own name as an attribute."""
    for path, (name, variables) in layers.items():
        group = file.create_group(f"{path}/vars")
        if named:
            group.attrs["name"] = name
        for number in range(variables):
            group[str(number)] = np.full(2, number, np.float32)


KERAS3 = {
    "layers/conv2d": ("conv1_conv", 2),
    "layers/functional/layers/batch_normalization_1": ("conv1_bn", 4),
    "layers/batch_normalization": ("slim_bn", 3),
    "layers/dense_12": ("predictions", 1),
    "layers/activation": ("relu", 0),
    "optimizer": ("adam", 5),
}


def test_keras_3_names_layers_and_numbers_their_variables(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.weights.h5", "w") as file:
        write_keras3(file, KERAS3)
    read = readers.read(tmp_path / "a.weights.h5")
    numbers = {key: int(array[0]) for key, array in read.items()}
    batch = {
        "conv1_bn/gamma": 0,
        "conv1_bn/beta": 1,
        "conv1_bn/moving_mean": 2,
        "conv1_bn/moving_variance": 3,
    }
    unnamed = {
        f"slim_bn/vars/{number}": number for number in range(3)
    }  # gamma or beta is missing: which, is not told
    assert (
        numbers == {"conv1_conv/kernel": 0, "conv1_conv/bias": 1, "predictions/kernel": 0} | batch | unnamed
    )


def test_a_keras_file_tells_which_variables_a_norm_lacks(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        write_keras3(file, KERAS3)
    inner = {
        "class_name": "BatchNormalization",
        "config": {"name": "slim_bn", "scale": False, "center": True},
    }
    config = {
        "class_name": "Functional",
        "config": {"layers": [{"class_name": "Functional", "config": {"layers": [inner]}}]},
    }
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.write(tmp_path / "model.weights.h5", "model.weights.h5")
    read = readers.read(tmp_path / "a.keras")
    assert [int(read[f"slim_bn/{name}"][0]) for name in ("beta", "moving_mean", "moving_variance")] == [
        0,
        1,
        2,
    ]


def test_the_first_files_of_keras_3_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.weights.h5", "w") as file:
        write_keras3(file, KERAS3, named=False)
    with pytest.raises(
        UserError, match=r"without named layers \(the first \.weights\.h5 of Keras 3 number them\)"
    ):
        readers.read(tmp_path / "a.weights.h5")


def test_lists_of_names_that_keras_cuts_are_put_together(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for number, layer in enumerate(("one", "two")):
            file.attrs[f"layer_names{number}"] = [layer]
            file.create_group(layer).attrs["weight_names"] = ["kernel"]
            file[layer]["kernel"] = np.ones(1, np.float32)
    assert list(readers.read(tmp_path / "a.h5")) == ["one/kernel", "two/kernel"]


# ---- pickles of arrays, exports of TensorFlow
# ---------------------------------------------------------------------------


def flat_mapping(tree: dict) -> Call:
    """What haiku pickles for a mapping of its own."""
    return Call(Named("haiku._src.data_structures", "FlatMapping"), tree)


def test_byols_online_encoder_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal((3, 3, 2, 4)).astype(np.float32) for _ in range(2)]
    average = rng.standard_normal((1, 1, 1, 4)).astype(np.float32)
    online, target = (flat_mapping({"net/~/conv": {"w": kernel}}) for kernel in kernels)
    state = flat_mapping({"net/~/norm/~/mean_ema": {"average": average, "counter": np.array(3)}})
    moments = [New(Named("byol.utils.optimizers", "ScaleByLarsState"), args=(target,))]
    experiment = New(
        Named("byol.byol_experiment", "_ByolExperimentState"),
        args=(online, target, state, flat_mapping({}), moments),
    )
    path = tmp_path / "pretrain.pkl"
    path.write_bytes(
        pickled({"experiment_state": experiment, "step": np.array(7), "rng": np.zeros(2, np.uint32)})
    )
    read = readers.read(path)
    assert read.origin == f"{path} ['experiment_state'] online_params, online_state"
    expected = {
        "net/~/conv/w": kernels[0],
        "net/~/norm/~/mean_ema/average": average,
        "net/~/norm/~/mean_ema/counter": np.array(3),
    }
    assert_same(read, expected)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nested_dicts_of_arrays_are_read(tmp_path: Path, protocol: int) -> None:
    params = {"net": {"conv": {"w": np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3))}}}
    state = {"net": {"norm": {"average": np.arange(3, dtype=">f4")}}}
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps((params, state), protocol))
    read = readers.read(path)
    np.testing.assert_array_equal(read["net/conv/w"], params["net"]["conv"]["w"])
    np.testing.assert_array_equal(read["net/norm/average"], [0, 1, 2])
    path.write_bytes(pickle.dumps({"params": params, "opt_state": {"w": np.ones(2)}}, protocol))
    assert list(readers.read(path)) == ["net/conv/w"]


def test_exports_of_tensorflow_lose_its_endings(tmp_path: Path) -> None:
    arrays = {"base_model/conv2d/kernel:0": np.ones(2), "layer/gamma/.ATTRIBUTES/VARIABLE_VALUE": np.zeros(1)}
    np.savez(tmp_path / "a.npz", **arrays)
    assert list(readers.read(tmp_path / "a.npz")) == ["base_model/conv2d/kernel", "layer/gamma"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_keeps_dtypes_and_order_of_axes(tmp_path: Path, save) -> None:
    flat = {
        "half": np.ones(3, np.float16),
        "brain": np.array([1, -2.5], ml_dtypes.bfloat16),
        "turned": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "none": np.zeros((0, 2)),
    }
    save(tmp_path / "a.npz", **flat)
    assert_same(readers.read(tmp_path / "a.npz"), flat)
