"""Scores of labelled features agree with textbook formulas, keep their invariances, and say why they are undefined."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KNeighborsClassifier

from dapt_jax.errors import UserError
from dapt_jax.transferability.gbc import gbc
from dapt_jax.transferability.h_score import h_score, regularised_h_score
from dapt_jax.transferability.inputs import FeatureStatistics
from dapt_jax.transferability.knn import knn
from dapt_jax.transferability.leep import leep
from dapt_jax.transferability.linear_probe import linear_probe
from dapt_jax.transferability.logme import logme
from dapt_jax.transferability.mixture import responsibilities
from dapt_jax.transferability.nce import nce
from dapt_jax.transferability.nleep import nleep
from dapt_jax.transferability.parc import parc
from dapt_jax.transferability.registry import SCORES, Sample, evaluate
from dapt_jax.transferability.sfda import sfda
from dapt_jax.transferability.transrate import transrate

LABELLED = [name for name, entry in SCORES.items() if entry.needs == "labels"]


def clusters(n=60, d=8, classes=3, apart=1.5, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    means = apart * rng.normal(size=(classes, d))
    return means[labels] + rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / np.sqrt(d) + 0.3, labels


SHAPES = {"tall": clusters(), "wide": clusters(n=30, d=45), "two": clusters(n=41, d=5, classes=2, seed=3)}


@pytest.fixture(params=SHAPES)
def data(request):
    return SHAPES[request.param]


def softmax_rows(n, z, seed=1):
    logits = np.random.default_rng(seed).normal(size=(n, z)) * 2
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_leep_and_nce_follow_their_sums(data):
    _, y = data
    theta = softmax_rows(len(y), 6)
    classes = y.max() + 1
    joint = np.zeros((classes, 6))
    for label, row in zip(y, theta, strict=True):
        joint[label] += row / len(y)
    want = 0.0
    for label, row in zip(y, theta, strict=True):
        want += np.log(sum(joint[label, z] / joint[:, z].sum() * row[z] for z in range(6)))
    np.testing.assert_allclose(leep(theta, y), want / len(y), rtol=1e-12)
    hard = np.zeros((classes, 6))
    for label, row in zip(y, theta, strict=True):
        hard[label, row.argmax()] += 1 / len(y)
    want = sum(
        hard[a, z] * np.log(hard[a, z] / hard[:, z].sum())
        for a in range(classes)
        for z in range(6)
        if hard[a, z]
    )
    np.testing.assert_allclose(nce(theta, y), want, rtol=1e-12)


def test_leep_of_a_source_head_that_says_nothing_is_minus_the_entropy_of_the_labels():
    y = np.array([0, 0, 0, 1])
    want = 0.75 * np.log(0.75) + 0.25 * np.log(0.25)
    np.testing.assert_allclose(leep(np.full((4, 5), 0.2), y), want, rtol=1e-12)
    np.testing.assert_allclose(nce(np.full((4, 5), 0.2), y), want, rtol=1e-12)
    assert leep(np.eye(2)[y], y) == pytest.approx(0, abs=1e-12)


def test_logme_follows_the_published_fixed_point(data):
    f, y = data
    n, d = f.shape
    s = np.zeros(d)
    s[: min(n, d)] = np.linalg.svd(f, compute_uv=False) ** 2
    found = []
    for label in range(y.max() + 1):
        t = (y == label).astype(float)
        a = b = 1.0
        for _ in range(11):
            ratio = a / b
            m = np.linalg.lstsq(
                np.vstack([f, np.sqrt(ratio) * np.eye(d)]), np.append(t, np.zeros(d)), rcond=None
            )[0]
            gamma = sum(s / (s + ratio))
            m2, r2 = m @ m, np.sum((t - f @ m) ** 2)
            a, b = gamma / (m2 + 1e-5), (n - gamma) / (r2 + 1e-5)
            if abs(a / b - ratio) / ratio <= 1e-3:
                break
        logs = d * np.log(a) + n * np.log(b) - np.sum(np.log(a + b * s)) - n * np.log(2 * np.pi)
        found.append((logs - b * r2 - a * m2) / 2 / n)
    np.testing.assert_allclose(logme(f, y), np.mean(found), rtol=1e-8)


def test_logme_at_its_fixed_point_is_the_marginal_likelihood_also_where_the_rank_is_below_d():
    """y ~ N(0, I/b + F F'/a): the textbook Gaussian, which knows nothing of eigenvalues or of d."""
    f, y = clusters(n=80, d=4)
    f = np.hstack([f, f @ np.ones((4, 3))])  # rank 4 of 7
    found = logme(f, y, steps=300, tolerance=1e-13)

    def evidence(target):
        def minus(logs):
            a, b = np.exp(logs)
            covariance = np.eye(len(f)) / b + f @ f.T / a
            return -scipy.stats.multivariate_normal(cov=covariance).logpdf(target)

        best = scipy.optimize.minimize(
            minus, [0.0, 1.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9}
        )
        return -best.fun / len(f)

    want = np.mean([evidence((y == label).astype(float)) for label in range(3)])
    np.testing.assert_allclose(found, want, atol=2e-5)  # the 1e-5 in the denominators is all the difference


def test_h_scores_follow_their_traces(data):
    f, y = data
    means = np.stack([f[y == label].mean(0) for label in y])
    want = np.trace(np.linalg.pinv(np.cov(f.T, bias=True), rcond=1e-12) @ np.cov(means.T, bias=True))
    np.testing.assert_allclose(h_score(f, y), want, rtol=1e-7)
    shrunk, a = ledoit_wolf(f)
    want = np.trace(np.linalg.solve(shrunk, (1 - a) * np.cov(means.T, bias=True)))
    np.testing.assert_allclose(regularised_h_score(f, y), want, rtol=1e-9)


def test_h_score_of_one_hot_features_is_classes_minus_one():
    y = np.arange(20) % 4
    np.testing.assert_allclose(h_score(np.eye(4)[y], y), 3, rtol=1e-10)


def test_transrate_follows_its_determinants(data):
    f, y = data
    z = f - f.mean(0)

    def rate(rows):
        return np.linalg.slogdet(np.eye(z.shape[1]) + rows.T @ rows / (len(rows) * 1e-4))[1] / 2

    want = rate(z) - np.mean([rate(z[y == label]) for label in range(y.max() + 1)])
    np.testing.assert_allclose(transrate(f, y), want, rtol=1e-10)


@pytest.mark.parametrize("covariance", ["diagonal", "spherical"])
def test_gbc_is_the_overlap_of_gaussians(data, covariance):
    f, y = data
    want = 0.0
    for i in range(y.max() + 1):
        for j in range(y.max() + 1):
            if i == j:
                continue
            pair = []
            for label in (i, j):
                v = np.maximum(f[y == label].var(0), 1e-4)
                pair.append(
                    (
                        f[y == label].mean(0),
                        np.diag(np.full_like(v, v.mean()) if covariance == "spherical" else v),
                    )
                )
            (m1, s1), (m2, s2) = pair
            s = (s1 + s2) / 2
            logs = [np.linalg.slogdet(each)[1] for each in (s, s1, s2)]
            want += np.exp(
                -(m1 - m2) @ np.linalg.solve(s, m1 - m2) / 8 - (logs[0] - (logs[1] + logs[2]) / 2) / 2
            )
    np.testing.assert_allclose(gbc(f, y, covariance=covariance), -want, rtol=1e-9)


def test_gbc_of_known_gaussians_is_the_integral_of_the_root_of_their_product():
    rng = np.random.default_rng(0)
    x, y = np.append(rng.normal(0, 1, 4000), rng.normal(2, 0.5, 4000)), np.repeat([0, 1], 4000)
    grid = np.linspace(-10, 12, 20001)
    product = scipy.stats.norm.pdf(grid) * scipy.stats.norm.pdf(grid, 2, 0.5)
    overlap = np.trapezoid(np.sqrt(product), grid)
    assert gbc(x[:, None], y) == pytest.approx(-2 * overlap, rel=0.03)


def test_sfda_is_shrunk_discriminant_analysis_fitted_twice(data):
    f, y = data
    before = f.copy()

    def log_p(x):
        within = sum(np.cov(x[y == label].T, bias=True) * np.mean(y == label) for label in range(y.max() + 1))
        shrinkage = max(np.exp(-5 * np.linalg.eigvalsh(within)[-1]), 1e-10)
        # Two classes: scikit-learn then has one discriminant, with the same probabilities.
        fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x, y)
        return fitted.predict_log_proba(x)

    own = np.exp(log_p(f))[np.arange(len(y)), y][:, None]
    means = np.stack([f[y == label].mean(0) for label in range(y.max() + 1)])
    others = np.stack([np.delete(means, label, 0).mean(0) for label in y])
    want = log_p(own * f + (1 - own) * others)[np.arange(len(y)), y]
    np.testing.assert_allclose(sfda(f, y), want.mean(), rtol=1e-5)
    np.testing.assert_allclose(sfda(f, y, reference_compatible=True), np.exp(want).mean(), rtol=1e-5)
    np.testing.assert_array_equal(f, before)


