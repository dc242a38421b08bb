"""Stochastic depth: branches dropped for single images, or computed for a subset of the batch only."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dapt_jax.cost import flops
from dapt_jax.models import registry
from dapt_jax.models.encoder import Options
from dapt_jax.models.encoders import vit
from dapt_jax.models.layers import StochasticDepth, subset_of_batch
from dapt_jax.settings import StudySettings, from_json, to_dict
from dapt_jax.settings.defaults import differences
from dapt_jax.training import accounting
from dapt_jax.training.optim import Optimizer
from dapt_jax.training.phases import Phase
from tests import tiny
from tests.command import ROOT
from tests.test_training_loop import curve, train
from tests.test_training_patch_dropout import CLASSES, WIDTH, assert_costs_as_planned, flops_of_block

DATA = tiny.dataset(24)
TOP = Phase("top", 2, ("block2", "top", "head"), 1e-3, augment=False)
FULL = Phase("full", 1, ("*",), 1e-3, augment=False)
RATE = 0.25
VARIANT = vit.MAE._replace(patch=4, image_size=16)


def vit_of(**options):
    """Return a transformer of two blocks that drop at rates 0 and `drop_path`."""
    chosen = Options(**options)
    return vit.network("vit_small", vit.Size(WIDTH, 2, 2), VARIANT, chosen).with_options(chosen)


SUBSET, DROPPED = vit_of(drop_path=RATE, drop_path_subset=True), vit_of(drop_path=RATE)
SEEDS = 400


def with_depth(rate, on_subset):
    """Return an encoder of the registry's names with stochastic depth, built anew with its options."""
    return registry.configured("resnet18", rate, 0.0, (), drop_path_subset=on_subset)


def draws(depth, x, branch=jnp.negative):
    """Return results for many keys, (keys, b, ...)."""
    return np.asarray(
        jax.vmap(lambda key: depth.add(x, branch, key))(jax.random.split(jax.random.key(0), SEEDS))
    )


@pytest.mark.parametrize("on_subset", [False, True])
def test_images_take_the_scaled_branch_or_none_and_the_mean_is_kept(on_subset):
    x = jnp.arange(1.0, 33)[:, None, None] * jnp.ones((1, 2, 3))
    found = draws(StochasticDepth(RATE, on_subset), x) / np.asarray(x)
    taken = 1 - 1 / (1 - RATE)
    assert {round(float(value), 5) for value in np.unique(found)} == {1.0, round(taken, 5)}
    assert (found.std((2, 3)) < 1e-6).all()  # all of an image, or none
    took = found[:, :, 0, 0] < 0.5
    counts = took.sum(1)
    assert (set(counts) == {24}) if on_subset else counts.std() > 1
    np.testing.assert_allclose(took.mean(0), 1 - RATE, atol=4 * np.sqrt(RATE * (1 - RATE) / SEEDS))


def test_each_part_of_a_large_batch_has_its_own_draw_of_the_same_size():
    x = jnp.ones((96, 1))
    took = (draws(StochasticDepth(RATE, True), x)[..., 0] < 0.5).reshape(SEEDS, 3, 32)
    assert (took.sum(2) == 24).all()
    assert (took[:, 0] != took[:, 1]).any(1).mean() > 0.99
    assert subset_of_batch(96, RATE) == (3, 32, 24)


@pytest.mark.parametrize("depth", [StochasticDepth(), StochasticDepth(0.01, True)])
def test_without_images_that_skip_it_the_branch_is_computed_whole(depth):
    x = jnp.ones((8, 2))
    np.testing.assert_array_equal(depth.add(x, jnp.negative, jax.random.key(0)), x - x)
    np.testing.assert_array_equal(StochasticDepth(0.9, True).add(x, jnp.negative, None), x - x)


def test_the_branch_sees_the_chosen_images_and_adds_to_the_skip():
    x, skip = jnp.arange(8.0)[:, None], 100 * jnp.ones((8, 1))
    seen = []
    found = StochasticDepth(0.5, True).add(
        x, lambda part: seen.append(part) or 2 * part, jax.random.key(1), skip
    )
    (part,) = seen
    assert part.shape == (4, 1)
    expected = np.full(8, 100.0)
    expected[np.asarray(part[:, 0], int)] += 2 * 2 * np.asarray(part[:, 0])
    np.testing.assert_allclose(found[:, 0], expected)


def test_gradients_are_those_of_the_images_that_were_computed():
    x, depth, key = jnp.arange(1.0, 9)[:, None], StochasticDepth(0.5, True), jax.random.key(3)

    def total(scale):
        return depth.add(x, lambda part: part * scale, key).sum()

    took = np.asarray(depth.add(x, jnp.ones_like, key) - x)[:, 0] > 0
    np.testing.assert_allclose(jax.grad(total)(1.0), 2 * np.asarray(x)[took].sum(), rtol=1e-6)


def run_of(*phases, encoder=SUBSET, **others):
    return tiny.make_run(phases, encoder=encoder, data=DATA, batch_size=8, **others)


