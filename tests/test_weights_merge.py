"""Fitting weights onto models: names, prefixes, heads, and what is refused."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.weights import export, locate, tables
from dapt_jax.weights.merge import merge
from dapt_jax.weights.paths import flatten, unflatten

OUTPUTS = 4


def classifier(name: str, after: str | None = None) -> Classifier:
    encoder = registry.build(name)
    return Classifier(encoder.truncate(after) if after else encoder, OUTPUTS)


def source_of(model: Classifier, scheme: tables.Scheme, prefix: str = "") -> dict[str, np.ndarray]:
    """A file's content: every array filled with a number of its own, in the file's layout."""
    params, batch_stats = model.abstract()
    shapes = flatten(params) | flatten(batch_stats)
    source = {}
    for number, (path, entry) in enumerate(tables.table(scheme, model).items()):
        ours = np.full(shapes[path].shape, number, np.float32)
        ours.flat[0] = -1  # so that a transposition shows in more than the shape
        source[prefix + entry.key] = entry.restore(ours)
    return source


def every_scheme():
    """The smallest model of every scheme: the others differ in depth and width."""
    smallest: dict = {}
    for name in registry.names():
        size = sum(leaf.size for leaf in flatten(registry.build(name).abstract()[0]).values())
        for scheme in tables.schemes(name):
            variant = name.split("_")[2:] if name.startswith("vit_") else []
            key = (scheme.module, *scheme.leaves.items(), *variant)
            if key not in smallest or size < smallest[key][0]:
                smallest[key] = size, name, scheme
    return [(name, scheme) for _, name, scheme in smallest.values()]


@pytest.mark.parametrize(("name", "scheme"), every_scheme(), ids=lambda value: getattr(value, "name", value))
def test_every_scheme_names_every_array_once_and_is_recognised(name: str, scheme: tables.Scheme) -> None:
    model = classifier(name)
    params, batch_stats = model.abstract()
    entries = tables.table(scheme, model)
    assert len({entry.key for entry in entries.values()}) == len(entries)
    merged, merged_stats, report = merge(model, source_of(model, scheme), seed=0)
    assert {path: a.shape for path, a in flatten(merged).items()} == {
        p: a.shape for p, a in flatten(params).items()
    }
    assert set(flatten(merged_stats)) == set(flatten(batch_stats))
    assert set(report.loaded) == set(entries)
    assert report.initialised == report.left_over == ()
    assert scheme.name in str(report)
    path = next(path for path in entries if path.endswith("kernel"))
    assert flatten(merged)[path].flat[1] == list(entries).index(path)


@pytest.mark.parametrize(
    ("name", "path", "key"),
    [
        ("resnet50", "stage3/block2/conv2/kernel", "layer3.1.conv2.weight"),
        ("resnet50", "stage1/block1/norm_skip/var", "layer1.0.downsample.1.running_var"),
        ("resnet50_keras", "stage4/block3/conv2/kernel", "conv5_block3_2_conv/kernel"),
        ("resnet50_keras", "stage1/block1/norm_skip/mean", "conv2_block1_0_bn/moving_mean"),
        ("resnet50_keras", "stage1/block1/norm1/bias", "conv2_block1_1_bn/beta"),
        ("efficientnet_lite0", "stage2/block1/norm_depthwise/scale", "_blocks.1._bn1.weight"),
        ("efficientnet_lite0", "top/conv/kernel", "_conv_head.weight"),
    ],
)
def test_names_are_those_of_the_files(name: str, path: str, key: str) -> None:
    assert tables.table(tables.schemes(name)[1], classifier(name))[path].key == key


def test_names_of_the_keras_file_of_2016() -> None:
    entries = tables.table(tables.schemes("resnet50_keras")[2], classifier("resnet50_keras"))
    assert entries["stage3/block6/conv3/kernel"].key == "res4f_branch2c/kernel"
    assert entries["stage1/block1/norm_skip/scale"].key == "bn2a_branch1/gamma"
    assert entries["stem/norm/var"].key == "bn_conv1/moving_variance"


@pytest.mark.parametrize("prefix", ["module.", "module.encoder_q.", "backbone.", "model.", "whatever.net."])
def test_prefixes_are_found_and_reported(prefix: str) -> None:
    model = classifier("resnet18")
    _, _, report = merge(model, source_of(model, tables.schemes("resnet18")[1], prefix), seed=0)
    assert report.prefix == prefix
    assert repr(prefix) in str(report)


def test_of_two_encoders_in_a_moco_file_the_query_is_taken() -> None:
    model = classifier("resnet18")
    key, query = (source_of(model, tables.schemes("resnet18")[1], f"module.encoder_{side}.") for side in "kq")
    _, _, report = merge(model, key | query, seed=0)
    assert report.prefix == "module.encoder_q."
    assert set(report.left_over) == set(key)


def test_a_head_of_another_shape_is_drawn_from_the_seed() -> None:
    model, scheme = classifier("resnet18"), tables.schemes("resnet18")[1]
    source = source_of(Classifier(model.encoder, 1000), scheme)
    params, _, report = merge(model, source, seed=3)
    assert set(report.initialised) == {"head/kernel", "head/bias"}
    assert report.left_over == ("fc.bias", "fc.weight")
    np.testing.assert_array_equal(params["head"]["kernel"], model.init(3)[0]["head"]["kernel"])
    assert merge(model, source_of(model, scheme), seed=3, head="new")[2].initialised == report.initialised
    with pytest.raises(
        UserError, match=r"'fc\.weight' \(for head/kernel\) has shape \(512, 1000\).*expected \(512, 4\)"
    ):
        merge(model, source, seed=0, head="load")


def test_truncated_encoders_leave_the_rest_over() -> None:
    whole = classifier("resnet50_keras")
    source = source_of(whole, tables.schemes("resnet50_keras")[1])
    _, _, report = merge(classifier("resnet50_keras", after="stage1/block3"), source, seed=0)
    assert "conv5_block3_2_conv/kernel" in report.left_over
    assert len(report.loaded) + len(report.left_over) == len(source)


def test_what_is_missing_is_counted_and_the_nearest_named() -> None:
    model = classifier("resnet18")
    source = source_of(model, tables.schemes("resnet18")[1])
    source["layer1.0.conv1.wieght"] = source.pop("layer1.0.conv1.weight")
    del source["bn1.running_mean"]
    with pytest.raises(UserError, match=r"2 arrays missing, first '.*did you mean"):
        merge(model, source, seed=0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda a: a[:1],
            r"'bn1\.weight' \(for stem/norm/scale\) has shape \(1,\) in our layout, expected \(64,\)",
        ),
        (lambda a: a.astype(np.int64), "is int64, expected floating point"),
        (lambda a: a * np.nan, "not finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(spoil, message: str) -> None:
    model = classifier("resnet18")
    source = source_of(model, tables.schemes("resnet18")[1])
    source["bn1.weight"] = spoil(source["bn1.weight"])
    with pytest.raises(UserError, match=message):
        merge(model, source, seed=0)


@pytest.mark.parametrize(
    ("held", "wanted"),
    [("resnet50", "efficientnet_lite0"), ("resnet50", "resnet50_keras"), ("efficientnet_lite0", "resnet18")],
)
def test_weights_of_another_model_are_recognised(held: str, wanted: str) -> None:
    source = source_of(classifier(held), tables.schemes(held)[1])
    with pytest.raises(UserError, match=f"not weights of '{wanted}'.*look like {held}"):
        merge(classifier(wanted), source, seed=0)


def test_a_deeper_model_of_the_same_names_is_refused() -> None:
    source = source_of(classifier("resnet34"), tables.schemes("resnet34")[1])
    with pytest.raises(UserError, match="these are the weights of 'resnet34', not of 'resnet18'"):
        merge(classifier("resnet18"), source, seed=0)


@pytest.mark.parametrize(
    ("model", "number", "last", "next_one"),
    [
        (
            "efficientnet_b0",
            1,
            "features.3.1.",
            "features.3.2.",
        ),  # EfficientNet-B1 has these widths, and more blocks
        ("efficientnet_b0", 2, "blocks.2.1.", "blocks.2.2."),
        ("efficientnet_b0_keras", 1, "block3b_", "block3c_"),
        ("resnet152", 1, "layer2.7.", "layer2.8."),  # ResNet-200
        ("resnet50_keras", 2, "res3d_", "res3e_"),
        ("vit_small", 1, "blocks.11.", "blocks.12."),
        ("convnext_tiny", 2, "stages.2.blocks.8.", "stages.2.blocks.9."),
        ("swin_tiny", 0, "stage3/block6/", "stage3/block7/"),
        ("unet", 1, "down4.", "down5."),
    ],
)
def test_a_deeper_network_that_is_no_model_here_is_refused(model, number, last, next_one) -> None:
    whole = classifier(model)
    source = source_of(whole, tables.schemes(model)[number])
    for model_of, start in ((whole, ""), (classifier(model, after=whole.encoder.groups[2]), "backbone.")):
        named = {
            start.replace(".", tables.schemes(model)[number].separator) + key: source[key] for key in source
        }
        merge(model_of, named, seed=0)  # of its own depth
        more = {key.replace(last, next_one): array for key, array in named.items() if last in key}
        with pytest.raises(UserError, match=f"a deeper network than '{model}', .* for {len(more)} arrays"):
            merge(model_of, named | more, seed=0)


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("vit_small", "blocks.3.ls1.gamma"),  # layer scale, as in DINOv2's transformers of 16 pixels
        ("resnet18", "layer2.0.se.fc1.weight"),  # squeeze and excitation
        ("resnet18", "layer1.1.downsample.0.weight"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
def test_layers_with_more_parameters_are_those_of_another_architecture(model, more, prefix) -> None:
    whole = classifier(model)
    source = source_of(whole, tables.schemes(model)[1], prefix)
    source[prefix + more] = np.full(384, 1e-5, np.float32)
    line = rf"another architecture than '{model}': its layers lack 1 arrays of the file's \({prefix}{more}\)"
    with pytest.raises(UserError, match=line):
        merge(whole, source, seed=0)


def test_what_is_no_parameter_of_a_layer_is_left_over() -> None:
    whole = classifier("swin_tiny")
    (scheme,) = (scheme for scheme in tables.schemes("swin_tiny") if scheme.name == "timm")
    source = source_of(whole, scheme)
    source |= {f"other.{key}.lora": array for key, array in source.items()}
    source["layers.0.blocks.1.attn_mask"] = np.zeros((64, 49, 49), np.float32)
    source["layers.0.blocks.1.attn.relative_position_index"] = np.zeros((49, 49), np.int64)
    for model in (whole, classifier("swin_tiny", after="stage1/block1")):
        _, _, report = merge(model, source, seed=0)
        assert len(report.loaded) + len(report.left_over) == len(source)
        assert "layers.0.blocks.1.attn_mask" in report.left_over


def test_the_token_of_masked_patches_is_left_over_under_every_scheme() -> None:
    """DINOv2's files have one: in transformers' names beside the class token, in the authors' at the top."""
    whole = classifier("vit_small_dinov2")
    for scheme in tables.schemes("vit_small_dinov2")[1:]:
        source = source_of(whole, scheme)
        token = tables.table(scheme, whole)["stem/class_token"].key.replace("cls_token", "mask_token")
        _, _, report = merge(whole, source | {token: np.zeros((1, 384), np.float32)}, seed=0)
        assert report.left_over == (token,)