def test_parc_is_spearmans_correlation_over_pairs(data):
    f, y = data
    reduced = PCA(min(5, f.shape[1])).fit_transform(f)
    farthest = np.take_along_axis(reduced, np.abs(reduced).argmax(0)[None], 0)
    reduced = np.sign(farthest) * reduced / reduced.std(0)
    upper = np.triu_indices(len(y), 1)
    of_labels = np.round(1 - np.corrcoef(np.eye(y.max() + 1)[y])[upper], 9)  # rounding errors would rank ties
    want = scipy.stats.spearmanr(1 - np.corrcoef(reduced)[upper], of_labels)[0]
    np.testing.assert_allclose(parc(f, y, dimensions=5), 100 * want, rtol=1e-9)


def test_an_image_at_the_mean_has_no_correlation_and_is_named():
    f = np.concatenate([np.zeros((1, 4)), np.eye(4), -np.eye(4)])
    with pytest.raises(
        UserError, match=r"image 0 has the same value along all 4 components \(1 of 9 images\)"
    ):
        parc(f, np.arange(9) % 2)


def test_parc_ranks_ties_as_scipy_does():
    f, y = np.random.default_rng(0).normal(size=(5, 4))[np.arange(30) % 5], np.arange(30) % 3
    reduced = PCA(4).fit_transform(f)
    farthest = np.take_along_axis(reduced, np.abs(reduced).argmax(0)[None], 0)
    distances = np.round(1 - np.corrcoef(np.sign(farthest) * reduced / reduced.std(0)), 9)[
        np.triu_indices(30, 1)
    ]
    assert len(np.unique(distances)) < 12
    want = scipy.stats.spearmanr(distances, (y[:, None] != y)[np.triu_indices(30, 1)])[0]
    np.testing.assert_allclose(parc(f, y), 100 * want, rtol=1e-9)


