"""Weights for another number of channels, grid or window: adapted, and said so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import DEFAULT, Encoder, Options
from dapt_jax.models.encoders import swin, vit
from dapt_jax.weights import adapt, tables
from dapt_jax.weights.merge import merge
from dapt_jax.weights.paths import flatten


def source_of(encoder: Encoder, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of an encoder under the first names that are not ours."""
    model = Classifier(encoder, 1)
    params, batch_stats = model.init(seed)
    arrays = flatten(params) | flatten(batch_stats)
    entries = tables.table(tables.schemes(encoder.name)[1], model)
    return {entry.key: entry.restore(arrays[path]) for path, entry in entries.items()}


@pytest.mark.parametrize("stem", ["sum", "repeat"])
@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("name", ["resnet18", "resnet50d"])
def test_a_stem_for_other_channels_answers_grey_as_before(name: str, channels: int, stem: str) -> None:
    encoder = registry.build(name).truncate("stem")
    other = registry.build(name, Options(channels=channels)).truncate("stem")
    source = source_of(encoder)
    params, batch_stats, _ = merge(Classifier(encoder, 1), source, seed=0)
    adapted, _, report = merge(Classifier(other, 1), source, seed=0, stem=stem)
    kernel = adapt.first_kernel(other)
    assert report.adapted[0].startswith(f"{kernel}: stem ")
    assert f"from 3 channels to {channels}" in str(report)
    grey = jnp.asarray(np.random.default_rng(0).standard_normal((1, 16, 16, 1)), jnp.float32)
    if (channels, stem) == (2, "repeat"):
        return  # of three channels two are taken: nothing is left of the third
    before, _ = encoder.apply(*jax.tree.map(jnp.asarray, (params, batch_stats)), jnp.repeat(grey, 3, 3))
    after, _ = other.apply(*jax.tree.map(jnp.asarray, (adapted, batch_stats)), jnp.repeat(grey, channels, 3))
    if channels == 1 and stem == "repeat":
        assert np.abs(after - before).max() > 0
    else:
        np.testing.assert_allclose(after, before, atol=1e-5)


def test_preprocessing_of_other_channels() -> None:
    three = registry.build("resnet50_keras").preprocess
    assert three.for_channels(1).mean == (sum(three.mean) / 3,)
    five = three.for_channels(5)
    assert five.mean == (*three.mean, *three.mean[:2])
    x = np.arange(5.0).reshape(1, 1, 1, 5)
    np.testing.assert_allclose(five(x)[0, 0, 0], np.array([2, 1, 0, 3, 4]) - np.array(five.mean), rtol=1e-6)


def test_positions_of_another_grid_are_resampled_once_as_while_running() -> None:
    def make(side: int) -> Encoder:
        return vit.network(
            "vit_small", vit.Size(16, 1, 2), vit.MAE._replace(patch=4, image_size=side), DEFAULT
        )

    source = source_of(make(16))
    images = np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3)).astype(np.float32)
    outputs = []
    for side in (16, 24):
        params, batch_stats, report = merge(Classifier(make(side), 1), source, seed=0)
        outputs.append(jax.jit(Classifier(make(side), 1))(params, batch_stats, images))
    assert report.adapted == ("stem/position: positions resampled from 4 x 4 to 6 x 6 patches",)
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_biases_of_another_window_are_resampled() -> None:
    encoder = swin.network("swin_tiny", 8, (1, 1), (1, 2), DEFAULT)
    source = source_of(encoder)
    ours = source["features.1.0.attn.relative_position_bias_table"]
    larger = np.repeat(np.repeat(ours.reshape(13, 13, 1), 2, 0), 2, 1)[:23, :23]
    source["features.1.0.attn.relative_position_bias_table"] = larger.reshape(529, 1)
    params, _, report = merge(Classifier(encoder, 1), source, seed=0)
    assert report.adapted == (
        "stage1/block1/relative_bias: biases resampled from a window of 12 x 12 to 7 x 7",
    )
    assert params["stage1"]["block1"]["relative_bias"].shape == (169, 1)
    constant = adapt.way(encoder, "stage1/block1/relative_bias", (529, 1), (169, 1))
    assert constant is not None
    np.testing.assert_allclose(constant.convert(np.full((529, 1), 3.0, np.float32)), 3, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "shape"),
    [("conv1.weight", (64, 3, 5, 5)), ("layer1.0.conv1.weight", (64, 32, 3, 3)), ("bn1.weight", (32,))],
)
def test_other_differences_are_mistakes(key: str, shape: tuple[int, ...]) -> None:
    source = source_of(registry.build("resnet18"))
    source[key] = np.zeros(shape, np.float32)
    with pytest.raises(UserError, match="has shape"):
        merge(Classifier(registry.build("resnet18"), 1), source, seed=0)


def test_unknown_stems_name_the_nearest() -> None:
    encoder = registry.build("resnet18", Options(channels=1))
    with pytest.raises(UserError, match="unknown stem 'summ'; did you mean 'sum'"):
        merge(Classifier(encoder, 1), source_of(registry.build("resnet18")), seed=0, stem="summ")  # type: ignore[arg-type]
