"""A second seed of a study compiles nothing, though it holds out other numbers of images."""

import collections

import jax
import numpy as np
import pytest

from dapt_jax.training import loop
from dapt_jax.training.context import RunContext
from tests import tiny

COMPILED = collections.Counter()
"""How often XLA has compiled each program since the last test began."""


@jax.monitoring.register_event_duration_secs_listener
def _count(event, _, **about):
    name = about.get("fun_name", "")
    # `stage` is how `jnp.asarray` copies an array of a new shape: clu's metrics do so. It computes nothing.
    if event == "/jax/core/compile/backend_compile_duration" and name != "jit(stage)":
        COMPILED[name] += 1


ENCODER = tiny.encoder()


def train(context, *phases, seed, val, cache="on"):
    """Train one seed; returns the run and the weights at its end."""
    run = tiny.make_run(phases, encoder=ENCODER, data=tiny.dataset(), cache=cache, val=val, seed=seed)
    return run, loop.train(run, *run.model.init(seed), context).params


@pytest.fixture(scope="module")
def first_seed():
    """Environment of a study whose first seed has trained: a head on cached features, then all layers."""
    context = RunContext()
    train(context, tiny.HEAD, tiny.FULL, seed=0, val=8)
    assert COMPILED  # else JAX has renamed its event
    return context


@pytest.mark.parametrize("val", [5, 7, 9])
def test_a_second_seed_compiles_nothing(val, first_seed):
    COMPILED.clear()
    run, _ = train(first_seed, tiny.HEAD, tiny.FULL, seed=val, val=val)
    assert len(run.padded_val_rows) == 10  # a quarter of 40 images
    assert run.padded_steps == 5 >= run.order.steps_per_epoch
    assert not COMPILED


def test_the_last_phase_of_a_hybrid_compiles_no_step_that_full_has_compiled(first_seed):
    train(first_seed, tiny.HEAD, tiny.PARTIAL, seed=0, val=8)
    COMPILED.clear()
    train(first_seed, tiny.HEAD, tiny.PARTIAL, tiny.FULL, seed=0, val=8)
    assert not COMPILED


def test_epochs_with_padded_batches_are_those_of_the_rows_alone():
    run, padded = train(RunContext(), tiny.HEAD, seed=2, val=16)
    assert (run.order.steps_per_epoch, run.padded_steps) == (3, 4)
    _, stepwise = train(RunContext(), tiny.HEAD, seed=2, val=16, cache="off")
    for mine, theirs in zip(jax.tree.leaves(padded), jax.tree.leaves(stepwise), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
