"""Cached activations in 8 bits: the bound of their error, their bytes, and results that are close."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dapt_jax.cost.memory import tree_bytes
from dapt_jax.settings import StudySettings
from dapt_jax.settings.schema import CacheSettings
from dapt_jax.study import budgets, plan
from dapt_jax.training import approximations, loop
from dapt_jax.training.cache.policy import Caching, cached_spec, choose_cache
from dapt_jax.training.cache.store import Prefix
from dapt_jax.training.context import RunContext
from dapt_jax.training.phases import Phase
from dapt_jax.training.quantised import Quantised, RoundingError, dequantised, quantise
from tests import command, tiny
from tests.test_label_free_training import run_of as label_free_run
from tests.test_training_cache import DATA, ENCODER, VIEWS, cache_in
from tests.test_training_loop import context, curve, leaves, train

PARTIAL = Phase("partial", 3, ("stage3", "head"), 1e-2, views=2)
INT8 = Caching("on", 1 << 28, dtype="int8")


def run_of(caching, *phases):
    return tiny.make_run(phases or (PARTIAL,), encoder=ENCODER, data=DATA, augment=VIEWS, cache=caching)


@settings(max_examples=60, deadline=None)
@given(
    x=arrays.arrays(
        np.float32, (2, 3, 4, 5), elements=st.floats(-1e6, 1e6, width=32).map(lambda value: value * 1e-3)
    )
)
def test_a_value_is_off_by_at_most_half_a_step_of_the_scale_of_its_image_and_channel(x):
    found = quantise(x, 1)
    assert found.values.dtype == np.int8
    assert found.scale.shape == (2, 5)
    step = np.abs(x).max((1, 2)) / 127
    np.testing.assert_allclose(found.scale, step, rtol=1e-6)
    back = np.asarray(dequantised(found, jnp.float32))
    assert (np.abs(back - x) <= step[:, None, None] * 0.501 + 1e-30).all()
    error = RoundingError()
    error.add(x, found)
    if np.any(x):
        expected = np.linalg.norm((back - x).astype(float)) / np.linalg.norm(x.astype(float))
        assert error.relative == pytest.approx(expected, rel=1e-6)


def test_what_is_not_finite_does_not_come_back_finite():
    x = np.ones((2, 3, 3, 2), np.float32)
    x[0, 1, 1, 0], x[1, 0, 0, 1] = np.nan, np.inf
    back = np.asarray(dequantised(quantise(x, 1), jnp.float32))
    assert np.isnan(back[0, ..., 0]).all()
    assert np.isnan(back[1, ..., 1]).all()
    np.testing.assert_allclose(back[0, ..., 1], 1)


def test_the_budget_counts_the_bytes_of_values_and_scales():
    program = run_of(INT8).programs[0]
    size = 2 * 40 * (4 * 4 * 6 + 4 * 6)  # views, images, values, scales
    found = choose_cache(program, 40, 16, INT8)
    assert (found.tier, found.bytes) == ("memory", size)
    exact = choose_cache(program, 40, 16, Caching("on", 1 << 28))
    assert exact.bytes == 2 * 40 * 4 * 4 * 6 * 4
    assert not choose_cache(program, 40, 16, Caching("auto", size - 1, 0, dtype="int8")).cached
    assert choose_cache(program, 40, 16, Caching("auto", size, 0, dtype="int8")).cached


def test_pooled_features_stay_as_they_are(tmp_path):
    prefix = Prefix(run_of(INT8).model, len(ENCODER.groups))
    assert prefix.shapes(16, "int8") == prefix.shapes(16)
    params, batch_stats = prefix.model.init(0)
    exact, same = (
        cache_in(tmp_path, memory=1 << 20, disk=0, dtype=dtype).get(prefix, params, batch_stats, DATA.images)
        for dtype in ("", "int8")
    )
    np.testing.assert_array_equal(exact.x, same.x)
    assert plan.of_run(run_of(INT8, tiny.HEAD))[0].approximations == ""


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_a_cache_holds_these_bytes_and_says_how_far_it_is_off(tmp_path, tier):
    program = run_of(INT8).programs[0]
    part, (params, batch_stats) = Prefix.of(program, 2), program.model.init(1)
    said = []
    found = cache_in(tmp_path, said, memory=1 << 20, dtype="int8").get(
        part, params, batch_stats, DATA.images, tier
    )
    exact = cache_in(tmp_path, memory=1 << 20, disk=0).get(part, params, batch_stats, DATA.images)
    rows = np.arange(40)
    stored, x = found.rows(1, rows), np.asarray(exact.rows(1, rows))
    assert isinstance(stored, Quantised)
    expected = quantise(x, 1)
    np.testing.assert_array_equal(stored.values, expected.values)
    np.testing.assert_array_equal(stored.scale, expected.scale)
    assert tree_bytes(cached_spec(part.shapes(16), "int8")) * 80 == choose_cache(program, 40, 16, INT8).bytes
    assert 0.001 < found.rounding_error < 0.01
    (line,) = said
    assert line == (
        "activations behind stage2/block1 are cached in int8: off by "
        f"{found.rounding_error:.2%} of their root mean square"
    )
    if tier == "disk":  # a later start reads the error with the entry
        again = cache_in(tmp_path, said, dtype="int8").get(part, params, batch_stats, DATA.images, tier)
        assert (again.rounding_error, again.ran, len(said)) == (found.rounding_error, 0, 1)


def test_from_rounded_activations_no_others_are_computed():
    """Else features would depend on what was cached before, and be taken for exact ones by others."""
    head = Phase("head", 2, ("head",), 1e-2, views=2)
    own = len(ENCODER.groups)
    for dtype, boundaries in (("", [own - 1, own]), ("int8", [own]), ("bfloat16", [own])):
        run = run_of(Caching("on", 1 << 28, dtype=dtype), head, PARTIAL)
        assert [prefix.boundary for prefix, _ in run.prefixes_to_compute(0)] == boundaries
        assert label_free_run("reconstruct", cache=run.caching).extends_prefix(0) is not bool(dtype)
    assert plan.of_run(run_of(INT8, head, PARTIAL))[0].approximations == ""


@pytest.mark.parametrize(("error", "by"), [(0.0, ""), (0.004, ", off by 0.40% of their root mean square")])
def test_rounded_activations_and_targets_are_named_even_where_their_error_is_not_known(error, by):
    run = label_free_run("distil", cache=INT8)
    words = {"is_cached": True, "has_cached_targets": True, "error": error, "targets_error": error}
    found = approximations.of_phase(run, 0, **words)
    assert found == f"activations cached in int8{by}; targets cached in int8{by}"
    assert plan.of_run(run)[0].approximations == "activations cached in int8; targets cached in int8"


def test_a_teacher_s_rounded_targets_are_named_where_no_prefix_is_cached():
    phases, caching = (Phase("full", 2, ("*",), 1e-3, views=2),), Caching("auto", 1 << 28, dtype="int8")
    run = label_free_run("distil", phases=phases, cache=caching)
    result = loop.train(run, *run.model.init(1), RunContext())
    assert result.costs[0].approximations.startswith("targets cached in int8, off by 0.")


def test_rounded_features_of_a_target_task_are_named_in_plan_and_ledger(tmp_path, capsys):
    flags = command.small("--config.cache.dtype=bfloat16", "--config.strategies=none", "--config.seeds=0")
    flags = (*flags, f"--workdir={tmp_path}")
    assert command.run(*flags, "--config.mode=plan") == 0
    assert "features is approximate: features cached in bfloat16" in capsys.readouterr().out
    assert command.run(*flags) == 0
    rows = [row for row in command.rows(tmp_path / "ledger.jsonl") if row["phase"].endswith("/features")]
    assert rows
    assert all(row["approximations"].startswith("features cached in bfloat16, off by 0.") for row in rows)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_the_pixels_that_are_predicted_keep_their_dtype(dtype):
    run = label_free_run("mae", "vit", Caching("on", 1 << 28, dtype=dtype))
    shapes = Prefix.of(run.programs[0], 2).shapes(16, dtype)
    assert shapes["pixels"].dtype == jnp.float32
    assert tree_bytes(shapes["tokens"]) < tree_bytes(Prefix.of(run.programs[0], 2).shapes(16)["tokens"])


def test_a_run_in_8_bits_gives_nearly_the_same_results_and_its_ledger_the_plan():
    exact, exact_rows = train(run_of(Caching("on", 1 << 28)))
    run = run_of(INT8)
    result = loop.train(run, *run.model.init(1), RunContext())  # whose cache follows the run's dtype
    coarse, rows = leaves(result), result.costs
    np.testing.assert_allclose(curve(rows), curve(exact_rows), rtol=0.01)
    assert not all(np.array_equal(a, b) for a, b in zip(exact, coarse, strict=True))
    (planned,) = plan.of_run(run)
    assert rows[0].model_flops == planned.flops == exact_rows[0].model_flops
    assert planned.approximations == "activations cached in int8"
    assert rows[0].approximations.startswith("activations cached in int8, off by 0.")
    assert exact_rows[0].approximations == ""


def test_fit_never_chooses_8_bits_by_itself():
    assert CacheSettings(dtype="int8").policy().dtype == "int8"
    cache = dataclasses.replace(StudySettings().cache, dtype="int8", memory_mb=1, disk_mb=0)
    named = dataclasses.replace(StudySettings(), cache=cache)
    assert budgets.resolved(named).cache.dtype == "int8"
    assert CacheSettings(dtype="fit").policy().dtype == ""


@pytest.mark.long
@pytest.mark.parametrize("name", ["reconstruct", "two_views"])
def test_targets_and_batches_from_disk_are_in_8_bits_too(tmp_path, name):
    found = {}
    for dtype in ("", "int8"):
        run = label_free_run(name, cache=Caching("on", 0, 1 << 28, dtype=dtype))
        trained = loop.train(
            run, *run.model.init(1), context(cache=cache_in(tmp_path / f"{name}{dtype}", dtype=dtype))
        )
        assert sum(row.model_flops for row in trained.costs) == run.flops()
        found[dtype] = trained.costs
    np.testing.assert_allclose(curve(found["int8"]), curve(found[""]), rtol=0.02)
    assert found["int8"][0].approximations.startswith("activations cached in int8, off by ")
