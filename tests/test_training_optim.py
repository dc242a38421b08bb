"""Optimizers, moments over a mask switch, schedules."""

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapt_jax.errors import UserError
from dapt_jax.parameters import Kind
from dapt_jax.training import optim
from dapt_jax.training.optim import Optimizer, Plateau, PlateauState
from dapt_jax.training.phases import Phase, Timeline
from tests import tiny


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_run_that_trains_all_is_optax_s_own(name):
    params = {"a": {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}}
    gradients = [jax.tree.map(lambda leaf, k=k: leaf * (k + 1), params) for k in range(3)]
    ours = optim.transformation(Optimizer(name, eps=1e-8), params, ["a", "a_decayed"])
    theirs = {"adam": optax.adam(1.0), "adamw": optax.adamw(1.0, weight_decay=0), "sgd": optax.sgd(1.0, 0.9)}[
        name
    ]
    mine, other = ours.init(params), theirs.init(params)
    for gradient in gradients:
        direction, mine = ours.update(gradient, mine, params)
        update, other = theirs.update(gradient, other, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(-a, b, rtol=1e-6), direction, update)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_fresh_state_is_optax_s_own(name):
    data, optimizer = tiny.dataset(), Optimizer(name, weight_decay=0.1)
    run = tiny.make_run([tiny.PARTIAL], encoder=tiny.encoder(), data=data, optimizer=optimizer)
    program, (params, batch_stats) = run.programs[0], run.model.init(0)
    ours, theirs = program.init_state(params, batch_stats)["opt_state"], program.tx.init(params)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(mine, other)


def test_weight_decay_falls_on_kernels_alone():
    params = {"a": {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}}
    optimizer = Optimizer("sgd", weight_decay=0.5, b1=0.0)
    (labels,) = optim.labels(tuple(KINDS), KINDS, ["a"], [mask_of(*KINDS)], optimizer)
    tx = optim.transformation(optimizer, params, labels)
    direction, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    assert np.all(direction["a"]["kernel"] == 0.5)
    assert np.all(direction["a"]["bias"] == 0)


KINDS = {"a/bias": Kind.BIAS, "a/kernel": Kind.DENSE_KERNEL}


def mask_of(*paths):
    from dapt_jax.training.freezing import TrainableSpec

    return TrainableSpec(frozenset(paths), (), 0)


def test_moments_and_step_counts_go_over_a_switch_leaf_by_leaf():
    run = tiny.make_run([tiny.HEAD, tiny.PARTIAL, tiny.FULL], encoder=tiny.encoder(), data=tiny.dataset())
    head, partial, full = run.programs
    state = head.init_state(*head.model.init(0))
    filled = state
    for program, going_on in ((partial, {"head"}), (full, {"head", "stage3"})):
        sevens = jax.tree.map(lambda leaf: np.full_like(leaf, 7), filled["opt_state"])
        filled = program.transition_from({**filled, "opt_state": sevens})
        for path, leaf in jax.tree.leaves_with_path(filled["opt_state"]):
            place = jax.tree_util.keystr(path)
            expected = 7 if any(f"'{group}" in place for group in going_on) else 0
            assert np.all(np.asarray(leaf) == expected), place


def test_a_leaf_that_was_frozen_in_between_starts_fresh():
    masks = [mask_of(*KINDS), mask_of("a/bias"), mask_of(*KINDS)]
    optimizer = Optimizer("adam")
    named = optim.labels(tuple(KINDS), KINDS, ["a"], masks, optimizer)
    assert named == (("a", "a_1"), ("a", "frozen"), ("a", "a_1"))
    params = {"a": {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}}
    states = [optim.transformation(optimizer, params, labels).init(params) for labels in named]
    state = states[0]
    for fresh in states[1:]:
        state = optim.carry(jax.tree.map(lambda leaf: np.full_like(leaf, 7), state), fresh)
    for path, leaf in jax.tree.leaves_with_path(state):
        assert np.all(np.asarray(leaf) == (0 if "'a_1'" in jax.tree_util.keystr(path) else 7))