def test_the_flops_of_a_step_are_those_of_the_images_that_are_computed():
    """The last block, at the full rate, is computed for 6 of 8 images in both of its branches."""
    cost, whole = (
        accounting.image_cost(run_of(TOP, encoder=each).programs[0], 16).suffix.model
        for each in (SUBSET, DROPPED)
    )
    block, head = flops_of_block(1 + 16), 2 * WIDTH * CLASSES
    assert whole == 3 * (block + head)
    assert cost == 3 * (block * 6 // 8 + head)


def test_parts_of_a_step_are_counted_as_they_are_drawn():
    """Of 4 images in each of two parts 3 are computed, as of 8; of 2 in each of four parts 2, not 1.5."""
    counted = [
        accounting.image_cost(run_of(TOP, grad_accum_steps=parts).programs[0], 16).suffix.model
        for parts in (1, 2, 4)
    ]
    whole = accounting.image_cost(run_of(TOP, encoder=DROPPED).programs[0], 16).suffix.model
    assert counted[0] == counted[1] < counted[2] == whole


@pytest.mark.long
@pytest.mark.parametrize("parts", [1, 2])
def test_plan_and_ledger_agree_and_a_cached_prefix_gives_the_uncached_numbers(parts):
    sgd = Optimizer("sgd")
    runs = [
        run_of(tiny.HEAD, TOP, FULL, cache=cache, optimizer=sgd, val=0, grad_accum_steps=parts)
        for cache in ("auto", "off")
    ]
    (on, rows), (off, uncached) = map(train, runs)
    for run, found in zip(runs, (rows, uncached), strict=True):
        assert_costs_as_planned(run, found)
    named = "residual branches for a share of the batch in each step"
    assert [row.approximations for row in rows] == ["", named, named]
    np.testing.assert_allclose(curve(rows), curve(uncached), rtol=1e-5)
    assert all(np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(off, on, strict=True))


@pytest.mark.parametrize(
    "name", ["resnet18", "efficientnet_lite0", "convnext_tiny", "swin_tiny", "resnet50_hidy2024"]
)
def test_every_family_with_residual_branches_computes_less(name):
    side, counted = 64, {}
    for on_subset in (False, True):
        encoder = registry.configured(name, 0.5, 0.0, (), drop_path_subset=on_subset)
        params, batch_stats = encoder.abstract()
        x = jax.ShapeDtypeStruct((8, side, side, 3), jnp.float32)

        def forward(params, batch_stats, x, key, encoder=encoder):
            modes = dict.fromkeys(encoder.groups, "train")
            return encoder.apply(params, batch_stats, x, batch_norm=modes, rng=key)

        counted[on_subset] = flops.count(forward, params, batch_stats, x, jax.random.key(0)).model
    assert 0.6 < counted[True] / counted[False] < 0.9


def test_masks_and_truncated_encoders():
    encoder = with_depth(0.5, True)
    assert registry.for_masks(encoder).options == Options(drop_path=0.5)
    assert encoder.truncate("stage2/block1").options == encoder.options
    assert registry.configured("resnet18", 0.5, 0.0, ()) is not encoder


DEVICES = """
    import json
    import jax, jax.numpy as jnp, numpy as np
    from dapt_jax.aot import collectives
    from dapt_jax.aot.hlo import Program
    from dapt_jax.runtime import sharding
    from tests.test_training_stochastic_depth import vit_of

    def look(options, devices):
        encoder = vit_of(**options)
        mesh = sharding.make_mesh(jax.devices()[:devices])
        whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        params, batch_stats = encoder.init(0)
        images = np.random.default_rng(0).standard_normal((128, 16, 16, 3)).astype(np.float32)

        def loss(params, images, key):
            return jnp.square(encoder.apply(params, batch_stats, images, rng=key)[0] - 1).mean()

        step = jax.jit(jax.value_and_grad(loss), in_shardings=(whole, split, whole), out_shardings=whole)
        compiled = step.lower(params, images, jax.random.key(0)).compile()
        value, gradients = compiled(*jax.device_put((params, images, jax.random.key(0)), (whole, split, whole)))
        total = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(gradients))
        found = collectives.of_program(Program.parse(compiled.as_text()))
        return {
            "flops": compiled.cost_analysis()["flops"], "value": float(value), "gradients": total,
            "collectives": sorted({each.kind for each in found}),
        }

    subset = {"drop_path": 0.5, "drop_path_subset": True}
    print(json.dumps([look({"drop_path": 0.5}, 1), look(subset, 1), look(subset, 4)]))
"""


@pytest.mark.long
def test_devices_compute_their_own_parts_and_their_number_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DEVICES)],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole, one, four = json.loads(done.stdout)
    assert one["flops"] < 0.8 * whole["flops"]
    assert four["flops"] == pytest.approx(one["flops"] / 4, rel=0.01)  # of one device
    assert four["collectives"] == ["all-reduce"]  # gradients; no image moves
    assert [four["value"], four["gradients"]] == pytest.approx([one["value"], one["gradients"]], rel=1e-5)


def test_a_workdir_of_before_the_setting_still_holds_the_same_study():
    values = to_dict(StudySettings())
    del values["model"]["drop_path_subset"]
    assert not list(differences(StudySettings(), from_json(values)))
