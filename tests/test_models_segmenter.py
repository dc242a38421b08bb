"""Segmenters: split anywhere, nothing kept that is not read, sizes, counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.errors import UserError
from dapt_jax.models import decoders, registry
from dapt_jax.models.resize import bilinear, nearest
from dapt_jax.models.segmenter import Segmenter
from tests import tiny


@pytest.fixture(scope="module", params=sorted(decoders.BUILDERS))
def model(request):
    segmenter = Segmenter(tiny.encoder(), 3, request.param)
    return segmenter, *jax.tree.map(jnp.asarray, segmenter.init(0))


def pictures() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8))


def test_logits_are_as_large_as_the_images(model) -> None:
    segmenter, params, stats = model
    logits = jax.eval_shape(segmenter, params, stats, pictures())
    assert logits.shape == (2, 16, 16, 3)
    assert logits.dtype == jnp.float32


def test_split_at_any_boundary_nothing_changes(model) -> None:
    segmenter, params, stats = model
    whole = np.asarray(jax.jit(segmenter)(params, stats, pictures()))
    assert whole.std() > 0
    for boundary in range(len(segmenter.groups)):
        kept = segmenter.prefix(params, stats, pictures(), boundary)
        logits, after = segmenter.suffix(params, stats, kept, boundary)
        np.testing.assert_allclose(logits, whole, atol=1e-5, err_msg=segmenter.groups[boundary])
        assert after is stats


def test_what_lies_at_a_boundary_is_read_behind_it(model) -> None:
    segmenter, params, stats = model
    for boundary in range(len(segmenter.groups)):
        kept = segmenter.prefix(params, stats, pictures(), boundary)

        def total(kept, boundary=boundary):
            return jnp.square(segmenter.suffix(params, stats, kept, boundary)[0]).sum()

        for path, gradient in jax.tree.leaves_with_path(jax.grad(total)(kept)):
            assert np.abs(gradient).sum() > 0, (segmenter.groups[boundary], path)


def test_norms_of_the_decoder_follow_their_group(model) -> None:
    segmenter, params, stats = model
    name = next(name for name in segmenter.groups if name in segmenter.groups[3:-1])
    kept = segmenter.prefix(params, stats, pictures(), 3)
    _, after = segmenter.suffix(params, stats, kept, 3, {name: "train"})
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), (_, new) in zip(
            jax.tree.leaves_with_path(stats), jax.tree.leaves_with_path(after), strict=True
        )
        if not np.array_equal(old, new)
    }
    assert all(path.startswith(f"{name}/") for path in changed)
    before = {path for path, _ in jax.tree.leaves_with_path(stats)}
    assert changed or not any(str(path).startswith(name) for path in before)


@pytest.mark.parametrize(
    ("encoder", "parameters"),
    # segmentation_models_pytorch's counts with one class
    [("resnet18", 14_328_209), ("resnet34", 24_436_369), ("resnet50", 32_521_105)],
)
def test_unets_have_the_published_number_of_parameters(encoder: str, parameters: int) -> None:
    params, _ = Segmenter(registry.build(encoder), 1).abstract()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


def test_images_of_another_size_name_the_nearest(model) -> None:
    segmenter, params, stats = model
    with pytest.raises(UserError, match=r"20 x 16 pixels.*multiples of 8, such as 16 x 16"):
        segmenter.prefix(params, stats, np.zeros((1, 20, 16, 3), np.uint8), 0)


def test_unknown_decoders_name_the_nearest() -> None:
    with pytest.raises(UserError, match="no decoder 'unett'; did you mean 'unet'"):
        Segmenter(tiny.encoder(), 3, "unett")


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.integers(1, 30))
def test_bilinear_is_that_of_jax(height: int, width: int, high: int, wide: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)
    expected = jax.image.resize(x, (2, high, wide, 3), "bilinear", antialias=False)
    np.testing.assert_allclose(bilinear(x, (high, wide)), expected, atol=1e-5)


def test_nearest_repeats() -> None:
    x = np.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(nearest(x, 2)[0, :, :, 0], np.kron(x[0, :, :, 0], np.ones((2, 2))))
