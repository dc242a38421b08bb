"""Names and shapes in torchvision, timm and Keras of every array of every model, where these are installed."""

import importlib.util
import os
from collections.abc import Callable

import numpy as np
import pytest

from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.weights import tables
from dapt_jax.weights.export import Library, libraries
from dapt_jax.weights.paths import flatten

CLASSES = 10
LIBRARIES = [(model, library) for model in registry.names() for library in libraries(registry.build(model))]


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def state(library: Library) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a library's model; nothing is computed."""
    import torch

    with torch.device("meta"):
        if library.name == "timm":
            import timm

            model = timm.create_model(library.model, num_classes=CLASSES)
        else:
            import torchvision

            model = torchvision.models.get_model(library.model, num_classes=CLASSES)
    shapes = {key: tuple(array.shape) for key, array in model.state_dict().items()}
    counters = ("num_batches_tracked", "relative_position_index")
    return {key: shape for key, shape in shapes.items() if not key.endswith(counters)}


def ours(model: str, scheme: tables.Scheme) -> dict[str, tuple[int, ...]]:
    """What a scheme makes of a model's arrays."""
    classifier = Classifier(registry.build(model), CLASSES)
    params, batch_stats = classifier.abstract()
    entries = tables.table(scheme, classifier)
    shapes = {path: leaf.shape for path, leaf in (flatten(params) | flatten(batch_stats)).items()}
    empty = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    return {entry.key: tuple(entry.restore(empty[path]).shape) for path, entry in entries.items()}


@pytest.mark.parametrize(
    ("model", "library"), LIBRARIES, ids=[f"{model}-{library.name}" for model, library in LIBRARIES]
)
def test_names_and_shapes_are_the_library_s(model: str, library: Library) -> None:
    need("torch")
    need(library.name)
    assert ours(model, library.scheme) == state(library)


def test_names_of_the_authors_files_are_those_that_timm_understands() -> None:
    """timm reads the files of ConvNeXt's, Swin's, DINOv2's and DINOv3's authors by renaming: to the names that it uses."""
    need("timm")
    import timm
    import torch
    from timm.models import convnext, eva, swin_transformer, vision_transformer

    cases: list[tuple[str, str, str, Callable]] = [
        ("convnext_tiny", "facebookresearch/ConvNeXt", "convnext_tiny", convnext.checkpoint_filter_fn),
        (
            "swin_tiny",
            "microsoft/Swin-Transformer",
            "swin_tiny_patch4_window7_224",
            swin_transformer.checkpoint_filter_fn,
        ),
        (
            "vit_small_dinov2_registers",
            "DINOv2",
            "vit_small_patch14_reg4_dinov2",
            vision_transformer.checkpoint_filter_fn,
        ),
        ("vit_small_dinov3", "DINOv3", "vit_small_patch16_dinov3", eva.checkpoint_filter_fn),
    ]
    for model, authors, theirs, rename in cases:
        scheme = {scheme.name: scheme for scheme in tables.schemes(model)}
        extra = {
            "vit_small_dinov2_registers": {"mask_token": (1, 384)},
            "vit_small_dinov3": {"rope_embed.periods": (16,)},
        }
        with torch.device("meta"):
            shapes = ours(model, scheme[authors]) | extra.get(model, {})
            named = {key: torch.zeros(shape) for key, shape in shapes.items()}
            made = rename(named, timm.create_model(theirs, num_classes=CLASSES))
        expected = ours(model, scheme["timm"])
        heads = {key for key in made if "head" in key} | {key for key in expected if "head" in key}
        shapes = {key: tuple(array.shape) for key, array in made.items() if key not in heads}
        assert shapes == {key: shape for key, shape in expected.items() if key not in heads}, model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("model", "theirs"),
    [
        ("resnet101_keras", "ResNet101"),
        ("densenet121_keras", "DenseNet121"),
        ("efficientnet_b0_keras", "EfficientNetB0"),
    ],
)
def test_names_and_shapes_are_those_of_keras(model: str, theirs: str) -> None:
    need("keras")
    need("torch")
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    built = getattr(keras.applications, theirs)(weights=None, classes=CLASSES)
    found = {
        weight.path: tuple(weight.shape)
        for weight in built.weights
        if not weight.path.startswith("normalization")
    }
    assert ours(model, tables.schemes(model)[1]) == found
