"""Segmenters: split anywhere, nothing kept that is not read, sizes, counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval as pe

from dapt_jax.errors import UserError
from dapt_jax.models import decoders, registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.resize import bilinear, nearest
from dapt_jax.models.segmenter import Segmenter
from dapt_jax.weights.paths import flatten
from tests import tiny


@pytest.fixture(scope="module", params=sorted(decoders.BUILDERS))
def model(request):
    segmenter = Segmenter(tiny.encoder(), 3, request.param)
    return segmenter, *jax.tree.map(jnp.asarray, segmenter.init(0))


def pictures() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8))


def test_logits_are_as_large_as_the_images(model) -> None:
    segmenter, params, batch_stats = model
    logits = jax.eval_shape(segmenter, params, batch_stats, pictures())
    assert logits.shape == (2, 16, 16, 3)
    assert logits.dtype == jnp.float32


def test_split_at_any_boundary_nothing_changes(model) -> None:
    segmenter, params, batch_stats = model

    @jax.jit
    def run(params, batch_stats, images):
        activations = segmenter.activations_at_boundaries(params, batch_stats, images)
        suffixes = [
            segmenter.suffix(params, batch_stats, kept, boundary)[0]
            for boundary, kept in enumerate(activations)
        ]
        prefixes = [
            segmenter.prefix(params, batch_stats, images, boundary) for boundary in range(len(activations))
        ]
        return segmenter(params, batch_stats, images), suffixes, activations, prefixes

    whole, suffixes, activations, prefixes = run(params, batch_stats, pictures())
    assert whole.std() > 0
    assert len(activations) == len(segmenter.groups)
    for boundary, logits in enumerate(suffixes):
        np.testing.assert_allclose(logits, whole, atol=1e-5, err_msg=segmenter.groups[boundary])
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), activations, prefixes)


def test_what_lies_at_a_boundary_is_read_behind_it(model) -> None:
    segmenter, params, batch_stats = model
    for boundary, kept in enumerate(
        jax.eval_shape(segmenter.activations_at_boundaries, params, batch_stats, pictures())
    ):
        suffix = jax.make_jaxpr(lambda kept, at=boundary: segmenter.suffix(params, batch_stats, kept, at)[0])(
            kept
        )
        _, used = pe.dce_jaxpr(suffix.jaxpr, [True])
        assert all(used), (segmenter.groups[boundary], jax.tree.map(jnp.shape, kept))


def test_norms_of_the_decoder_follow_their_group(model) -> None:
    segmenter, params, batch_stats = model
    name = segmenter.groups[3]
    kept = segmenter.prefix(params, batch_stats, pictures(), 3)
    after = jax.jit(
        lambda params, batch_stats, kept: segmenter.suffix(params, batch_stats, kept, 3, {name: "train"})[1]
    )(params, batch_stats, kept)
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), (_, new) in zip(
            jax.tree.leaves_with_path(batch_stats), jax.tree.leaves_with_path(after), strict=True
        )
        if not np.array_equal(old, new)
    }
    assert all(path.startswith(f"{name}/") for path in changed)
    before = {path for path, _ in jax.tree.leaves_with_path(batch_stats)}
    assert changed or not any(str(path).startswith(name) for path in before)


@pytest.mark.parametrize(
    ("encoder", "parameters"),
    # segmentation_models_pytorch's counts with one class
    [("resnet18", 14_328_209), ("resnet34", 24_436_369), ("resnet50", 32_521_105)],
)
def test_unets_have_the_published_number_of_parameters(encoder: str, parameters: int) -> None:
    params, _ = Segmenter(registry.build(encoder), 1).abstract()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize("decoder", sorted(decoders.BUILDERS))
@pytest.mark.parametrize(
    ("encoder", "side"),
    [
        ("resnet18", 64),
        ("densenet121", 64),
        ("efficientnet_b0", 32),
        ("convnext_tiny", 64),
        ("swin_tiny", 96),
        ("unet", 48),
        ("vit_small", 64),
        ("vit_small_dinov2", 224),
        ("vit_small_dinov3", 96),
    ],
)
def test_every_decoder_fits_on_every_family(encoder: str, side: int, decoder: str) -> None:
    segmenter = Segmenter(registry.build(encoder), 2, decoder, dtype="bfloat16")
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    logits = jax.eval_shape(segmenter, *segmenter.abstract(), images)
    assert logits.shape == (1, side, side, 2)
    assert logits.dtype == jnp.float32
    kept = jax.eval_shape(segmenter.activations_at_boundaries, *segmenter.abstract(), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.bfloat16.dtype}


@pytest.mark.parametrize("decoder", sorted(decoders.BUILDERS))
@pytest.mark.parametrize(
    ("encoder", "after", "side"),
    [
        ("vit_small", "block2", 64),  # tokens of one level
        ("vit_small_dinov2", "block3", 224),
        ("vit_small", "block4", 64),
        ("unet", "stage1", 16),  # a map of one level
        ("densenet121", "stem", 64),
    ],
)
def test_every_decoder_fits_on_truncated_encoders(encoder: str, after: str, side: int, decoder: str) -> None:
    segmenter = Segmenter(registry.build(encoder).truncate(after), 2, decoder)
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    assert jax.eval_shape(segmenter, *segmenter.abstract(), images).shape == (1, side, side, 2)


def test_an_encoder_without_a_map_is_refused() -> None:
    with pytest.raises(
        UserError, match="'vit_small' truncated after 'stem' has no feature map for a decoder"
    ):
        Segmenter(registry.build("vit_small").truncate("stem"), 2)


def test_images_of_another_size_name_the_nearest(model) -> None:
    segmenter, params, batch_stats = model
    with pytest.raises(UserError, match=r"20 x 16 pixels.*multiples of 8, such as 16 x 16"):
        segmenter.prefix(params, batch_stats, np.zeros((1, 20, 16, 3), np.uint8), 0)


def test_an_encoder_is_adopted_whole_and_nothing_else_of_it() -> None:
    encoder = registry.build("efficientnet_lite0")
    segmenter, classifier = Segmenter(encoder, 2), Classifier(encoder, 5)
    params, batch_stats = segmenter.init(0)
    own, other = flatten(params), flatten(classifier.init(1)[0])
    adopted = flatten(segmenter.adopt(params, classifier.init(1)[0]))
    assert set(adopted) == set(own)
    for path, leaf in adopted.items():
        assert (
            leaf is own[path] if path.startswith(("decoder/", "head/")) else np.array_equal(leaf, other[path])
        )
    assert jax.tree.structure(segmenter.adopt(batch_stats, classifier.init(1)[1])) == jax.tree.structure(
        batch_stats
    )


def test_unknown_decoders_name_the_nearest() -> None:
    with pytest.raises(UserError, match="no decoder 'unett'; did you mean 'unet'"):
        Segmenter(tiny.encoder(), 3, "unett")


@pytest.mark.parametrize(
    ("old", "new"), [((3, 4), (6, 12)), ((5, 2), (7, 2)), ((6, 7), (3, 3)), ((1, 1), (4, 3))]
)
def test_bilinear_is_that_of_jax(old: tuple[int, int], new: tuple[int, int]) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, *old, 3)), jnp.float32)
    expected = jax.image.resize(x, (2, *new, 3), "bilinear", antialias=False)
    np.testing.assert_allclose(bilinear(x, new), expected, atol=1e-5)


def test_nearest_repeats() -> None:
    x = np.arange(4.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(nearest(x, 2)[0, :, :, 0], np.kron(x[0, :, :, 0], np.ones((2, 2))))
