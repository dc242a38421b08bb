"""The encoders: parameter counts, groups, and logits against PyTorch's."""

import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Encoder, get_group
from dapt_jax.weights.merge import merge
from dapt_jax.weights.paths import flatten
from tests.fixtures.make_logits import images, values

FIXTURE = Path(__file__).parent / "fixtures" / "logits.npz"


def count(tree, keep=lambda path: True) -> int:
    return sum(int(np.prod(leaf.shape)) for path, leaf in flatten(tree).items() if keep(path))


def is_norm(path: str) -> bool:
    return path.split("/")[-2].startswith("norm")


def total(encoder: Encoder) -> int:
    """Parameters and statistics with one logit, as Keras counts."""
    return sum(map(count, Classifier(encoder, 1).abstract()))


def trainable(encoder: Encoder, *groups: str) -> int:
    """Parameters other than batch norm's of some groups, and the head's."""
    params, _ = Classifier(encoder, 1).abstract()
    parts = groups or encoder.groups
    return sum(
        count(get_group(params, group), lambda path: not is_norm(f"x/{path}")) for group in (*parts, "head")
    )


def test_keras_resnet50_counts_as_in_mehmood_2022() -> None:
    encoder = registry.build("resnet50_keras")
    assert total(encoder) == 23_589_761
    assert trainable(encoder) == 23_483_521
    assert trainable(encoder, "stage4/block3") == 4_461_569
    assert trainable(encoder, "stage4/block2", "stage4/block3") == 8_921_089


@pytest.mark.parametrize(
    ("after", "everything", "trained"),
    [("stage1/block3", 230_017, 224_129), ("stage2/block4", 1_460_609, 1_440_385)],
)
def test_simplified_resnet50_counts_as_in_mehmood_2022(after: str, everything: int, trained: int) -> None:
    encoder = registry.build("resnet50_keras").truncate(after)
    assert total(encoder) == everything
    assert trainable(encoder) == trained


def test_groups_of_lite0() -> None:
    groups = registry.build("efficientnet_lite0").groups
    assert groups[:4] == ("stem", "stage1/block1", "stage2/block1", "stage2/block2")
    assert groups[-2:] == ("stage7/block1", "top")
    assert len(groups) == 18


def test_groups_of_resnet50() -> None:
    groups = registry.build("resnet50").groups
    assert groups[:2] == ("stem", "stage1/block1")
    assert groups[-1] == "stage4/block3"
    assert len(groups) == 17


CONVOLUTIONAL = [name for name in registry.names() if not name.startswith("vit_")]
SMALL = [
    "efficientnet_lite0",
    "efficientnet_b0",
    "resnet18",
    "resnet50d",
    "resnet50_keras",
    "densenet121",
    "convnext_tiny",
    "swin_tiny",
    "unet",
]


@pytest.mark.parametrize(
    ("name", "side"), [*((name, 64) for name in CONVOLUTIONAL), *((name, 97) for name in SMALL)]
)
def test_features_and_reduction_are_as_declared(name: str, side: int) -> None:
    encoder = registry.build(name)
    params, batch_stats = encoder.abstract()

    def outputs(params, batch_stats, x):
        found = []
        for index in range(len(encoder.specs)):
            x, _ = encoder.apply(params, batch_stats, x, start=index, stop=index + 1)
            found.append(x)
        return found

    found = jax.eval_shape(outputs, params, batch_stats, jax.ShapeDtypeStruct((1, side, side, 3), np.float32))
    for spec, x in zip(encoder.specs, found, strict=True):
        assert x.shape[::3] == (1, spec.features), spec.name
        # Padded layers round an odd side up, others down; without a reduction the map is one pixel.
        assert (
            x.shape[1] == 1
            if not spec.reduction
            else abs(x.shape[1] * spec.reduction - side) < spec.reduction
        )


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'resnet50'"):
        registry.build("resnet5O")


def seeded(model: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The weights that the fixture's logits were made with, and the logits."""
    with np.load(FIXTURE) as stored:
        names, logits = stored[f"{model}/names"], stored[f"{model}/logits"]
        shapes = [tuple(map(int, shape.split("x"))) for shape in stored[f"{model}/shapes"]]
        fans = stored[f"{model}/fans"]
    return {str(n): values(str(n), s, int(f)) for n, s, f in zip(names, shapes, fans, strict=True)}, logits


@pytest.mark.parametrize("model", ["resnet18", "resnet50", "resnet50_keras", "efficientnet_lite0"])
def test_logits_are_those_of_pytorch(model: str) -> None:
    source, expected = seeded(model)
    classifier = Classifier(registry.build(model), 10)
    params, batch_stats, report = merge(classifier, source, seed=0, head="load")
    assert not report.left_over
    logits = jax.jit(classifier)(params, batch_stats, images())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_fixture_is_drawn_by_name_alone() -> None:
    one = values("conv1.weight", (2, 2, 1, 1), 2)
    rng = np.random.default_rng([20220427, zlib.crc32(b"conv1.weight")])
    np.testing.assert_array_equal(one, rng.standard_normal((2, 2, 1, 1)).astype(np.float32))
