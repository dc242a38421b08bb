"""Intervals, tests and ranks against scipy's, against closed formulas and against what they must not depend on."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from dapt_jax.errors import UserError
from dapt_jax.statistics import (
    Summary,
    auc,
    bootstrap_interval,
    cohens_d,
    delong,
    equivalence,
    hedges_g,
    holm,
    mean_interval,
    non_inferiority,
    paired_dz,
    paired_t,
    pareto,
    patient_draws,
    patient_interval,
    ranks,
    summary_t,
    welch_t,
)

finite = st.floats(-10, 10)
some = st.lists(st.integers(-99, 99), min_size=2, max_size=8)
pairs_of_runs = st.lists(st.tuples(st.integers(-99, 99), st.integers(-99, 99)), min_size=2, max_size=8)
SIDES = ("two-sided", "greater", "less")


@settings(max_examples=50, deadline=None)
@given(st.lists(finite, min_size=2, max_size=8))
def test_t_interval_is_scipys(values):
    found = mean_interval(values)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert (found.half or 0.0) == pytest.approx(stats.t.ppf(0.975, len(values) - 1) * error, abs=1e-9)


def test_t_interval_by_hand_and_its_gaps():
    # t(0.975, 2) = 4.302653, standard error of 1, 2, 3 is 1 / sqrt(3).
    found = mean_interval([1.0, None, 2.0, float("nan"), 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    single = mean_interval([None, 0.5])
    assert (single.mean, single.low, single.high, single.half, single.n) == (0.5, None, None, None, 1)
    same = mean_interval([0.1 + 0.2, 0.3, 0.3])  # 0.1 + 0.2 is not 0.3 in binary, which is no spread
    assert (same.low, same.high, same.n) == (None, None, 3)
    assert paired_t([0.8, 0.9, 0.7], [0.7, 0.8, 0.6]).is_constant
    assert not paired_t([0.8, 0.9, 0.7], [0.8, 0.9, 0.7]).is_constant
    assert not paired_t([0.8], [0.7]).is_constant
    assert mean_interval([None]) is None
    assert mean_interval([]) is None


@settings(max_examples=50, deadline=None)
@given(pairs_of_runs, st.sampled_from(SIDES))
def test_paired_t_is_scipys(pairs, side):
    first, second = zip(*pairs, strict=True)
    found = paired_t(first, second, side)
    if len({a - b for a, b in pairs}) == 1:
        assert found.p == (1.0 if first[0] == second[0] else None)
        return
    theirs = stats.ttest_rel(first, second, alternative=side)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-6)
    if side == "two-sided":
        bounds = theirs.confidence_interval(0.95)
        assert (found.difference.low, found.difference.high) == pytest.approx((bounds.low, bounds.high))


def test_paired_t_over_the_seeds_both_have():
    found = paired_t([0.9, None, 0.8, 0.85], [0.8, 0.7, 0.75, None])
    assert found.difference.n == 2
    assert found.difference.mean == pytest.approx(0.075)
    assert paired_t([0.9], [0.8]).p is None
    assert paired_t([0.9, None], [None, 0.8]) is None


@settings(max_examples=50, deadline=None)
@given(some, some, st.sampled_from(SIDES), st.booleans())
def test_welch_s_and_student_s_tests_are_scipy_s_from_values_and_from_what_a_table_prints(
    first, second, side, equal
):
    assume(len(set(first)) > 1 and len(set(second)) > 1)
    theirs = stats.ttest_ind(first, second, equal_var=equal, alternative=side)
    found = summary_t(Summary.of(first), Summary.of(second), equal, side)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-6)
    if not equal:
        assert welch_t(first, second, side) == found
    if side == "two-sided":
        bounds = theirs.confidence_interval(0.95)
        assert (found.difference.low, found.difference.high) == pytest.approx((bounds.low, bounds.high))


def test_tests_name_their_sides_and_say_nothing_without_spread():
    assert welch_t([1, 2], [3, 5]).test == "two-sided Welch's t-test"
    assert welch_t([1, 2], [3, 5], "less").test == "one-sided (less) Welch's t-test"
    assert paired_t([1, 2], [3, 5], "greater").test == "one-sided (greater) paired t-test"
    assert welch_t([1, 2], [3]).p is None
    assert welch_t([1, 1], [2, 2]).p is None
    assert welch_t([1, 1], [1, 1]).p == 1
    assert welch_t([None], [1, 1]) is None
    assert non_inferiority([1, 1], [1, 1], 0.1).p is None


@settings(max_examples=50, deadline=None)
@given(pairs_of_runs, st.floats(0.5, 50), st.booleans())
def test_non_inferiority_and_equivalence_are_shifted_t_tests_and_agree_with_their_interval(
    pairs, margin, paired
):
    first, second = (np.array(each, float) for each in zip(*pairs, strict=True))
    assume(np.ptp(first - second) > 0 and np.ptp(first) > 0 and np.ptp(second) > 0)
    test = stats.ttest_rel if paired else lambda *a, **k: stats.ttest_ind(*a, equal_var=False, **k)
    above = test(first + margin, second, alternative="greater").pvalue
    below = test(first - margin, second, alternative="less").pvalue
    held = non_inferiority(first, second, margin, paired=paired)
    assert held.p == pytest.approx(above, rel=1e-6)
    assert non_inferiority(first, second, margin, lower_is_better=True, paired=paired).p == pytest.approx(
        below, rel=1e-6
    )
    both = equivalence(first, second, margin, paired)
    assert both.p == pytest.approx(max(above, below), rel=1e-6)
    assert (both.p < 0.05) == (-margin < both.difference.low and both.difference.high < margin)
    assert (held.p < 0.05) == (-margin < held.difference.low)
    bounds = test(first, second).confidence_interval(0.9)
    for found in (both, held):
        assert (found.difference.low, found.difference.high) == pytest.approx((bounds.low, bounds.high))


@settings(max_examples=50, deadline=None)
@given(some, some)
def test_effect_sizes_follow_from_the_t_statistics(first, second):
    assume(len(set(first)) > 1 and len(set(second)) > 1)
    n, m = len(first), len(second)
    d = stats.ttest_ind(first, second).statistic * math.sqrt(1 / n + 1 / m)
    assert cohens_d(first, second) == pytest.approx(d)
    # The usual approximation of Hedges' factor, good to a few per mille from ten degrees of freedom.
    assert hedges_g(first, second) == pytest.approx(
        d * (1 - 3 / (4 * (n + m - 2) - 1)), rel=0.03 if n + m < 12 else 5e-4
    )
    if n == m and len({a - b for a, b in zip(first, second, strict=True)}) > 1:
        assert paired_dz(first, second) == pytest.approx(
            stats.ttest_rel(first, second).statistic / math.sqrt(n)
        )


def test_effect_sizes_without_spread_are_none():
    assert cohens_d([1, 1], [2, 2]) is None
    assert hedges_g([1], [2, 3]) is None
    assert paired_dz([1, 2], [2, 3]) is None


def test_holm_by_hand():
    # Holm 1979: smallest p times 4, next times 3, and never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.04, None, 0.5]) == [0.08, None, 0.5]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_bca_bootstrap():
    values = list(np.random.default_rng(0).normal(3.0, 1.0, 200))
    found = bootstrap_interval(values)
    assert found == bootstrap_interval(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.half == pytest.approx(1.96 * np.std(values) / math.sqrt(200), rel=0.05)
    # Of skewed values the interval reaches further on the side of the tail: what BCa adds to percentiles.
    skewed = np.random.default_rng(1).exponential(size=30)
    found = bootstrap_interval(skewed)
    draws = np.random.default_rng(2).choice(skewed, (10_000, 30)).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low > low + 0.01
    assert found.high > high + 0.03
    assert (bootstrap_interval([2.0, 2.0]).mean, bootstrap_interval([2.0, 2.0]).low) == (2.0, None)
    assert bootstrap_interval([1.0]).low is None
    assert bootstrap_interval([None]) is None


def over_patients(measure, groups, resamples=2000):
    draws = patient_draws(measure, groups, resamples)
    assert draws.shape == (resamples,)
    return patient_interval(measure(np.arange(len(groups))), draws, len(set(groups)))


def test_bootstrap_over_patients_knows_that_images_of_one_patient_are_no_news():
    rng = np.random.default_rng(0)
    of_patient = rng.normal(size=60)
    values = np.repeat(of_patient, 5)
    groups = np.repeat([f"p{k:02}" for k in range(60)], 5)
    found = over_patients(lambda rows: float(values[rows].mean()), groups)
    assert found.n == 60
    assert found.mean == pytest.approx(of_patient.mean())
    assert found.half == pytest.approx(1.96 * of_patient.std() / math.sqrt(60), rel=0.08)
    by_image = over_patients(lambda rows: float(values[rows].mean()), np.arange(300))
    assert by_image.half == pytest.approx(found.half / math.sqrt(5), rel=0.1)
    order = rng.permutation(300)
    shuffled = over_patients(lambda rows: float(values[order][rows].mean()), groups[order])
    assert (shuffled.low, shuffled.high) == pytest.approx((found.low, found.high))


def test_draws_of_the_same_patients_are_the_same_so_that_differences_are_paired():
    rng = np.random.default_rng(0)
    first, groups = rng.normal(size=90), np.repeat(np.arange(30), 3)
    draws = [
        patient_draws(lambda rows, each=each: float(each[rows].mean()), groups)
        for each in (first, first + 0.1)
    ]
    np.testing.assert_allclose(draws[1] - draws[0], 0.1)


def test_bootstrap_over_patients_leaves_out_draws_without_a_score_and_stops_at_too_many():
    positive, scores = np.array([1, 0, 0, 0, 0, 0]) == 1, np.array([0.9, 0.1, 0.95, 0.2, 0.3, 0.4])
    found = over_patients(lambda rows: auc(positive[rows], scores[rows]), np.arange(6))
    assert found.mean == pytest.approx(0.8)
    assert 0 <= found.low < found.high <= 1
    assert over_patients(lambda rows: math.nan, np.arange(6)).low is None
    assert over_patients(lambda rows: 1.0, ["one", "one"]).low is None
    perfect = over_patients(lambda rows: auc(positive[rows], 1.0 * positive[rows]), np.arange(6))
    assert (perfect.mean, perfect.low, perfect.high) == (1.0, None, None)
    both = np.arange(6) < 3
    assert delong(both, 1.0 * both[None]).interval(0).low is None
    with pytest.raises(UserError, match="no image to draw patients from"):
        patient_draws(lambda rows: 1.0, [])


def by_pairs(positive, scores):
    """DeLong's areas and covariance as they are defined: over all pairs of a positive and a negative."""
    wins = [
        (each[positive][:, None] > each[~positive]) + 0.5 * (each[positive][:, None] == each[~positive])
        for each in scores
    ]
    above, below = np.array([w.mean(1) for w in wins]), np.array([w.mean(0) for w in wins])
    covariance = np.cov(above) / above.shape[1] + np.cov(below) / below.shape[1]
    return np.array([w.mean() for w in wins]), covariance


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(2, 9))
def test_delong_by_midranks_is_delong_by_all_pairs(seed, m, n):
    rng = np.random.default_rng(seed)
    positive = rng.permutation(np.arange(m + n) < m)
    scores = rng.integers(0, 5, (3, m + n)) + positive  # ties
    found = delong(positive, scores)
    areas, covariance = by_pairs(positive, scores)
    np.testing.assert_allclose(found.values, areas)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-12)
    for values, area in zip(scores, areas, strict=True):
        assert (
            auc(positive, values) == pytest.approx(area) == pytest.approx(sk.roc_auc_score(positive, values))
        )
    order = rng.permutation(m + n)
    moved = delong(positive[order], np.exp(scores[:, order]))  # neither order nor scale matters
    np.testing.assert_allclose(moved.covariance, found.covariance, atol=1e-12)
    difference, variance = areas[0] - areas[1], covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    test = found.difference(0, 1)
    assert test.difference.mean == pytest.approx(difference)
    if variance > 1e-9:
        assert test.p == pytest.approx(2 * stats.norm.sf(abs(difference) / math.sqrt(variance)))


