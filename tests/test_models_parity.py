"""Logits and levels equal those of the original implementations, with the same weights under the original's names."""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier, pool
from dapt_jax.models.decoders.unet import Gate
from dapt_jax.models.encoder import DEFAULT, Encoder
from dapt_jax.models.encoders import convnext, densenet, efficientnet, resnet, swin, vit
from dapt_jax.models.segmenter import Segmenter
from dapt_jax.weights.merge import merge
from dapt_jax.weights.paths import flatten, unflatten
from tests.fixtures import make_parity, parity

pytestmark = pytest.mark.long


def residual(name: str, depths, flavour=resnet.TORCHVISION, shape=resnet.PLAIN) -> Encoder:
    return resnet.network(name, resnet.Bottleneck, depths, flavour, DEFAULT, shape)


def transformer(name: str, variant: vit.Variant) -> Encoder:
    return vit.network(name, vit.Size(32, 4, 2), variant._replace(patch=8, image_size=32), DEFAULT)


def gated() -> Encoder:
    stages = [
        row._replace(blocks=blocks)
        for row, blocks in zip(efficientnet.B0, (1, 1, 2, 1, 1, 2, 1), strict=True)
    ]
    return efficientnet.network("efficientnet_b0", stages, efficientnet.PYTORCH, DEFAULT)


def dense(name: str, norm: densenet.Norm) -> Encoder:
    return densenet.network(name, (2, 2, 2, 2), norm, DEFAULT)


def next_generation() -> Encoder:
    return convnext.network("convnext_tiny", (1, 2, 1, 1), (16, 32, 48, 64), DEFAULT)


def windows() -> Encoder:
    return swin.network("swin_tiny", 16, (2, 2), (2, 4), DEFAULT)


# Case -> (our encoder, side of the image).
ENCODERS: dict[str, tuple[Callable[[], Encoder], int]] = {
    "resnet18": (lambda: registry.build("resnet18"), 64),
    "resnet50": (lambda: residual("resnet50", (1, 2, 1, 1)), 64),
    "wide_resnet50_2": (lambda: residual("wide_resnet50_2", (1, 1, 1, 1), shape=resnet.Shape(base=128)), 64),
    "resnext50": (lambda: residual("resnext50", (1, 1, 1, 1), shape=resnet.Shape(groups=32, base=4)), 64),
    "resnet50d": (lambda: residual("resnet50d", (1, 2, 1, 1), resnet.TORCHVISION_D), 72),
    "resnet50_keras": (lambda: registry.build("resnet50_keras"), 64),
    "densenet121": (lambda: dense("densenet121", densenet.TORCHVISION), 72),
    "densenet121_keras": (lambda: dense("densenet121_keras", densenet.KERAS), 64),
    "efficientnet_b0": (gated, 72),
    "efficientnet_lite1": (lambda: registry.build("efficientnet_lite1"), 64),
    "efficientnet_b0_keras": (lambda: registry.build("efficientnet_b0_keras"), 64),
    "convnext_tiny": (next_generation, 64),
    "convnext_tiny_timm": (next_generation, 64),
    "vit_small": (lambda: transformer("vit_small", vit.SUPERVISED), 32),
    "vit_small_larger_image": (lambda: transformer("vit_small", vit.SUPERVISED), 56),
    "vit_small_smaller_image": (lambda: transformer("vit_small", vit.SUPERVISED), 16),
    "vit_small_torchvision": (lambda: transformer("vit_small", vit.SUPERVISED), 32),
    "vit_small_dinov2_registers": (
        lambda: transformer("vit_small_dinov2_registers", vit.DINOV2_REGISTERS),
        32,
    ),
    "vit_small_dinov3": (lambda: transformer("vit_small_dinov3", vit.DINOV3), 48),
    "swin_tiny": (windows, 72),
    "swin_tiny_timm": (windows, 112),
    "unet": (lambda: registry.build("unet"), 32),
}


def close(ours, theirs) -> None:
    """Equal to 1e-4 of the value, or where values cancel, to 1e-5 of the largest."""
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def drawn(stored: parity.Stored, *, keras: bool = False) -> dict[str, np.ndarray]:
    return {name: parity.values(name, shape, keras=keras) for name, shape in stored.shapes.items()}


@pytest.mark.parametrize("case", ENCODERS)
def test_logits_and_levels_are_those_of_the_original(case: str) -> None:
    make, side = ENCODERS[case]
    encoder, stored = make(), parity.load(case)
    is_headless = case == "unet"
    model = Classifier(encoder, parity.OUTPUTS)
    source = drawn(stored, keras=case.endswith("_keras"))
    params, batch_stats, report = merge(model, source, seed=0, head="new" if is_headless else "load")
    assert not report.left_over

    @jax.jit
    def run(params, batch_stats, images):
        x, maps, _ = encoder.run(params, batch_stats, encoder.preprocess(images))
        pooled = pool(x)
        logits = pooled if is_headless else model.suffix(params, batch_stats, pooled, len(encoder.groups))[0]
        return list(maps.values()), logits

    maps, logits = run(params, batch_stats, parity.images(side))
    assert [tuple(level.shape) for level in maps] == [shape for shape, _ in stored.levels]
    assert [level.shape[-1] for level in maps] == [level.features for level in encoder.pyramid_levels]
    for ours, (_, theirs) in zip(maps, stored.levels, strict=True):
        close(parity.sampled(ours), theirs)
    close(parity.sampled(logits), stored.logits)