@pytest.mark.parametrize("k", [1, 5])
def test_knn_is_scikit_learns_leave_one_out(data, k):
    f, y = data
    right = [
        KNeighborsClassifier(k).fit(np.delete(f, i, 0), np.delete(y, i)).predict(f[i : i + 1])[0] == y[i]
        for i in range(len(y))
    ]
    assert knn(f, y, k=k) == pytest.approx(np.mean(right))


def test_the_linear_probe_is_ridge_regression_on_the_other_folds(data):
    f, y = data
    shuffled = np.random.default_rng(0).permutation(len(y))
    by_class = shuffled[np.argsort(y[shuffled], kind="stable")]
    fold = np.empty(len(y), int)
    fold[by_class] = np.arange(len(y)) % 5
    right = 0
    for held in range(5):
        train, test = fold != held, fold == held
        penalty = 1e-2 * train.sum() * f.var(0).mean()
        fitted = Ridge(alpha=penalty).fit(f[train], np.eye(y.max() + 1)[y[train]])
        right += np.sum(fitted.predict(f[test]).argmax(1) == y[test])
    assert linear_probe(f, y) == pytest.approx(right / len(y))
    assert linear_probe(f, np.random.default_rng(5).permutation(y)) < 0.8


@pytest.mark.parametrize(("rows", "dimensions", "components"), [(200, 30, 12), (300, 4, 5)])
def test_a_mixture_of_thin_components_is_that_of_scikit_learn(rows, dimensions, components):
    rng = np.random.default_rng(0)
    x = (
        rng.normal(size=(rows, dimensions))
        + rng.normal(size=(components, dimensions))[rng.integers(components, size=rows)]
    )
    expected = GaussianMixture(components, random_state=0).fit(x).predict_proba(x)
    np.testing.assert_allclose(responsibilities(x, components), expected, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("dimensions", [1, 6, 40])
def test_a_mixture_of_copies_is_that_of_scikit_learn(dimensions):
    """Eight different rows, ten components: two hold nothing."""
    x = np.random.default_rng(0).normal(size=(8, dimensions)).repeat(6, axis=0)
    expected = GaussianMixture(10, random_state=0).fit(x).predict_proba(x)
    np.testing.assert_allclose(responsibilities(x, 10), expected, atol=1e-9)


def test_nleep_is_leep_of_a_mixture_on_the_components_of_80_percent():
    f, y = clusters(n=120, d=6)
    reduced = PCA(0.8).fit_transform(f)
    reduced /= reduced[:, 0].std()
    mixture = GaussianMixture(15, random_state=0).fit(reduced)
    assert nleep(f, y) == pytest.approx(leep(mixture.predict_proba(reduced), y), rel=0.05)
    assert nleep(f, y) > nleep(f, np.random.default_rng(1).permutation(y))


# One shape, so that hypothesis does not compile anew for every example.
N, D, C = 40, 6, 4
ROTATION = scipy.stats.ortho_group.rvs(D, random_state=0)
SCALE_FREE = ("h_score", "regularised_h_score", "parc", "knn", "linear_probe")
CHEAP = [name for name in LABELLED if name != "nleep"]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(CHEAP))
def test_scores_do_not_depend_on_the_order_of_images_or_the_names_of_classes(seed, name):
    f, y = clusters(N, D, C, seed=seed)
    order = np.random.default_rng(seed).permutation(N)
    score = lambda f, y: evaluate([name], Sample(f, y))[name].value  # noqa: E731
    if name != "linear_probe":  # whose folds are drawn by row
        np.testing.assert_allclose(score(f[order], y[order]), score(f, y), rtol=1e-6)
    np.testing.assert_allclose(
        score(f, 7 * (C - 1 - y) if name != "linear_probe" else y + 5), score(f, y), rtol=1e-6
    )


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from([name for name in CHEAP if name != "gbc"]))
def test_scores_see_no_rotation(seed, name):
    """All but `gbc`, whose variances are along the axes."""
    f, y = clusters(N, D, C, seed=seed)
    score = lambda f: evaluate([name], Sample(f, y))[name].value  # noqa: E731
    np.testing.assert_allclose(score(f @ ROTATION), score(f), rtol=1e-5)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(SCALE_FREE), scale=st.sampled_from([1e-3, 7.0, 1e4]))
