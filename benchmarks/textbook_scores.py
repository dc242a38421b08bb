"""The label-based scores as their authors' code computes them, in plain numpy, scipy and scikit-learn: what to be faster than.

Written from the formulas and the algorithms of the released code (which decomposition, which loop), for
timing alone.
"""

from collections.abc import Callable

import numpy as np
import scipy.linalg
import scipy.stats
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeClassifier
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier


def leep(theta: np.ndarray, y: np.ndarray) -> float:
    """One pass per class."""
    joint = np.stack([theta[y == c].sum(0) for c in range(y.max() + 1)]) / len(y)
    predicted = theta @ (joint / joint.sum(0)).T
    return float(np.mean(np.log(predicted[np.arange(len(y)), y])))


def nce(theta: np.ndarray, y: np.ndarray) -> float:
    """A loop over pairs of classes that occur."""
    z, total = theta.argmax(1), 0.0
    for source in np.unique(z):
        inside = y[z == source]
        for target in np.unique(inside):
            joint = np.mean((z == source) & (y == target))
            total += joint * np.log(joint * len(y) / len(inside))
    return float(total)


def nleep(f: np.ndarray, y: np.ndarray) -> float:
    """PCA to 80%, a full mixture of five components a class."""
    reduced = PCA(0.8).fit_transform(f)
    mixture = GaussianMixture(5 * (y.max() + 1), random_state=0).fit(reduced / reduced[:, 0].std())
    return leep(mixture.predict_proba(reduced / reduced[:, 0].std()), y)


def logme(f: np.ndarray, y: np.ndarray) -> float:
    """The decomposition of F'F by SVD, then a fixed point per class."""
    n, d = f.shape
    _, s, vh = np.linalg.svd(f.T @ f)
    left = f @ vh.T / np.sqrt(s)
    found = []
    for c in range(y.max() + 1):
        target = (y == c).astype(float)
        parts = (left.T @ target) ** 2
        rest, a, b = target @ target - parts.sum(), 1.0, 1.0
        for _ in range(11):
            ratio = a / b
            gamma = (s / (s + ratio)).sum()
            m2, r2 = (s * parts / (s + ratio) ** 2).sum(), (parts / (1 + s / ratio) ** 2).sum() + rest
            a, b = gamma / (m2 + 1e-5), (n - gamma) / (r2 + 1e-5)
            if abs(a / b - ratio) / ratio <= 1e-3:
                break
        logs = d * np.log(a) + n * np.log(b) - np.log(a + b * s).sum() - n * np.log(2 * np.pi)
        found.append((logs - b * r2 - a * m2) / 2 / n)
    return float(np.mean(found))


def _class_means(f: np.ndarray, y: np.ndarray) -> np.ndarray:
    means = np.zeros_like(f)
    for c in range(y.max() + 1):
        means[y == c] = f[y == c].mean(0)
    return means


def h_score(f: np.ndarray, y: np.ndarray) -> float:
    """A pseudo-inverse and two covariances."""
    between = np.cov(_class_means(f, y).T, bias=True)
    return float(np.trace(np.linalg.pinv(np.cov(f.T, bias=True), rcond=1e-15) @ between))


def regularised_h_score(f: np.ndarray, y: np.ndarray) -> float:
    """The same with scikit-learn's Ledoit-Wolf covariance."""
    from sklearn.covariance import ledoit_wolf

    covariance, shrinkage = ledoit_wolf(f)
    between = np.cov(_class_means(f, y).T, bias=True)
    return float(np.trace(np.linalg.pinv(covariance) @ ((1 - shrinkage) * between)))


def transrate(f: np.ndarray, y: np.ndarray) -> float:
    """A determinant of D x D per class."""
    z = f - f.mean(0)

    def rate(rows: np.ndarray) -> float:
        return np.linalg.slogdet(np.eye(z.shape[1]) + rows.T @ rows / (len(rows) * 1e-4))[1] / 2

    return float(rate(z) - np.mean([rate(z[y == c]) for c in range(y.max() + 1)]))


def gbc(f: np.ndarray, y: np.ndarray) -> float:
    """A loop over pairs of classes."""
    classes = range(y.max() + 1)
    means = [f[y == c].mean(0) for c in classes]
    variances = [np.maximum(f[y == c].var(0), 1e-4) for c in classes]
    total = 0.0
    for i in classes:
        for j in classes:
            if i != j:
                middle = (variances[i] + variances[j]) / 2
                apart = np.sum((means[i] - means[j]) ** 2 / middle) / 8
                unlike = np.sum(np.log(middle) - (np.log(variances[i]) + np.log(variances[j])) / 2) / 2
                total += np.exp(-apart - unlike)
    return float(-total)


def sfda(f: np.ndarray, y: np.ndarray) -> float:
    """Two generalised eigenproblems."""
    classes, x = y.max() + 1, f.copy()
    log_p = np.zeros((len(y), classes))
    for step in range(2):
        means = np.stack([x[y == c].mean(0) for c in range(classes)])
        shares = np.bincount(y) / len(y)
        within = sum(share * np.cov(x[y == c].T, bias=True) for c, share in enumerate(shares))
        shrinkage = max(np.exp(-5 * np.linalg.norm(within, 2)), 1e-10)
        level = np.trace(within) / len(within)
        within = (1 - shrinkage) * within + shrinkage * level * np.eye(len(within))
        _, vectors = scipy.linalg.eigh(np.cov(x.T, bias=True) - within, within)
        coefficients = means @ vectors @ vectors.T
        scores = x @ coefficients.T - 0.5 * np.diag(means @ coefficients.T) + np.log(shares)
        log_p = scores - scipy.special.logsumexp(scores, 1, keepdims=True)
        own = np.exp(log_p)[np.arange(len(y)), y][:, None]
        if step == 0:
            others = (means.sum(0) - means) / (classes - 1)
            x = own * x + (1 - own) * others[y]
    return float(log_p[np.arange(len(y)), y].mean())


def parc(f: np.ndarray, y: np.ndarray) -> float:
    """Both matrices of correlations, and ranks of all pairs."""
    reduced = PCA(32, svd_solver="full").fit_transform(f)
    reduced = reduced / reduced.std(0)
    upper = np.triu_indices(len(y), 1)
    of_features = (1 - np.corrcoef(reduced))[upper]
    of_labels = (1 - np.corrcoef(np.eye(y.max() + 1, dtype=np.float32)[y]))[upper].round(6)
    return float(100 * scipy.stats.spearmanr(of_features, of_labels)[0])


def knn(f: np.ndarray, y: np.ndarray) -> float:
    """The nearest neighbour that is not the image itself, by scikit-learn."""
    near = KNeighborsClassifier(1, algorithm="brute").fit(f, y).kneighbors(f, 2, return_distance=False)
    return float(np.mean(y[near[:, 1]] == y))


def linear_probe(f: np.ndarray, y: np.ndarray) -> float:
    """Five folds of scikit-learn's ridge classifier."""
    penalty = 1e-2 * 0.8 * len(y) * f.var(0).mean()
    return float(np.mean(cross_val_score(RidgeClassifier(penalty), f, y, cv=StratifiedKFold(5))))


SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    function.__name__: function
    for function in (
        leep, nce, nleep, logme, h_score, regularised_h_score, transrate, gbc, sfda, parc, knn, linear_probe
    )
}  # fmt: skip