def of_decoder(segmenter: Segmenter, source: dict[str, np.ndarray], name: Callable[[str], str]):
    """Parameters and statistics of a segmenter from a file of segmentation_models_pytorch."""
    body = {
        key.removeprefix("encoder."): array for key, array in source.items() if key.startswith("encoder.")
    }
    *loaded, report = merge(Classifier(segmenter.encoder, 1), body, seed=0)
    assert not report.left_over
    trees = []
    for encoder, shapes in zip(loaded, segmenter.abstract(), strict=True):
        arrays = {}
        for path, leaf in flatten(shapes).items():
            if path.startswith(("decoder/", "head/")):
                module, _, ending = path.rpartition("/")
                torch_ending = {
                    "kernel": "weight",
                    "scale": "weight",
                    "mean": "running_mean",
                    "var": "running_var",
                }
                array = source.pop(f"{name(module)}.{torch_ending.get(ending, ending)}")
                arrays[path] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
                assert arrays[path].shape == leaf.shape
        trees.append(segmenter.adopt(unflatten(arrays), encoder))
    assert all(key.startswith("encoder.") for key in source)
    return trees


def smp_unet(module: str) -> str:
    if module == "head/conv":
        return "segmentation_head.0"
    _, block, conv, kind = module.split("/")
    return f"decoder.blocks.{int(block[-1]) - 1}.{conv}.{int(kind == 'norm')}"


def smp_upernet(module: str) -> str:
    if module == "head/conv":
        return "segmentation_head.0"
    _, step, *parts = module.split("/")
    layer = int(parts[-1] == "norm")
    if step == "pool":
        if parts == ["norm"]:
            return "decoder.feature_norms.3"
        return (
            f"decoder.psp.out_conv.{layer}"
            if parts[0] == "fuse"
            else f"decoder.psp.blocks.{parts[1]}.1.{layer}"
        )
    if step == "fuse":
        return (
            f"decoder.fusion_block.{layer}"
            if parts[0] == "fuse"
            else f"decoder.fpn_conv_blocks.{parts[1]}.{layer}"
        )
    number = int(step[-1]) - 1
    if parts == ["norm"]:
        return f"decoder.feature_norms.{2 - number}"
    return f"decoder.fpn_lateral_blocks.{number}.conv_norm_relu.{layer}"


def test_unet_on_resnet18_is_that_of_segmentation_models_pytorch() -> None:
    stored = parity.load("unet_on_resnet18")
    segmenter = Segmenter(registry.build("resnet18"), 2)
    params, batch_stats = of_decoder(segmenter, drawn(stored), smp_unet)
    logits = jax.jit(segmenter)(params, batch_stats, parity.images(64))
    assert logits.shape == (1, 64, 64, 2)
    close(parity.sampled(logits), stored.logits)


def test_upernet_on_resnet18_is_that_of_segmentation_models_pytorch() -> None:
    stored = parity.load("upernet_on_resnet18")
    segmenter = Segmenter(registry.build("resnet18"), 2, "upernet")
    params, batch_stats = of_decoder(segmenter, drawn(stored), smp_upernet)
    last = len(segmenter.groups) - 1
    x = jax.jit(lambda p, s, images: segmenter.prefix(p, s, images, last)["x"])(
        params, batch_stats, parity.images(64)
    )
    ((shape, values),) = stored.levels
    assert x.shape == shape
    close(parity.sampled(x), values)
    head = params["head"]["conv"]
    close(parity.sampled(np.asarray(x) @ head["kernel"][0, 0] + head["bias"]), stored.logits)


def test_the_gate_is_that_of_monai() -> None:
    stored = parity.load("attention_gate")
    source = drawn(stored)
    gate = Gate(6, 8)
    names = {"W_g.0.conv": gate.signal, "W_x.0.conv": gate.map, "psi.0.conv": gate.weight}
    names |= {"W_g.1": gate.norm_signal, "W_x.1": gate.norm_map, "psi.1": gate.norm_weight}
    for name, layer in names.items():
        weight = source[f"{name}.weight"]
        if weight.ndim == 4:
            layer.kernel[...] = weight.transpose(2, 3, 1, 0)
        else:
            layer.scale[...] = weight
            layer.mean[...], layer.var[...] = source[f"{name}.running_mean"], source[f"{name}.running_var"]
        layer.bias[...] = source[f"{name}.bias"]
    rng = np.random.default_rng(0)
    signal, x = (rng.standard_normal((1, c, 4, 4)).astype(np.float32).transpose(0, 2, 3, 1) for c in (6, 8))
    close(parity.sampled(gate(jnp.asarray(signal), jnp.asarray(x), "frozen")), stored.logits)


def package_of(case: str) -> str:
    if case.endswith("_keras"):
        return "keras"
    if case.endswith("_on_resnet18"):
        return "segmentation_models_pytorch"
    if case == "attention_gate":
        return "monai"
    is_torchvision = case == "vit_small_torchvision" or not case.startswith(
        ("vit_", "resnet50d", "efficientnet_lite")
    )
    return "torchvision" if is_torchvision and not case.endswith("_timm") else "timm"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras on torch
@pytest.mark.parametrize("case", make_parity.CASES)
def test_what_is_stored_is_what_the_original_computes(case: str) -> None:
    """Where the originals are installed; elsewhere the stored values stand for them."""
    for name in ("torch", package_of(case)):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    stored, result = parity.load(case), make_parity.CASES[case]()
    assert stored.shapes == dict(result.shapes)
    close(parity.sampled(result.logits), stored.logits)
    for ours, (shape, theirs) in zip(result.levels, stored.levels, strict=True):
        assert ours.shape == shape
        close(parity.sampled(ours), theirs)
