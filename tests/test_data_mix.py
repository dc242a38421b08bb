"""Mixed batches: what each image holds of its partner, and how its loss says so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dapt_jax.data.augment import Augment
from dapt_jax.data.mix import Mix
from dapt_jax.errors import UserError
from dapt_jax.training import accounting
from dapt_jax.training.phases import Phase
from tests import tiny

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 20, 30, 3)).astype(np.uint8)


def drawn(mix, steps, seed=0):
    """Mixed images, partners and shares of several steps."""
    each = jax.jit(jax.vmap(lambda step: mix(IMAGES, seed, step)))(np.arange(steps))
    return tuple(map(np.asarray, each))


def test_mixup_takes_the_same_share_of_every_pixel():
    mixed, partners, kept = drawn(Mix(mixup=1.0), 300)
    for images, partner, share in zip(mixed, partners, kept, strict=True):
        assert sorted(partner) == list(range(8))
        np.testing.assert_allclose(
            images, share * IMAGES + (1 - share) * IMAGES[partner].astype(float), atol=1e-2
        )
    assert kept.mean() == pytest.approx(
        0.5, abs=0.05
    )  # beta(1, 1) is uniform: mean 1/2, deviation 1/sqrt(12)
    assert kept.std() == pytest.approx(12**-0.5, abs=0.03)
    _, _, edges = drawn(Mix(mixup=0.1), 300)
    assert (np.minimum(edges, 1 - edges) < 0.05).mean() > 0.6


def test_cutmix_takes_a_rectangle_and_its_share_is_what_is_left():
    mixed, partners, kept = drawn(Mix(cutmix=1.0), 200)
    sizes = set()
    for images, partner, share in zip(mixed, partners, kept, strict=True):
        of_partner = (images != IMAGES).any(-1)
        moved = partner != np.arange(8)
        rectangle = of_partner[moved].any(0)
        np.testing.assert_array_equal(images[:, rectangle], IMAGES[partner][:, rectangle])
        np.testing.assert_array_equal(images[:, ~rectangle], IMAGES[:, ~rectangle])
        if rectangle.any():
            rows, columns = rectangle.any(1), rectangle.any(0)
            np.testing.assert_array_equal(rectangle, rows[:, None] & columns)
        assert share == pytest.approx(1 - rectangle.mean(), abs=1e-6)
        sizes.add(round(float(share), 2))
    assert len(sizes) > 20
    # The rectangle has 1 - lambda of the area where it does not reach over the border: 1 - E(kept) is below
    # 1/2.
    assert 0.5 < kept.mean() < 0.75


def test_the_two_are_switched_and_batches_left_alone_as_often_as_said():
    mixed, _, kept = drawn(Mix(mixup=1.0, cutmix=1.0, switch=0.25, probability=0.6), 1500)
    alone = kept == 1
    assert alone.mean() == pytest.approx(0.4 + 0.6 * 0.25 * 0.02, abs=0.05)
    whole = np.array([np.array_equal(images, np.rint(images)) for images in mixed[~alone]])
    assert whole.mean() == pytest.approx(0.25, abs=0.05)
    np.testing.assert_array_equal(mixed[alone][0], IMAGES)


def test_a_draw_follows_from_seed_and_step_alone():
    first, again, other = drawn(Mix(mixup=1.0), 4), drawn(Mix(mixup=1.0), 4), drawn(Mix(mixup=1.0), 4, seed=1)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[2], other[2])
    assert len(set(first[2].tolist())) == 4


def test_values_out_of_range_are_refused():
    for settings in ({"mixup": -1.0}, {"cutmix": -0.1}, {"switch": 1.5}, {"probability": -0.1}):
        with pytest.raises(UserError, match=f"{next(iter(settings))} is"):
            Mix(**settings)
    assert Mix().is_identity
    assert Mix(mixup=1.0, probability=0.0).is_identity


# ---- in a step
# ----------------------------------------------------------------------------------------------------

FULL = Phase("full", 2, ("*",), 1e-2)


def run_of(phases=(FULL,), mix=None, **settings):
    return tiny.make_run(
        phases, encoder=tiny.encoder(), data=tiny.dataset(), mix=mix or Mix(mixup=1.0), **settings
    )


def test_the_loss_of_a_mixed_batch_is_that_of_both_labels_each_with_its_own_weight():
    run = run_of(augment=Augment("horizontal"))
    program, data = run.programs[0], run.dataset
    params, stats = program.model.init(0)
    rows = np.arange(8, dtype=np.int32)
    weights = np.array([1, 2, 0.5, 1, 1, 3, 0, 0], np.float32)
    batch = {"image": data.images.batch(rows), "label": data.targets[rows], "weight": weights, "index": rows}
    draw = {"seed": np.uint32(3), "view": np.int32(1), "epoch": np.int32(1)}
    state = program.init_state(params, stats, step=5)
    after = jax.jit(program.train_step)(state, batch, draw, np.float32(0))
    images, partner, kept = program.mix(program.augment(batch["image"], 3, 1, rows), 3, 5)
    log_p = np.asarray(jax.nn.log_softmax(program.model(*jax.tree.map(jnp.asarray, (params, stats)), images)))
    kept, partner = float(kept), np.asarray(partner)
    own, other = (-log_p[rows, batch["label"][which]] for which in (rows, partner))
    expected = (kept * own * weights + (1 - kept) * other * weights[partner]).sum()
    assert 0.05 < kept < 0.95
    assert float(after["loss"]) == pytest.approx(expected, rel=1e-4)
    assert float(after["weight"]) == weights.sum()


def test_activations_that_are_kept_are_never_mixed():
    late = Phase("late", 2, ("head",), 1e-2)
    assert run_of((late,), cache="auto").cache_decision(run_of((late,)).programs[0]).tier == ""
    on = run_of((late,), cache="on")
    with pytest.raises(UserError, match="images are mixed anew in each step"):
        on.cache_decision(on.programs[0])
    plain = dataclasses.replace(late, augment=False)
    (program,) = run_of((plain,)).programs
    assert program.mix.is_identity
    assert run_of((plain,), cache="on").cache_decision(program).cached


def test_mixing_costs_no_model_flops():
    mixed, plain = run_of().programs[0], run_of(mix=Mix()).programs[0]
    assert accounting.image_cost(mixed, 16).suffix.model == accounting.image_cost(plain, 16).suffix.model
