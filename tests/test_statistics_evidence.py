"""Two-level comparisons, power of non-inferiority, and random-effects summaries."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.errors import UserError
from dapt_jax.statistics import (
    margin_for_seeds,
    mean_interval,
    non_inferiority,
    paired_t,
    power_of_non_inferiority,
    random_effects,
    seeds_for_margin,
    two_level,
    upper_sd,
)

values = st.lists(st.floats(-1, 1), min_size=2, max_size=8).filter(lambda of: np.std(of) > 1e-3)


@settings(max_examples=40, deadline=None)
@given(values, st.floats(0.01, 0.5), st.booleans())
def test_without_variance_over_patients_two_levels_are_the_paired_t_test(differences, margin, lower):
    zeros = [0.0] * len(differences)
    found = two_level(differences, np.tile(differences, (50, 1)), 40)
    against = paired_t(differences, zeros)
    assert found.p(0.0) == pytest.approx(against.p)
    assert found.interval().low == pytest.approx(against.difference.low, abs=1e-9)
    tested = non_inferiority(differences, zeros, margin, lower)
    assert found.non_inferiority(margin, lower).p == pytest.approx(tested.p, abs=1e-9)


def test_with_equal_seeds_two_levels_are_the_bootstrap_over_patients():
    rng = np.random.default_rng(0)
    draws = np.tile(rng.normal(0.1, 0.03, (2000, 1)), 4)
    found = two_level([0.1] * 4, draws, 5000)
    assert found.error == pytest.approx(draws[:, 0].std(ddof=1))
    low, high = np.quantile(draws[:, 0], [0.025, 0.975])
    assert found.interval().low == pytest.approx(low, abs=0.004)
    assert found.interval().high == pytest.approx(high, abs=0.004)


def test_two_levels_say_nothing_of_one_seed_one_patient_or_undefined_draws():
    draws = np.zeros((10, 2))
    assert two_level([None, math.nan], draws, 9) is None
    for differences, of, patients in (
        ([0.1, None], draws, 9),
        ([0.1, 0.2], draws, 1),
        ([0.1, 0.2], np.full((10, 2), np.nan), 9),
    ):
        found = two_level(differences, of, patients)
        assert found.error is None
        assert found.p(0.0) is None
        assert found.interval().low is None


def test_two_levels_keep_their_error_rate_where_a_test_over_seeds_alone_does_not():
    """At a true difference of exactly minus the margin, non-inferiority is claimed in 5% of studies at most."""
    rng = np.random.default_rng(1)
    seeds, patients, margin, trials = 4, 60, 0.2, 500
    claims = {"two-level": 0, "seeds": 0}
    for _ in range(trials):
        scores = (
            rng.normal(0, 0.1, (seeds, 1))
            + rng.normal(0, 1.0, patients)
            + rng.normal(0, 0.3, (seeds, patients))
        )
        differences = (scores - margin).mean(1)
        counts = rng.multinomial(patients, np.full(patients, 1 / patients), 200)
        draws = counts @ (scores - margin).T / patients
        found = two_level(list(differences), draws, patients).non_inferiority(margin)
        claims["two-level"] += found.p < 0.05
        claims["seeds"] += non_inferiority(list(differences), [0.0] * seeds, margin).p < 0.05
    assert claims["two-level"] / trials < 0.075
    assert claims["seeds"] / trials > 0.15


def test_power_is_the_share_of_simulated_studies_that_claim():
    rng = np.random.default_rng(2)
    found = [
        non_inferiority(list(rng.normal(-0.002, 0.01, 7)), [0.0] * 7, 0.01).p < 0.05 for _ in range(2000)
    ]
    power = power_of_non_inferiority(0.01, 0.01, 7, difference=-0.002)
    assert np.mean(found) == pytest.approx(power, abs=0.035)


def test_seeds_of_a_margin_are_those_of_published_tables():
    """G*Power 3.1, one-sided paired t-test at 0.05 with a power of 0.8: effect 0.5 takes 27 pairs, 1 takes 8."""
    assert seeds_for_margin(0.01, 0.02) == 27
    assert seeds_for_margin(0.01, 0.01) == 8


@settings(max_examples=30, deadline=None)
@given(st.floats(0.001, 0.1), st.integers(2, 60))
def test_the_margin_of_some_seeds_needs_those_seeds(sd, seeds):
    margin = margin_for_seeds(sd, seeds)
    assert power_of_non_inferiority(margin, sd, seeds) == pytest.approx(0.8, abs=1e-6)
    assert seeds_for_margin(margin * 1.0001, sd) <= seeds


def test_a_margin_that_no_number_of_seeds_shows_has_none():
    assert seeds_for_margin(0.01, 0.1, difference=-0.01) is None
    assert seeds_for_margin(0.01, 10.0) is None
    assert seeds_for_margin(0.01, 0.0) == 2
    for exponent in range(3, 300, 9):  # differences that hardly scatter take no more seeds than those that do
        assert seeds_for_margin(0.5, 10.0**-exponent) == 2
        assert power_of_non_inferiority(0.5, 10.0**-exponent, 2) == pytest.approx(1.0)
    assert margin_for_seeds(0.01, 1) is None


def test_the_upper_limit_of_a_deviation_covers_it():
    rng = np.random.default_rng(3)
    limits = [upper_sd(float(sample.std(ddof=1)), 3) for sample in rng.normal(0, 1, (4000, 4))]
    assert np.mean(np.array(limits) > 1) == pytest.approx(0.8, abs=0.02)
    with pytest.raises(UserError, match="0 degrees of freedom; expected 1 or more"):
        upper_sd(1.0, 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=3, max_size=7), st.floats(0.001, 0.01))
def test_effects_of_equal_errors_are_summarised_by_their_plain_t_interval(effects, error):
    variance = float(np.var(effects, ddof=1))
    found = random_effects(effects, [error] * len(effects))
    assert found.tau**2 == pytest.approx(max(0.0, variance - error**2), abs=1e-8)
    if variance > error**2:
        plain = mean_interval(effects)
        assert found.effect.low == pytest.approx(plain.low, abs=1e-6)
        assert found.effect.high == pytest.approx(plain.high, abs=1e-6)


BCG = (
    (-0.8893, -1.5854, -1.3481, -1.4416, -0.2175, -0.7861, -1.6209, 0.0120, -0.4694, -1.3713, -0.3394, 0.4459, -0.0173),
    (0.3256, 0.1946, 0.4154, 0.0200, 0.0512, 0.0069, 0.2230, 0.0040, 0.0564, 0.0730, 0.0124, 0.5325, 0.0714),
)  # fmt: skip
"""Log risk ratios and variances of 13 trials of the BCG vaccine (Colditz et al., 1994; metafor's dat.bcg)."""


def test_the_bcg_trials_are_summarised_as_by_metafor():
    """`rma(yi, vi, method="PM", test="knha")` of metafor: tau^2 0.3181, estimate -0.7150."""
    found = random_effects(BCG[0], np.sqrt(BCG[1]))
    assert found.tau**2 == pytest.approx(0.3181, abs=5e-4)
    assert found.effect.mean == pytest.approx(-0.7150, abs=5e-4)
    assert found.i_squared == pytest.approx(0.9212, abs=1e-3)


def test_a_summary_over_few_studies_says_little_and_of_none_nothing():
    alone = random_effects([0.01], [0.002])
    assert (alone.effect.mean, alone.effect.low, alone.p, alone.prediction) == (0.01, None, None, None)
    assert random_effects([0.01, 0.02], [0.002, 0.002]).prediction is None
    for effects, errors in (([], []), ([0.1], [0.0]), ([0.1, 0.2], [0.1]), ([math.nan], [0.1])):
        with pytest.raises(UserError, match="expected one finite error above 0"):
            random_effects(effects, errors)
