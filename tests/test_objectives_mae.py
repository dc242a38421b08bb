"""Masked autoencoding: only visible patches are run, and the loss is the published one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dapt_jax.data.augment import Augment
from dapt_jax.errors import UserError
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import DEFAULT
from dapt_jax.models.encoders import vit
from dapt_jax.objectives import MaeSettings, MaskedAutoencoder
from dapt_jax.objectives import mae as objective_module
from dapt_jax.objectives.masking import MaskedViews, by_position, masked_first, patchify, visible_first
from dapt_jax.study import plan
from dapt_jax.training import accounting, label_free
from dapt_jax.training.phases import Phase
from tests.test_label_free_training import (
    DATA,
    VIEWS,
    VIT,
    rows_of_agreeing_runs,
    run_of,
)

FULL = (Phase("full", 1, ("*",), 1e-3),)
PHASES = (
    Phase("head", 1, ("head",), 1e-3, views=2),
    Phase("partial", 2, ("block2", "top", "head"), 1e-3, views=2),
    Phase("full", 1, ("*",), 1e-3, views=2),
)
SMALL = MaskedAutoencoder(None, MaeSettings(decoder_embed_dim=32, decoder_depth=1))


def with_options(**changed):
    return dataclasses.replace(SMALL, options=dataclasses.replace(SMALL.options, **changed))


def network(objective, encoder=VIT):
    model = label_free.pretext(encoder, objective, FULL)
    return model, jax.tree.map(jnp.asarray, model.init(3))


def views_of(objective, rows=range(4), view=0, augment=VIEWS):
    rows = np.asarray(rows, np.int32)
    return objective.views(augment, VIT)(DATA.images.batch(rows), 1, view, rows)


@pytest.mark.parametrize("phases", [PHASES[1:2], pytest.param(PHASES, marks=pytest.mark.long)])
def test_cached_and_uncached_runs_agree_and_the_ledger_is_the_plan_to_the_integer(phases):
    runs = {cache: run_of("mae", "vit", cache, phases) for cache in ("on", "off")}
    rows, plain_rows = rows_of_agreeing_runs(runs)
    assert [row.cached for row in rows] == ["filled", "reused", "off"][: len(phases)]
    assert all(0 < row.head_flops < row.model_flops for row in rows + plain_rows)
    assert not plan.uncounted(list(runs.values()))


def test_an_encoder_of_which_nothing_is_dropped_gives_the_ordinary_output():
    objective = with_options(mask_ratio=1e-12)
    model, weights = network(objective)
    view = views_of(objective)
    assert not view["mask"].any()
    plain = Classifier(VIT, 1)
    for boundary in (1, len(VIT.groups)):
        found = model.prefix(*weights, view, boundary)
        expected, _ = VIT.apply(*weights, VIT.preprocess(view["image"], "float32"), stop=boundary)
        np.testing.assert_array_equal(found["tokens"], expected)
        assert found["pixels"].shape[1] == 0
    np.testing.assert_array_equal(found["tokens"][:, 0], plain.features(*weights, view["image"]))


def test_the_encoder_sees_the_visible_patches_and_no_other():
    model, weights = network(SMALL)
    view = views_of(SMALL)
    hidden = np.asarray(view["mask"]).reshape(4, 4, 4).repeat(4, 1).repeat(4, 2)[..., None]
    tokens = model.prefix(*weights, view, len(VIT.groups))["tokens"]
    assert tokens.shape == (4, 1 + 4, 16)
    changed = {**view, "image": jnp.where(hidden, 0.0, view["image"])}
    np.testing.assert_array_equal(model.prefix(*weights, changed, len(VIT.groups))["tokens"], tokens)
    changed = {**view, "image": jnp.where(hidden, view["image"], 0.0)}
    assert (np.abs(model.prefix(*weights, changed, len(VIT.groups))["tokens"] - tokens) > 0).any((1, 2)).all()


def reference_loss(images, mask, predicted, patch, normalise):
    """MAE's loss by loops: predictions are in the order of the masked patches, row by row."""
    found = []
    for image, hidden, guesses in zip(images, mask, predicted, strict=True):
        wide, guesses, losses = image.shape[1] // patch, iter(guesses), []
        for number, is_masked in enumerate(hidden):
            if is_masked:
                row, column = divmod(number, wide)
                pixels = image[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].ravel()
                if normalise:
                    pixels = (pixels - pixels.mean()) / np.sqrt(pixels.var() + 1e-6)
                losses.append(((next(guesses) - pixels) ** 2).mean())
        found.append(np.mean(losses))
    return found


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_is_the_mean_squared_error_of_the_masked_patches_pixels(normalise):
    objective = with_options(norm_pix_loss=normalise)
    model, weights = network(objective)
    view = views_of(objective)
    outputs, _ = model.suffix(*weights, model.prefix(*weights, view, 0), 0)
    found = objective.losses(outputs, jnp.zeros(4), jnp.ones(4))
    images = np.asarray(VIT.preprocess(view["image"], "float32"), np.float64)
    expected = reference_loss(
        images, np.asarray(view["mask"]), np.asarray(outputs["predicted"]), 4, normalise
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    cached, _ = model.suffix(*weights, model.prefix(*weights, view, 2), 2)
    np.testing.assert_allclose(cached["predicted"], outputs["predicted"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cached["pixels"], outputs["pixels"])


def test_each_prediction_is_of_the_patch_in_its_place():
    """Tokens that hold their own numbers come out in the order of the grid."""
    rng = np.random.default_rng(0)
    numbers = jnp.broadcast_to(jnp.arange(16.0)[None, :, None], (3, 16, 1))
    mask = jnp.asarray(rng.permuted(np.tile([0.0] * 4 + [1.0] * 12, (3, 1)), axis=1))
    seen, hidden = visible_first(numbers, mask)[:, :4], masked_first(numbers, mask)[:, :12]
    np.testing.assert_array_equal(by_position(seen, hidden, mask), numbers)
    for number in range(3):
        np.testing.assert_array_equal(seen[number, :, 0], np.flatnonzero(mask[number] == 0))
        np.testing.assert_array_equal(hidden[number, :, 0], np.flatnonzero(mask[number]))
    positions = objective_module.sine_cosine(3, 8)
    assert len({tuple(row) for row in positions.tolist()}) == 9
    images = rng.normal(size=(2, 8, 8, 3))
    np.testing.assert_array_equal(patchify(images, 4)[1, 2], images[1, 4:, :4].ravel())


def test_a_mask_is_a_function_of_the_view_and_hides_the_same_number_of_patches_everywhere():
    masks = [np.asarray(views_of(SMALL, view=view, augment=Augment())["mask"]) for view in (0, 0, 1)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any(1).all()
    assert all((mask.sum(1) == 12).all() for mask in masks)
    alone = views_of(SMALL, [2], augment=Augment())["mask"]
    np.testing.assert_array_equal(alone[0], masks[0][2])  # of the image, not of its place in the batch
    plain = run_of("mae", "vit", augment=Augment(), phases=PHASES[1:2])
    assert not plain.programs[0].augment.is_fixed
    assert plain.cache_decision(plain.programs[0]).views == 2  # masks differ, though images do not


def test_a_quarter_of_the_patches_costs_about_a_quarter_of_the_encoder():
    small = vit.network("vit_small", vit.SMALL, vit.DINOV2, DEFAULT)
    model = label_free.pretext(small, MaskedAutoencoder(), FULL)
    groups = len(small.groups)
    share = (
        accounting.forward(model, 112, groups).model
        / accounting.forward(Classifier(small, 1), 112, groups).model
    )
    assert 0.25 < share < 0.28
    run = run_of("mae", "vit")
    (shapes,) = {leaf.shape for leaf in [accounting.boundary_shape(run.model, 2, 16)["tokens"]]}
    assert shapes == (1 + 4, 16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda: run_of("mae", "cnn"),
            "drops patches, which model 'tiny' cannot: expected a vision transformer",
        ),
        (
            lambda: network(SMALL, vit.network("vit_small_dinov3", vit.Size(16, 2, 2), vit.DINOV3, DEFAULT)),
            "model 'vit_small_dinov3' cannot: expected a vision transformer with learnt positions",
        ),
        (
            lambda: label_free._check_masks(MaskedViews.of(Augment(), 16, 0.75), 32 - 16),
            r"leaves 0 of the 1 patches of 16 x 16 pixels; .*larger images",
        ),
        (
            lambda: label_free._check_masks(MaskedViews.of(Augment(), 4, 0.99), 16),
            r"leaves 0 of the 16 patches of 16 x 16 pixels; expected 1 to 15, such as mask_ratio=0.75",
        ),
        (lambda: MaeSettings(decoder_embed_dim=100), "expected a multiple of 32, such as 96"),
        (lambda: MaeSettings(mask_ratio=0.0), "mask_ratio"),
    ],
)
def test_masks_that_cannot_work_are_refused_in_one_line(change, said):
    with pytest.raises(UserError, match=said) as refused:
        change()
    assert "\n" not in str(refused.value)
