"""Self-distillation (DINO): the published loss, centre and teacher; cached, resumed and planned as the others."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dapt_jax import ops
from dapt_jax.errors import UserError
from dapt_jax.objectives import Dino
from dapt_jax.study import collapse
from dapt_jax.training import accounting, freezing, label_free, loop
from dapt_jax.training.optim import Optimizer
from dapt_jax.training.phases import Phase
from dapt_jax.weights.paths import flatten
from tests.test_label_free_training import (
    ENCODERS,
    check_kills,
    head_first,
    objective_of,
    rows_of_agreeing_runs,
    run_of,
)
from tests.test_training_loop import context

SMALL = objective_of("dino", None)


def dino_run(kind="cnn", cache="on", phases=None):
    return run_of("dino", kind, cache, phases or head_first(kind))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference_loss(student, teacher, centre, temperature):
    """Algorithm 1 of arXiv 2104.14294 for two views: H(t1, s2) / 2 + H(t2, s1) / 2."""
    (s1, s2), (t1, t2) = (np.asarray(each, np.float64) for each in (student, teacher))

    def cross_entropy(t, s):
        return -(softmax((t - centre) / temperature) * np.log(softmax(s / 0.1))).sum(-1)

    return cross_entropy(t1, s2) / 2 + cross_entropy(t2, s1) / 2


def test_loss_centre_momentum_and_temperature_are_the_published_ones():
    rng = np.random.default_rng(0)
    student, teacher = rng.uniform(-1, 1, (2, 2, 5, 24)).astype(np.float32)
    centre, weights = rng.normal(0, 0.1, 24).astype(np.float32), np.array([1, 1, 1, 2, 0], np.float32)
    targets = SMALL.soft_targets(tuple(teacher), centre, 0.04)
    found = SMALL.losses(tuple(student), targets, weights)
    np.testing.assert_allclose(found, reference_loss(student, teacher, centre, 0.04), rtol=1e-5)
    mean = np.average(teacher.mean(0), axis=0, weights=weights)  # of padding nothing counts
    moved = SMALL.next_centre(centre, tuple(teacher), weights)
    np.testing.assert_allclose(moved, 0.9 * centre + 0.1 * mean, rtol=1e-5, atol=1e-7)
    schedule = [float(SMALL.momentum(jnp.int32(step), jnp.int32(8))) for step in range(8)]
    expected = 1 + 0.5 * (0.996 - 1) * (1 + np.cos(np.pi * np.arange(8) / 8))
    np.testing.assert_allclose(schedule, expected, rtol=1e-6)
    temperatures = [float(SMALL.temperature(jnp.int32(epoch))) for epoch in range(5)]
    np.testing.assert_allclose(temperatures, [*np.linspace(0.03, 0.04, 3), 0.04, 0.04], rtol=1e-6)
    assert float(Dino().temperature(jnp.int32(0))) == pytest.approx(0.04)


def test_one_step_moves_centre_and_teacher_by_the_formulas_and_a_first_epoch_leaves_the_prototypes():
    run = dino_run()
    program, (params, batch_stats) = run.programs[0], run.model.init(1)
    shape = accounting.boundary_shape(run.model, program.mask.boundary, 16).shape
    x = tuple(
        jnp.asarray(np.random.default_rng(view).normal(size=(8, *shape)), jnp.float32) for view in (0, 1)
    )
    state = jax.tree.map(jnp.asarray, program.init_state(params, batch_stats))
    state |= {
        "objective": {"centre": jnp.linspace(-0.1, 0.1, 24)},
        "ema": jax.tree.map(lambda leaf: 0.5 * leaf, state["ema"]),
    }
    start, teacher_start = flatten(params), flatten(freezing.prune(state["ema"]))
    outputs = jax.jit(lambda params: run.model.suffix(params, batch_stats, x, program.mask.boundary)[0])
    student, teacher = (
        outputs(state["params"]),
        outputs(freezing.overlay(params, freezing.prune(state["ema"]))),
    )
    np.testing.assert_allclose(jax.jit(program.own_targets)(state, x)[1], teacher[1], rtol=1e-5, atol=1e-6)
    rng = {"epoch": jnp.int32(0), "total_steps": jnp.int32(10), "seed": jnp.uint32(0)}
    batch = {"x": x, "label": None, "weight": jnp.ones(8), "index": jnp.arange(8)}
    after = jax.jit(program.activation_step)(state, batch, rng, jnp.float32(0.1))
    loss = reference_loss(student, teacher, np.asarray(state["objective"]["centre"]), 0.03).sum()
    assert float(after["loss"]) == pytest.approx(loss, rel=1e-4)
    expected = 0.9 * state["objective"]["centre"] + 0.1 * jnp.concatenate(teacher).mean(0)
    np.testing.assert_allclose(after["objective"]["centre"], expected, rtol=1e-5, atol=1e-6)
    moved, average = flatten(after["params"]), flatten(freezing.prune(after["ema"]))
    assert set(average) == set(program.mask.trainable)
    for path, mean in average.items():
        assert not np.array_equal(moved[path], start[path])
        expected = 0.996 * teacher_start[path] + 0.004 * moved[path]
        np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(moved["head/prototypes/kernel"], start["head/prototypes/kernel"])


def test_student_and_teacher_take_batch_statistics_over_the_same_groups():
    """With equal weights they give equal outputs, where batch norm that trains sees two groups."""
    phases = (*head_first()[:1], Phase("full", 1, ("*",), 1e-3, batch_norm="train", views=2))
    program = dataclasses.replace(dino_run(phases=phases).programs[1], batch_norm_groups=2)
    params, batch_stats = program.model.init(1)
    x = tuple(
        np.random.default_rng(view).uniform(0, 255, (8, 16, 16, 3)).astype(np.float32) for view in (0, 1)
    )
    state = program.init_state(params, batch_stats)
    state, x = jax.tree.map(jnp.asarray, (state, x))
    teacher = program.own_targets(state, x)
    with ops.batch_norm_groups(2):
        student, _ = program.model.suffix(params, batch_stats, x, 0, program.mask.batch_norm_modes)
    np.testing.assert_allclose(teacher[0], student[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["cnn", pytest.param("vit", marks=pytest.mark.long)])
def test_cached_and_uncached_runs_agree_and_the_ledger_is_the_plan_to_the_integer(kind):
    runs = {cache: dino_run(kind, cache) for cache in ("on", "off")}
    rows, plain_rows = rows_of_agreeing_runs(runs)
    # What the last phase trains on lies on the way to what the head alone is trained on.
    assert [row.cached for row in rows] == ["filled", "reused", "reused"]
    assert all(row.head_flops + row.target_flops <= row.model_flops for row in rows + plain_rows)
    # The teacher is run above the boundary alone, on both views of every image: in the first two phases the head.
    widths = (ENCODERS[kind][0].features, 16, 16, 8, 24)
    head = sum(2 * inputs * outputs for inputs, outputs in itertools.pairwise(widths))
    suffix = accounting.forward(runs["on"].model, 16, len(ENCODERS[kind][0].groups)).model
    suffix -= accounting.forward(runs["on"].model, 16, runs["on"].programs[2].mask.boundary).model
    assert [row.target_flops for row in rows] == [40 * head, 40 * head, 40 * (head + suffix)]
    first, second, _ = (row.head_flops for row in rows)  # without the gradient of the prototypes
    assert second - first == 40 * 2 * 8 * 24


@pytest.mark.long
def test_a_run_killed_at_any_entry_of_the_ledger_resumes_to_the_bit(tmp_path):
    check_kills(dino_run(), 5, tmp_path)


def test_a_run_that_collapses_is_halted_in_one_line():
    phases = (*head_first()[:1], Phase("full", 2, ("*",), 300.0, views=2))
    run = dataclasses.replace(dino_run(phases=phases), optimizer=Optimizer("adamw", weight_decay=1.0))
    options = dataclasses.replace(SMALL.options, momentum_teacher=0.0)
    run = dataclasses.replace(run, loss=dataclasses.replace(SMALL, options=options))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, objective=run.loss))
    params, batch_stats = run.model.init(1)
    own = context(None)
    alarm = collapse.alarm_for(run, params, batch_stats, "halt", own)
    with pytest.raises(UserError, match=r"collapse: RankMe .* below half of its start; expected a lower"):
        loop.train(run, params, batch_stats, dataclasses.replace(own, callbacks=(alarm,)))


FULL = Phase("full", 1, ("*",), 1e-3, views=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda: dino_run(phases=(FULL,)),
            "phase 'full' trains the encoder against a random head; .*expected adapt.head_epochs of 1 or more",
        ),
        (
            lambda: dataclasses.replace(dino_run(), optimizer=Optimizer(ema=0.9)),
            "keeps an average of its own; expected adapt.optimizer.ema=0",
        ),
        (
            lambda: dino_run(phases=(*head_first()[:1], dataclasses.replace(FULL, schedule="plateau"))),
            "has targets that move, .*expected another schedule than 'plateau'",
        ),
    ],
)
def test_settings_that_contradict_a_moving_teacher_are_one_line(change, said):
    with pytest.raises(UserError, match=said) as refused:
        change()
    assert "\n" not in str(refused.value)


def test_the_riskiest_objective_says_so_and_no_other_does():
    line = label_free.warning("partial", dino_run().programs[0])
    assert line.startswith(
        "warning: partial: objective 'dino' is the riskiest choice: its head starts at random"
    )
    assert not label_free.warning("partial", run_of("two_views").programs[0])
