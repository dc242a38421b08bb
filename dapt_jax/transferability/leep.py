"""Scores from what a source classifier says of target images: LEEP, NCE, and NLEEP, which needs no source classifier."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num
from sklearn.mixture import GaussianMixture

from dapt_jax.errors import UserError
from dapt_jax.transferability.inputs import Moments, finite, in_double
from dapt_jax.transferability.mixture import responsibilities


@in_double
def leep(probabilities: Num[Any, "n z"], labels: Int[Any, " n"]) -> float:
    """Log expected empirical prediction, at most 0 (higher is better).

    mean_i log sum_z P(y_i|z) theta(x_i)_z with P(y, z) = (1/n) sum_{i: y_i = y} theta(x_i)_z. Nguyen et al., "LEEP: A New
    Measure to Evaluate Transferability of Learned Representations", arXiv 2002.12462.

    Args:
        probabilities: theta, of the source classes, each row summing to 1.
        labels: target class numbers.

    Raises:
        UserError: rows that are not probabilities, or labels that are no classes (see `Moments.of`).
    """
    found = _probabilities(probabilities, labels)
    return float(_leep(found.features, jax.nn.one_hot(found.labels, len(found.counts), dtype=jnp.float64)))


@jax.jit
def _leep(theta: Any, onehot: Any) -> Float[Array, ""]:
    joint = onehot.T @ theta / len(theta)
    seen = joint.sum(0)
    conditional = joint / jnp.where(seen > 0, seen, 1.0)
    return jnp.mean(jnp.log(jnp.sum((onehot @ conditional) * theta, 1)))


@in_double
def nce(probabilities: Num[Any, "n z"], labels: Int[Any, " n"]) -> float:
    """Negative conditional entropy of the target label given the most likely source label, at most 0 (higher is better).

    sum_{y,z} P(y, z) log[P(y, z) / P(z)]. Tran et al., "Transferability and Hardness of Supervised Classification Tasks",
    arXiv 1908.08142.

    Args:
        probabilities: of the source classes.
        labels: target class numbers.

    Raises:
        UserError: rows that are not probabilities, or labels that are no classes (see `Moments.of`).
    """
    found = _probabilities(probabilities, labels)
    joint = np.zeros((len(found.counts), found.features.shape[1]))
    np.add.at(joint, (found.labels, found.features.argmax(1)), 1 / len(found.labels))
    return float(_nce(joint))


@jax.jit
def _nce(joint: Any) -> Float[Array, ""]:
    return jnp.sum(jax.scipy.special.xlogy(joint, joint)) - jnp.sum(jax.scipy.special.xlogy(joint.sum(0), joint.sum(0)))


def nleep(
    features: Num[Any, "n d"],
    labels: Int[Any, " n"],
    *,
    moments: Moments | None = None,
    per_class: int = 5,
    variance: float = 0.8,
    covariance: str = "full",
    seed: int = 0,
) -> float:
    """LEEP with the components of a Gaussian mixture as source classes, at most 0 (higher is better).

    The mixture is fitted to the principal components that hold 80% of the variance. Li et al., "Ranking Neural
    Checkpoints", arXiv 2011.11200.

    Args:
        features: of n images.
        labels: class numbers.
        moments: of the same, where they are there already.
        per_class: components of the mixture for each class.
        variance: share of the variance that is kept.
        covariance: of a component: `full`, `diag`, `tied` or `spherical` (scikit-learn's words).
        seed: of the k-means that the mixture starts from.

    Raises:
        UserError: fewer images than components, constant features, or what `Moments.of` refuses.
    """
    found = moments or Moments.of(features, labels)
    rows, components = len(found.labels), per_class * len(found.counts)
    if rows < components:
        raise UserError(
            f"a mixture of {components} components ({per_class} for each of {len(found.counts)} classes) needs as many "
            f"images; expected {components} or more, found {rows}"
        )
    if not found.spread:
        raise UserError(f"the features of all {rows} images are the same; expected some variance")
    values = found.spectrum[0][::-1]
    kept = int(np.searchsorted(np.cumsum(values) / values.sum(), variance) + 1)
    reduced = found.projected(kept)
    scale = np.sqrt(values[0] / rows)  # EM's floor on variances is absolute; without this it depends on the unit
    rows_of = np.asarray(reduced / scale, np.float64)
    if covariance == "full":
        return leep(responsibilities(rows_of, components, seed), found.labels)
    mixture = GaussianMixture(components, covariance_type=covariance, random_state=seed, max_iter=100)
    return leep(mixture.fit(rows_of).predict_proba(rows_of), found.labels)


def _probabilities(probabilities: Any, labels: Any) -> Moments:
    found = Moments.of(finite(probabilities, 2, "source probabilities"), labels)
    if found.features.min() < 0 or np.abs(found.features.sum(1) - 1).max() > 1e-3:
        raise UserError("source probabilities do not sum to 1 in every row; expected a softmax over the source classes")
    return found