def test_rubbish_is_refused_with_examples_of_it() -> None:
    with pytest.raises(UserError, match=r"names tried: dapt_jax, torchvision.*\); it holds foo, bar"):
        merge(classifier("resnet18"), {"foo": np.ones(1), "bar": np.ones(1)}, seed=0)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_our_own_export_comes_back_to_the_bit(tmp_path: Path, suffix: str) -> None:
    model = classifier("resnet18", after="stage2/block1")
    params, batch_stats = model.init(5)
    export.write(tmp_path / f"w{suffix}", params, batch_stats)
    assert [path.name for path in tmp_path.iterdir()] == [f"w{suffix}"]
    back, back_stats, report = locate.load(str(tmp_path / f"w{suffix}"), model, seed=0)
    assert "dapt_jax names" in report.source
    for before, after in ((params, back), (batch_stats, back_stats)):
        for path, array in flatten(before).items():
            np.testing.assert_array_equal(flatten(after)[path], array)


@pytest.mark.parametrize("name", registry.names())
def test_our_own_names_are_the_paths(name: str) -> None:
    """Those of arrays that lie in a layer group itself, such as tokens and layer scale, too."""
    assert all(entry.key == path for path, entry in tables.table(tables.OWN, classifier(name)).items())


def test_export_to_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.safetensors or \.npz"):
        export.write(tmp_path / "w.pth", {}, {})


