"""Normalisation belongs to the weights, however they are named; it can be set, is remembered, and is always said."""

import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.preprocess import HALF, IMAGENET, Preprocess
from dapt_jax.weights import export, locate, normalisation, recognise, tables, zoo
from dapt_jax.weights.paths import flatten
from tests.torch_files import tensor, write_zip

UNIT, XRV, CAFFE = normalisation.UNIT, normalisation.TORCHXRAYVISION, normalisation.KERAS_CAFFE


def write(path: Path, *names: str, metadata: dict[str, str] | None = None) -> Path:
    """A file whose arrays have these names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({name: np.ones(2, np.float32) for name in names or ("w",)}, path, metadata)
    return path


# ---- the setting
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "channels", "wanted"),
    [
        ("", 3, None),
        ("imagenet", 3, IMAGENET),
        ("half", 3, HALF),
        ("unit", 3, UNIT),
        ("torchxrayvision", 1, XRV.for_channels(1)),
        ("keras_caffe", 3, CAFFE),
        ("127.5,127.5", 3, HALF),
        ("0.5,0.5", 3, HALF),
        ("0.5,0.5", 1, HALF.for_channels(1)),
        ("0,255", 3, UNIT),
        ("123.675,116.28,103.53,58.395,57.12,57.375", 3, IMAGENET),
    ],
)
def test_the_setting_takes_names_and_numbers(text: str, channels: int, wanted: Preprocess | None) -> None:
    assert normalisation.parse(text, channels) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagnet", "did you mean 'imagenet'"),
        ("0,1", "expected 'unit' for values from 0 to 1, or 0,255"),
        ("1,2,3", "expected MEAN,STD: two numbers, or 3 means and 3 deviations"),
        ("0.5,nan", "expected MEAN,STD"),
        ("0.5,inf", "expected MEAN,STD"),
        ("a,b", "expected MEAN,STD"),
        ("0.5,0", "expected standard deviations above 0"),
        ("127,-1", "expected standard deviations above 0"),
    ],
)
def test_what_is_no_normalisation_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"model.preprocess.*{message}"):
        normalisation.parse(text)


NUMBER = st.floats(0.01, 300, allow_nan=False)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(mean=st.lists(NUMBER, min_size=1, max_size=4), std=NUMBER, bgr=st.booleans())
def test_what_a_file_remembers_comes_back(mean: list[float], std: float, bgr: bool) -> None:
    preprocess = Preprocess(tuple(mean), (std,) * len(mean), bgr)
    assert normalisation.from_metadata(normalisation.to_metadata(preprocess), "x") == preprocess


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.text(max_size=40)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["mean", "std", "bgr"]), inner)
        ),
    ).map(json.dumps)
)
def test_metadata_that_is_none_is_one_line(text: str) -> None:
    said = ""
    found: Preprocess | None = IMAGENET
    try:
        found = normalisation.from_metadata({normalisation.KEY: text}, "w.safetensors")
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert not said or said.startswith("w.safetensors: its metadata")
    assert found is not None
    assert found.channels == len(found.std)
    assert min(found.std) > 0


# ---- what the weights say
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "model", "wanted"),
    [
        ("RadImageNet-ResNet50_notop.h5", "resnet50_keras", HALF),
        ("RadImageNet-DenseNet121_notop.h5", "densenet121_keras", HALF),
        ("RadImageNet_pytorch/ResNet50.pt", "resnet50", HALF),
        ("resnet50-1x.pth", "resnet50", UNIT),
        ("r50_1x_sk0.pth", "resnet50", UNIT),
        ("vit_b_16-c867db91.pth", "vit_base", IMAGENET),
        (
            "nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
            "densenet121",
            XRV,
        ),
        ("mimic_ch-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt", "densenet121", XRV),
        ("dino_vitbase16_pretrain.pth", "vit_base", IMAGENET),
        ("deit_base_patch16_224-b5f2ef4d.pth", "vit_base", IMAGENET),
        ("resnet50_weights_tf_dim_ordering_tf_kernels.h5", "resnet50_keras", CAFFE),
        ("densenet121_weights_tf_dim_ordering_tf_kernels.h5", "densenet121_keras", IMAGENET),
        ("tf_efficientnet_lite0-0aa007d2.pth", "efficientnet_lite0", HALF),
    ],
)
def test_published_files_are_known_by_their_names(
    tmp_path: Path, file: str, model: str, wanted: Preprocess
) -> None:
    path = write(tmp_path / file)
    encoder = registry.build(model)
    assert locate.fitted(str(path), encoder).preprocess == wanted
    assert "by its file name" in recognise.expected(str(path), path).why


def test_every_entry_of_the_zoo_is_known_by_its_address_and_file_name() -> None:
    for name in zoo.names():
        entry = zoo.entry(name)
        if entry.url:
            assert recognise.expected(entry.url).preprocess == entry.preprocess, name
        file = entry.url.partition("?")[0].rpartition("/")[2]
        found = recognise.expected(f"downloads/{file}").preprocess
        assert found in (entry.preprocess, None), name


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("hf://timm/vit_base_patch16_224.mae/model.safetensors", "timm:vit_base_patch16_224.mae"),
        ("hf://timm/resnet50.a1_in1k/pytorch_model.bin", "timm:resnet50.a1_in1k"),
        ("https://download.pytorch.org/models/vit_b_16-c867db91.pth", "torchvision:vit_base.v1"),
        ("https://zenodo.org/record/5205234/files/chexpert.pth.tar?download=1", "taher2021:chexpert"),
    ],
)
def test_addresses_are_those_of_the_zoo_in_any_spelling(address: str, name: str) -> None:
    found = recognise.expected(address)
    assert (found.preprocess, found.why, found.is_certain) == (zoo.entry(name).preprocess, name, True)


def test_a_checksum_tells_whatever_the_file_is_called(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "mine.safetensors")
    monkeypatch.setattr(
        recognise,
        "_checksums",
        lambda: {hashlib.sha256(path.read_bytes()).hexdigest()[:8]: "taher2021:simclr-v2"},
    )
    expected = recognise.Expected(UNIT, "taher2021:simclr-v2", model="resnet50")
    assert recognise.expected(str(path), path) == expected


@pytest.mark.parametrize(
    ("names", "model", "wanted"),
    [
        (("features.conv0.weight", "op_threshs"), "densenet121", XRV),
        (("conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight"), "vit_base", IMAGENET),
        (
            ("module.conv_proj.weight", "module.encoder.layers.encoder_layer_0.ln_1.weight"),
            "vit_base",
            IMAGENET,
        ),
        (("net.0.0.weight", "net.1.blocks.0.net.0.weight"), "resnet50", UNIT),
        (("blocks.0.norm1.weight",), "vit_base", HALF),
        (("conv1.weight",), "resnet50", IMAGENET),
    ],
)
def test_names_that_one_library_alone_gives_tell(
    tmp_path: Path, names, model: str, wanted: Preprocess
) -> None:
    path = write(tmp_path / "mine.safetensors", *names)
    assert locate.fitted(str(path), registry.build(model)).preprocess == wanted


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}),
    ],
)
def test_a_folder_of_the_hub_says_in_the_files_beside(tmp_path: Path, name: str, content: dict) -> None:
    write(tmp_path / "model.safetensors", "conv1.weight")
    (tmp_path / name).write_text(json.dumps(content))
    assert locate.fitted(str(tmp_path), registry.build("resnet50")).preprocess == HALF
    assert recognise.expected(str(tmp_path), tmp_path).why == f"{name} beside it"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}),
        ("preprocessor_config.json", {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}),
        (
            "preprocessor_config.json",
            {"do_normalize": False, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
        ),
        (
            "preprocessor_config.json",
            {"rescale_factor": 1 / 127.5, "image_mean": [0.3, 0.4, 0.5], "image_std": [0.5, 1.0, 1.5]},
        ),
    ],
)
def test_the_files_beside_are_taken_as_their_libraries_take_them(
    tmp_path: Path, name: str, content: dict
) -> None:
    """The definition: (x rescale_factor - mean) / std, without the mean and std unless do_normalize."""
    write(tmp_path / "model.safetensors", "conv1.weight")
    (tmp_path / name).write_text(json.dumps(content))
    images = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), np.uint8)
    wanted = images * content.get("rescale_factor", 1 / 255)
    if content.get("do_normalize", True):
        values = content.get("pretrained_cfg", content)
        wanted = (wanted - values.get("image_mean", values.get("mean"))) / values.get(
            "image_std", values.get("std")
        )
    preprocess = locate.fitted(str(tmp_path), registry.build("resnet50")).preprocess
    np.testing.assert_allclose(preprocess(jnp.asarray(images)), wanted, atol=1e-5)


def test_the_setting_says_more_than_the_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "r50_1x_sk0.pth")
    encoder = registry.build("resnet50")
    assert locate.fitted(str(path), encoder, "half").preprocess == HALF
    assert locate.fitted("taher2021:simclr-v2", encoder, "127.5,127.5").preprocess == HALF
    assert locate.fitted("random", encoder, "half").preprocess == HALF


def test_weights_of_a_strategy_do_not_take_the_studys_normalisation(tmp_path: Path) -> None:
    study = locate.fitted("taher2021:simclr-v2", registry.build("resnet50"))
    assert study.preprocess == UNIT
    assert (
        locate.fitted(str(write(tmp_path / "plain.safetensors", "conv1.weight")), study).preprocess
        == IMAGENET
    )
    assert locate.fitted("imagenet", study).preprocess == IMAGENET


# ---- what is remembered and what is said
# ------------------------------------------------------------------------------


def test_our_own_files_remember(tmp_path: Path) -> None:
    encoder = registry.build("resnet18").truncate("stage1/block1").with_preprocess(UNIT)
    params, batch_stats = Classifier(encoder, 2).init(0)
    export.write(tmp_path / "w.safetensors", params, batch_stats, encoder)
    plain = registry.build("resnet18").truncate("stage1/block1")
    spec = str(tmp_path / "w.safetensors")
    fitted = locate.fitted(spec, plain)
    assert fitted.preprocess == UNIT == locate.remembered(Path(spec))
    report = locate.load(spec, Classifier(fitted, 2), seed=0)[2]
    assert (
        report.normalisation
        == "unit (x - [0, 0, 0]) / [255, 255, 255], x from 0 to 255 (as the file remembers)"
    )
    export.write_named(
        tmp_path / "torchvision.safetensors", encoder, params, batch_stats, tables.schemes("resnet18")[1]
    )
    with safetensors.safe_open(tmp_path / "torchvision.safetensors", "numpy") as file:
        assert normalisation.from_metadata(file.metadata(), "x") == UNIT
    # A name that says otherwise does not count against what the file remembers.
    (tmp_path / "RadImageNet.safetensors").write_bytes(Path(spec).read_bytes())
    assert locate.fitted(str(tmp_path / "RadImageNet.safetensors"), plain).preprocess == UNIT


def test_every_report_says_how_images_are_normalised_and_who_says_so(tmp_path: Path) -> None:
    encoder = registry.build("resnet18").truncate("stage1/block1")
    scheme = tables.schemes("resnet18")[1]
    params, batch_stats = Classifier(encoder, 2).init(0)
    arrays = export.named(encoder, params, batch_stats, scheme)
    path = write_zip(
        tmp_path / "w.pth",
        {key: tensor(a, key) for key, a in arrays.items()},
        {key: a.tobytes() for key, a in arrays.items()},
    )

    def said(preprocess: str = "", file: Path = path) -> str:
        return locate.load(str(file), Classifier(locate.fitted(str(file), encoder, preprocess), 2), seed=0)[
            2
        ].normalisation

    assert "imagenet (x - [123.675, 116.28, 103.53])" in said()
    assert (
        "(the default of resnet18; nothing tells what these weights expect: model.preprocess can)" in said()
    )
    assert (
        said("half")
        == "half (x - [127.5, 127.5, 127.5]) / [127.5, 127.5, 127.5], x from 0 to 255 (by model.preprocess)"
    )
    named = path.rename(tmp_path / "resnet50-1x.pth")
    assert said(file=named).endswith("(taher2021:simclr-v1, by its file name)")
    assert "(by model.preprocess; taher2021:simclr-v1, by its file name: unit " in said("half", named)
    assert flatten(params)