def test_these_scores_see_no_scale(seed, name, scale):
    f, y = clusters(N, D, C, seed=seed)
    score = lambda f: evaluate([name], Sample(f, y))[name].value  # noqa: E731
    np.testing.assert_allclose(score(f * scale), score(f), rtol=1e-5)


@pytest.mark.parametrize("name", LABELLED)
def test_every_score_prefers_classes_that_lie_apart(name):
    f, y = clusters(N, D, C, apart=4.0)
    mixed = np.random.default_rng(9).permutation(y)
    found, other = (evaluate([name], Sample(f, labels))[name] for labels in (y, mixed))
    assert not found.reason
    assert found.value > other.value


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("case", ["constant", "zero", "one_per_class", "collinear", "more_features", "huge"])
def test_degenerate_features_give_a_number_or_a_reason(name, case):
    f, y = clusters(N, D, C)
    samples = {
        "constant": (np.full((N, D), 3.0), y),
        "zero": (np.zeros((N, D)), y),
        "one_per_class": (f[:D], np.arange(D)),
        "collinear": (f[:, :1] @ np.ones((1, D)), y),
        "more_features": (np.tile(f, 3), y),
        "huge": (f * 1e8, y),
    }
    found = evaluate([name], Sample(*samples[case]))[name]
    assert np.isfinite(found.value) != bool(found.reason)
    if case in ("more_features", "huge"):
        assert not found.reason
    if found.reason:
        assert "expected" in found.reason


def test_bad_input_is_one_line_that_says_what_was_expected():
    f, y = clusters(N, D, C)
    broken = f.copy()
    broken[7, 2] = np.nan
    lines = {
        r"all 40 labels are one class; expected two classes or more": (f, np.zeros(N, int)),
        r"features of image 7 are not finite \(1 of 40 images\); expected numbers": (broken, y),
        r"labels are int64 of shape \(39,\); expected one class number, int, for each of 40 rows": (f, y[1:]),
        r"features have shape \(40,\); expected 2 axes": (f[:, 0], y),
    }
    for line, arguments in lines.items():
        with pytest.raises(UserError, match=line):
            FeatureStatistics.of(*arguments)
    with pytest.raises(UserError, match="expected 100 or more, found 40"):
        nleep(f, np.arange(N) % 20)
    with pytest.raises(UserError, match="source probabilities do not sum to 1 in every row"):
        leep(f, y)
    with pytest.raises(UserError, match="40 neighbours asked of 40 images; expected 1 to 39"):
        knn(f, y, k=40)
    for folds in (0, 1):
        with pytest.raises(UserError, match=f"{folds} folds asked; expected 2 or more"):
            linear_probe(f, y, folds=folds)
    with pytest.raises(UserError, match="did you mean 'logme'"):
        evaluate(["logmee"], Sample(f, y))
    found = evaluate(["logme", "leep", "robustness", "ccfv"], Sample(broken, y))
    assert [outcome.reason.split(" ")[0] for outcome in found.values()] == [
        "features",
        "needs",
        "needs",
        "needs",
    ]