def test_random_weights_are_the_initial_values() -> None:
    model = classifier("resnet18")
    params, batch_stats, report = locate.load("random", model, seed=4)
    np.testing.assert_array_equal(
        params["stem"]["conv"]["kernel"], model.init(4)[0]["stem"]["conv"]["kernel"]
    )
    assert report.loaded == ()
    assert len(report.initialised) == len(flatten(params) | flatten(batch_stats))


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "resnet18.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"did you mean 'resnet18\.pth'"):
        locate.load(str(tmp_path / "resnet18.pt"), classifier("resnet18"), seed=0)
    with pytest.raises(UserError, match="a folder"):
        locate.load(str(tmp_path), classifier("resnet18"), seed=0)
    with pytest.raises(UserError, match="no folder"):
        locate.load(str(tmp_path / "no" / "x.pth"), classifier("resnet18"), seed=0)


def test_models_without_a_package_say_what_to_pass() -> None:
    with pytest.raises(UserError, match=r"--config\.weights=PATH.*torchvision"):
        locate.load("imagenet", classifier("resnet50"), seed=0)


def test_paths_go_back_and_forth() -> None:
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert unflatten(flatten(tree)) == tree


@pytest.mark.parametrize("axes", [(2, 3, 1, 0), (3, 2, 0, 1)])
def test_kernels_in_another_order_than_their_names_tell_are_refused(axes: tuple[int, ...]) -> None:
    model = classifier("resnet18")
    source = source_of(model, tables.schemes("resnet18")[1])
    turned = {key: a.transpose(axes) if a.ndim == 4 else a for key, a in source.items()}
    with pytest.raises(
        UserError, match=r"kernels are transposed: 'conv1\.weight' has shape .* of 20 kernels"
    ):
        merge(model, turned, seed=0, head="new")


def test_one_array_of_another_shape_stops() -> None:
    model = classifier("resnet18")
    source = source_of(model, tables.schemes("resnet18")[1])
    source["layer2.0.conv2.weight"] = source["layer2.0.conv2.weight"][:64]
    with pytest.raises(UserError, match=r"'layer2\.0\.conv2\.weight' \(for .*\) has shape \(3, 3, 128, 64\)"):
        merge(model, source, seed=0)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_widens_exactly(dtype) -> None:
    model = classifier("resnet18")
    source = {key: a.astype(dtype) for key, a in source_of(model, tables.schemes("resnet18")[1]).items()}
    params, batch_stats, _ = merge(model, source, seed=0)
    for path, array in (flatten(params) | flatten(batch_stats)).items():
        assert array.dtype == np.float32, path
    np.testing.assert_array_equal(params["stem"]["norm"]["scale"], source["bn1.weight"].astype(np.float32))
