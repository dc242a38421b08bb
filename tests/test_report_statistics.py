import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dapt_jax.report.statistics import bootstrap_interval, holm, mean_interval, paired_t, pareto

finite = st.floats(-10, 10)


@settings(max_examples=50, deadline=None)
@given(st.lists(finite, min_size=2, max_size=8))
def test_t_interval_is_scipys(values):
    found = mean_interval(values)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert found.half == pytest.approx(stats.t.ppf(0.975, len(values) - 1) * error, abs=1e-9)


def test_t_interval_by_hand_and_its_gaps():
    # t(0.975, 2) = 4.302653, standard error of 1, 2, 3 is 1 / sqrt(3).
    found = mean_interval([1.0, None, 2.0, float("nan"), 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    single = mean_interval([None, 0.5])
    assert (single.mean, single.low, single.high, single.half, single.n) == (0.5, None, None, None, 1)
    assert mean_interval([None]) is None
    assert mean_interval([]) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-99, 99), st.integers(-99, 99)), min_size=2, max_size=8))
def test_paired_t_is_scipys(pairs):
    first, second = zip(*pairs, strict=True)
    found = paired_t(first, second)
    if len({a - b for a, b in pairs}) == 1:
        assert found.p == (1.0 if first[0] == second[0] else None)
    else:
        assert found.p == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-6)


def test_paired_t_over_the_seeds_both_have():
    found = paired_t([0.9, None, 0.8, 0.85], [0.8, 0.7, 0.75, None])
    assert found.difference.n == 2
    assert found.difference.mean == pytest.approx(0.075)
    assert paired_t([0.9], [0.8]).p is None
    assert paired_t([0.9, None], [None, 0.8]) is None


def test_holm_by_hand():
    # Holm 1979: smallest p times 4, next times 3, and never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.04, None, 0.5]) == [0.08, None, 0.5]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_bootstrap():
    values = list(np.random.default_rng(0).normal(3.0, 1.0, 200))
    found = bootstrap_interval(values)
    assert found == bootstrap_interval(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.half == pytest.approx(1.96 * np.std(values) / math.sqrt(200), rel=0.05)
    assert bootstrap_interval([1.0]).low is None
    assert bootstrap_interval([None]) is None


def test_pareto_front():
    assert pareto([1, 2, 3, 2.5], [0.5, 0.7, 0.6, 0.9]) == [0, 1, 3]
    assert pareto([1, 1], [0.5, 0.7]) == [1]
    assert pareto([], []) == []
