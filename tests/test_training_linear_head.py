"""Linear heads equal a solution in float64; the strength is chosen without the rows that are scored."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dapt_jax.data.splits import grouped_folds
from dapt_jax.losses import make
from dapt_jax.training import linear_head

RNG = np.random.default_rng(5)
ROWS, INPUTS = 90, 140
LABELS = RNG.integers(3, size=ROWS).astype(np.int32)
MIXED = (
    RNG.normal(size=(ROWS, INPUTS))
    @ np.diag(np.geomspace(30, 0.01, INPUTS))
    @ RNG.normal(size=(INPUTS, INPUTS))
)
FEATURES = (MIXED + 20 * LABELS[:, None] * RNG.normal(size=INPUTS)).astype(np.float32)
FEATURES[:, 3] = 5.0
FEATURES[:, 4] = np.arange(ROWS) >= 60  # constant in the first split
SPLITS = [np.arange(0, 60), np.arange(30, 90)]
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)


def inner_folds(labels=LABELS):
    return [
        [(rows[fit], rows[held]) for fit, held in grouped_folds(labels[rows], rows.astype(str), 3, 0)]
        for rows in SPLITS
    ]


def in_double(objective, labels, rows, strength):
    """The same objective by scipy in float64, with losses written again: the oracle."""
    x = FEATURES[rows].astype(np.float64)
    varies = x.std(0) > 1e-6 * np.abs(FEATURES).max()
    mean, scale = x.mean(0), np.where(varies, 1 / np.maximum(x.std(0), 1e-12), 0)
    x, y, d = (
        (x - mean) * scale,
        np.asarray(objective.targets(jnp.asarray(labels[rows])), np.float64),
        varies.sum(),
    )
    known = ~np.isnan(y)
    y = np.where(known, y, 0)

    def loss(flat):
        w, b = flat[: -objective.outputs].reshape(objective.outputs, -1), flat[-objective.outputs :]
        z = x @ w.T + b
        if objective.sigmoid:
            share = known / np.maximum(known.sum(1, keepdims=True), 1) * objective.outputs / len(rows)
            value = (share * (np.logaddexp(0, z) - y * z)).sum()
            residual = share * (1 / (1 + np.exp(-z)) - y)
        else:
            top = z - z.max(1, keepdims=True)
            logs = top - np.log(np.exp(top).sum(1, keepdims=True))
            value, residual = -(y * logs).sum() / len(rows), (np.exp(logs) - y) / len(rows)
        gradient = residual.T @ x + strength * d * w
        return value + strength * d * (w**2).sum() / 2, np.concatenate([gradient.ravel(), residual.sum(0)])

    start = np.zeros(objective.outputs * (x.shape[1] + 1))
    found = scipy.optimize.minimize(
        loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "gtol": 1e-9, "ftol": 0}
    ).x
    kernel = found[: -objective.outputs].reshape(objective.outputs, -1)
    logits = ((FEATURES - mean) * scale) @ kernel.T + found[-objective.outputs :]
    return np.asarray(objective.probabilities(jnp.asarray(logits, jnp.float32)))


def several_labels():
    labels = (RNG.random((ROWS, 3)) < 0.4).astype(np.float32)
    labels[::7, 1] = np.nan
    return labels


@pytest.mark.parametrize("strength", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("name", ["ce", "bce", "ordinal"])
def test_heads_are_those_of_a_solution_in_float64(name, strength):
    objective = make(name, classes=3, multi_label=name == "bce")
    labels = several_labels() if name == "bce" else LABELS
    heads = linear_head.fit(FEATURES, labels, SPLITS, [], objective, [strength])
    assert not heads.not_converged()
    found = heads.probabilities(FEATURES)
    for place, rows in enumerate(SPLITS):
        np.testing.assert_allclose(found[place], in_double(objective, labels, rows, strength), atol=2e-4)


def test_the_strength_is_that_of_a_grid_search_over_the_same_inner_folds():
    heads = linear_head.fit(FEATURES, LABELS, SPLITS, inner_folds(), make("ce", classes=3), STRENGTHS)
    for place, (rows, inner) in enumerate(zip(SPLITS, inner_folds(), strict=True)):
        x = FEATURES[rows][:, FEATURES[rows].std(0) > 1e-6]
        at = {row: number for number, row in enumerate(rows)}
        parts = [([at[row] for row in fit], [at[row] for row in held]) for fit, held in inner]
        grid = {
            "logisticregression__C": [
                1 / (len(inner[0][0]) * x.shape[1] * strength) for strength in STRENGTHS
            ]
        }
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        search = GridSearchCV(model, grid, cv=parts, scoring="neg_log_loss").fit(x, LABELS[rows])
        assert heads.strengths[place] == np.float32(STRENGTHS[search.best_index_])


def test_rows_outside_a_split_change_nothing_in_its_head():
    objective, inner = make("ce", classes=3), inner_folds()
    before = linear_head.fit(FEATURES, LABELS, SPLITS, inner, objective, STRENGTHS)
    changed, labels = FEATURES.copy(), LABELS.copy()
    changed[60:] = RNG.normal(size=(30, INPUTS))
    labels[60:] = 2 - labels[60:]
    after = linear_head.fit(changed, labels, SPLITS, inner, objective, STRENGTHS)
    assert before.strengths[0] == after.strengths[0]
    np.testing.assert_allclose(
        before.probabilities(FEATURES[:60])[0], after.probabilities(FEATURES[:60])[0], atol=1e-5
    )


def test_a_class_that_an_inner_fold_lacks_does_not_choose_the_strength():
    labels = LABELS.copy()
    labels[:] = np.where(labels == 2, 0, labels)
    labels[[1, 31]] = 2
    heads = linear_head.fit(FEATURES, labels, SPLITS, inner_folds(labels), make("ce", classes=3), STRENGTHS)
    assert np.isfinite(heads.probabilities(FEATURES)).all()
    assert not heads.not_converged()


def test_a_head_that_has_not_converged_is_reported(monkeypatch):
    monkeypatch.setattr(linear_head, "FINAL_ITERATIONS", 4)
    linear_head._fit.clear_cache()
    heads = linear_head.fit(FEATURES, LABELS, SPLITS, [], make("ce", classes=3), [1e-5])
    linear_head._fit.clear_cache()
    assert "the head of fold 1, 2 has not converged in 4 iterations" in heads.not_converged()


def test_features_without_information_give_the_shares_of_the_classes():
    heads = linear_head.fit(
        np.ones((ROWS, 4), np.float32), LABELS, SPLITS, inner_folds(), make("ce", classes=3), STRENGTHS
    )
    shares = np.bincount(LABELS[SPLITS[0]], minlength=3) / 60
    np.testing.assert_allclose(heads.probabilities(np.zeros((1, 4), np.float32))[0, 0], shares, atol=1e-4)


def test_flops_are_two_products_an_iteration():
    objective = make("ce", classes=3)
    product = 2 * ROWS * INPUTS * 3
    found = linear_head.count_flops(ROWS, INPUTS, objective, 2, 3, 4)
    iterations = 2 * 3 * 4 * linear_head.SEARCH_ITERATIONS + 2 * linear_head.FINAL_ITERATIONS
    assert 2 * product * iterations < found < 4 * product * iterations