def test_a_phase_that_trains_everything_is_one_program_whatever_trained_before():
    head, partial, full = tiny.HEAD, tiny.PARTIAL, tiny.FULL
    encoder, data = tiny.encoder(), tiny.dataset()
    runs = [
        tiny.make_run(phases, encoder=encoder, data=data) for phases in ([head, full], [head, partial, full])
    ]
    at_once, hybrid = (run.programs[-1] for run in runs)
    assert at_once.key == hybrid.key


def test_a_leaf_that_stops_training_keeps_its_average():
    phases = [tiny.PARTIAL, Phase("head", 1, ("head",), 1e-2)]
    run = tiny.make_run(phases, encoder=tiny.encoder(), data=tiny.dataset(), optimizer=Optimizer(ema=0.5))
    first, second = run.programs
    state = first.init_state(*first.model.init(0))
    state["ema"] = jax.tree.map(lambda leaf: leaf + 1, state["ema"])
    after = second.transition_from(state)
    kernel = after["params"]["stage3"]["block1"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, state["ema"]["stage3"]["block1"]["conv"]["kernel"])
    np.testing.assert_array_equal(after["params"]["head"]["kernel"], state["params"]["head"]["kernel"])


def test_schedules_begin_at_the_peak_after_warm_up_and_end_where_they_should():
    steps = 10
    for name, last in {
        "constant": 1.0,
        "linear": 1 / 30,
        "poly": (1 / 30) ** 0.9,
        "cosine": None,
        "step": 0.01,
        "plateau": 1.0,
    }.items():
        phase = Phase("p", 4, ("*",), 1.0, schedule=name, warmup=1.0)
        rates = [optim.learning_rate(phase, step, steps) for step in range(40)]
        np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
        assert rates[10] == 1.0
        expected = optax.cosine_decay_schedule(1.0, 30)(29) if last is None else last
        np.testing.assert_allclose(rates[-1], expected, rtol=1e-5)


def test_steps_are_at_a_half_and_at_three_quarters():
    phase = Phase("p", 100, ("*",), 1e-3, schedule="step")
    rates = [optim.learning_rate(phase, epoch, 1) for epoch in (0, 49, 50, 74, 75, 99)]
    np.testing.assert_allclose(rates, [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


def test_the_plateau_waits_and_then_halves():
    plateau, state = Plateau(patience=2), PlateauState()
    for loss in (1.0, 0.9, 0.9, 0.9):
        state = plateau.update(state, loss)
    assert state == PlateauState(1.0, 0.9, 2)
    state = plateau.update(state, 0.9)
    assert state == PlateauState(0.5, 0.9, 0)
    assert plateau.update(state, 0.5) == PlateauState(0.5, 0.5, 0)


def test_a_plateau_that_would_raise_the_rate_is_refused():
    for factor in (1.0, 2.0):
        with pytest.raises(UserError, match=f"factor is {factor}; expected more than 0 and less than 1"):
            Plateau(factor=factor)


def test_unknown_settings_name_the_valid_ones():
    with pytest.raises(UserError, match="did you mean 'adam'"):
        Optimizer("adams")
    with pytest.raises(UserError, match="'cosine'"):
        Phase("p", 1, ("*",), 1.0, schedule="cosin")


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 5))
def test_every_step_lies_in_one_phase_and_a_switch_comes_after_the_last_step(epochs, per_epoch):
    phases = tuple(Phase(f"p{k}", count, ("*",), 1.0) for k, count in enumerate(epochs))
    timeline = Timeline(phases, per_epoch)
    seen = [timeline.position(step) for step in range(timeline.steps)]
    assert [seen.count(place) for place in seen] == [1] * timeline.steps
    for number, count in enumerate(epochs):
        assert sum(place.phase == number for place in seen) == count * per_epoch
        assert seen[timeline.first_step(number)].batch == 0
        assert timeline.phase_of_state(timeline.first_step(number + 1)) == number