def test_delong_keeps_its_level_and_covers_where_there_is_no_difference():
    rng = np.random.default_rng(0)
    positive = np.arange(120) < 50
    rejected = covered = 0
    for _ in range(400):
        shared = rng.normal(size=120) + positive
        areas = delong(positive, shared + rng.normal(size=(2, 120)))
        rejected += areas.difference(0, 1).p < 0.05
        interval = areas.interval(0)
        covered += (
            interval.low < stats.norm.cdf(1 / 2) < interval.high
        )  # of two normals sqrt(2) wide, 1 apart
    assert 0.02 < rejected / 400 < 0.085
    assert covered / 400 > 0.92


def test_delong_without_variance():
    positive = np.array([True, True, False, False])
    perfect, wrong = np.array([3.0, 4, 1, 2]), np.array([1.0, 2, 3, 4])
    areas = delong(positive, np.stack([perfect, wrong, perfect]))
    assert areas.difference(0, 1).p is None
    assert areas.difference(0, 2).p == 1
    for other in (1, 2):
        found = areas.difference(0, other).difference
        assert (found.low, found.high, found.half) == (None, None, None)
    with pytest.raises(UserError, match="1 positives and 3 negatives"):
        delong(np.array([True, False, False, False]), perfect[None])


def test_critical_differences_are_those_of_the_table():
    # Demsar 2006, table 5: q at 0.05 for 2, 5 and 10 classifiers.
    for k, q in ((2, 1.960), (5, 2.728), (10, 3.164)):
        scores = np.random.default_rng(k).random((14, k))
        assert ranks(scores).critical_difference == pytest.approx(
            q * math.sqrt(k * (k + 1) / (6 * 14)), rel=1e-3
        )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_ranks_share_ties_add_up_and_follow_the_strategies(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (5, 4)).astype(float)
    found = ranks(scores)
    assert found.by_task.sum(1) == pytest.approx([10] * 5)
    if found.p is not None:
        assert found.p == pytest.approx(stats.friedmanchisquare(*scores.T).pvalue)
    order = rng.permutation(4)
    np.testing.assert_allclose(ranks(scores[:, order]).mean, found.mean[order])
    np.testing.assert_allclose(ranks(-scores, lower_is_better=True).by_task, found.by_task)
    np.testing.assert_allclose(ranks(scores, lower_is_better=True).mean, 5 - found.mean)


def test_ranks_by_hand():
    found = ranks(np.array([[0.9, 0.8, 0.8], [0.7, 0.6, 0.5]]))
    assert found.by_task.tolist() == [[1, 2.5, 2.5], [1, 2, 3]]
    assert found.mean.tolist() == [1, 2.25, 2.75]
    assert ranks(np.ones((3, 3))).p is None
    assert ranks(np.array([[1.0, 2.0]])).p is None


def test_pareto_front():
    assert pareto([1, 2, 3, 2.5], [0.5, 0.7, 0.6, 0.9]) == [0, 1, 3]
    assert pareto([1, 1], [0.5, 0.7]) == [1]
    assert pareto([], []) == []
