"""PatchDropout: a training step sees a share of each image's patches, above a prefix that is cached whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dapt_jax.errors import UserError
from dapt_jax.models import registry, tokens
from dapt_jax.models.encoder import Options
from dapt_jax.settings import StudySettings, from_json, to_dict
from dapt_jax.settings.defaults import differences
from dapt_jax.study import plan
from dapt_jax.training import accounting, label_free
from dapt_jax.training import run as training_run
from dapt_jax.training.optim import Optimizer
from dapt_jax.training.phases import Phase
from tests import tiny
from tests.test_label_free_training import VIT
from tests.test_label_free_training import objective_of as label_free_objective
from tests.test_training_loop import curve, train

HALF = VIT.with_options(Options(patch_dropout=0.5))
DATA = tiny.dataset(24)
TOP = Phase("top", 2, ("block2", "top", "head"), 1e-3, augment=False)
FULL = Phase("full", 1, ("*",), 1e-3)
WIDTH, CLASSES = 16, 3


def run_of(*phases, cache="auto", encoder=HALF, val=4, **others):
    return tiny.make_run(phases, encoder=encoder, data=DATA, cache=cache, val=val, **others)


def flops_of_block(count):
    """Forward FLOPs of a block on so many tokens: four dense layers, and scores and sums of attention."""
    dense = 3 + 1 + 4 + 4
    return 2 * count * dense * WIDTH**2 + 2 * 2 * count**2 * WIDTH


@pytest.mark.parametrize(("encoder", "seen"), [(VIT, 1 + 16), (HALF, 1 + 8)])
def test_the_flops_of_a_step_are_those_of_the_tokens_that_stay(encoder, seen):
    run = run_of(TOP, encoder=encoder)
    cost = accounting.image_cost(run.programs[0], 16)
    # Forward, gradient of the kernels, gradient of the inputs.
    assert cost.suffix.model == 3 * (flops_of_block(seen) + 2 * WIDTH * CLASSES)
    patch_embedding = 2 * 16 * (4 * 4 * 3) * WIDTH
    assert cost.prefix.model == flops_of_block(1 + 16) + patch_embedding  # whole, whatever is dropped above


def assert_costs_as_planned(run, rows):
    """Compare FLOPs, to the integer, and approximations of a run's ledger with its plan, which counts everything."""
    planned = plan.of_run(run)
    assert [row.model_flops for row in rows] == [phase.flops for phase in planned]
    assert [row.approximations for row in rows] == [phase.approximations for phase in planned]
    assert not plan.uncounted([run])


@pytest.mark.long
def test_plan_and_ledger_agree_to_the_integer_and_a_cached_prefix_gives_the_uncached_numbers():
    sgd = Optimizer("sgd")  # Adam divides gradients that are rounding alone, of attention's keys
    runs = [run_of(TOP, FULL, cache=cache, optimizer=sgd, val=0) for cache in ("auto", "off")]
    (on, rows), (off, uncached) = map(train, runs)
    for run, found in zip(runs, (rows, uncached), strict=True):
        assert_costs_as_planned(run, found)
    assert [row.cached for row in rows] == ["filled", "off"]
    assert {row.approximations for row in rows} == {"8 of 16 patch tokens in each step"}
    np.testing.assert_allclose(curve(rows), curve(uncached), rtol=1e-5)
    assert all(np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(off, on, strict=True))


def test_tokens_that_stay_are_a_draw_for_each_image_and_the_class_token_always_does():
    x = jnp.arange(3 * 17 * 2, dtype=jnp.float32).reshape(3, 17, 2)
    found = [np.asarray(tokens.dropped(x, 16, 0.6, jax.random.key(seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0].shape == (3, 1 + 6, 2)
    np.testing.assert_array_equal(found[0][:, 0], x[:, 0])
    kept = [[row[1:, 0].tolist() for row in each] for each in (found[0], found[2])]
    for image in range(3):
        assert kept[0][image] == sorted(kept[0][image])  # in the order of the grid
        assert set(kept[0][image]) < set(np.asarray(x[image, 1:, 0]).tolist())
        assert kept[0][image] != kept[1][image]
    places = {tuple(np.asarray(row) - 34 * image) for image, row in enumerate(kept[0])}
    assert len(places) == 3  # not one draw for all images
    many = tokens.mask_of(jax.random.uniform(jax.random.key(0), (4000, 16)), 4)
    np.testing.assert_allclose(np.asarray(many).mean(0), 0.75, atol=0.03)


def test_evaluation_and_heads_alone_see_all_tokens():
    run = run_of(dataclasses.replace(tiny.HEAD, trainable=("head",)), FULL)
    params, batch_stats = run.model.init(0)
    images = jnp.asarray(DATA.images.batch(range(3)))
    plain = dataclasses.replace(run.model, encoder=VIT)
    np.testing.assert_array_equal(run.model(params, batch_stats, images), plain(params, batch_stats, images))
    assert plan.of_run(run)[0].approximations == ""
    x = run.model.prefix(params, batch_stats, images, 0)
    key = jax.random.key(3)
    logits, _ = run.model.suffix(params, batch_stats, x, 0, "frozen", key)
    embedded, _ = VIT.apply(params, batch_stats, x, stop=1)
    seen = tokens.dropped(embedded, 16, 0.5, jax.random.fold_in(key, 1 << 20))
    expected, _ = plain.suffix(params, batch_stats, seen, 1)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)


def test_decoders_of_masks_get_every_patch():
    encoder = registry.build("vit_small", Options(patch_dropout=0.5, drop_path=0.1))
    assert registry.for_masks(encoder).options == Options(drop_path=0.1)
    assert registry.for_masks(encoder, 0.0).options == Options()
    plain = registry.build("vit_small")
    assert registry.for_masks(plain) is plain


def masked(name):
    return lambda: label_free.pretext(HALF, label_free_objective(name, HALF), (FULL,))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: registry.configured("resnet18", 0.0, 0.0, (), 0.5),
            "model.patch_dropout is 0.5, but model 'resnet18' needs all patches: expected 0, or a vision "
            "transformer with learnt positions, such as model.name='vit_small'",
        ),
        (
            lambda: registry.build("vit_small_dinov3", Options(patch_dropout=0.5)),
            "model.patch_dropout is 0.5, but model 'vit_small_dinov3' needs all patches: expected 0, or a "
            "vision transformer with learnt positions, such as model.name='vit_small'",
        ),
        (
            lambda: run_of(FULL, encoder=VIT.with_options(Options(patch_dropout=0.95))),
            "model.patch_dropout is 0.95, which leaves 0 of the 16 patches of 16 x 16 pixels in phase 'full'; "
            "expected at most 0.9375",
        ),
        *(
            (
                masked(name),
                f"objective {name!r} needs all patches, but model.patch_dropout is 0.5; expected 0, or "
                "adapt.objective='two_views'",
            )
            for name in ("mae", "reconstruct", "distil")
        ),
    ],
)
def test_what_needs_all_patches_is_refused_in_one_line(make, line):
    with pytest.raises(UserError) as refused:
        make()
    assert str(refused.value) == line


def test_the_share_that_is_suggested_leaves_a_patch():
    for patches in range(2, 1400):
        share = 1 - 1 / patches
        assert tokens.visible_count(patches, training_run._rounded_down(share)) == 1, patches


def test_a_workdir_of_before_the_setting_still_holds_the_same_study():
    values = to_dict(StudySettings())
    del values["model"]["patch_dropout"]
    assert not list(differences(StudySettings(), from_json(values)))
