"""NLEEP: LEEP with a Gaussian mixture in place of a source classifier."""

from typing import Any

import numpy as np
from jaxtyping import Int, Num

from dapt_jax.errors import UserError
from dapt_jax.transferability.inputs import FeatureStatistics
from dapt_jax.transferability.leep import leep
from dapt_jax.transferability.mixture import responsibilities
from dapt_jax.transferability.registry import score


@score("nleep", needs="labels", higher_is_better=True, title="NLEEP")
def nleep(
    features: Num[Any, "n d"],
    labels: Int[Any, " n"],
    *,
    statistics: FeatureStatistics | None = None,
    per_class: int = 5,
    variance: float = 0.8,
    covariance: str = "full",
    seed: int = 0,
) -> float:
    """Return LEEP with the components of a Gaussian mixture as source classes, at most 0 (higher is better).

    The mixture is fitted to the principal components that hold 80% of the variance. Li et al., "Ranking
    Neural Checkpoints", arXiv 2011.11200.

    Args:
        features: Features of n images.
        labels: Class numbers.
        statistics: Statistics of the same features and labels, where they have been computed.
        per_class: Number of components of the mixture for each class.
        variance: Share of the variance that is kept.
        covariance: Kind of covariance of a component: `full`, `diag`, `tied` or `spherical` (scikit-learn's
            words).
        seed: Seed of the k-means that the mixture starts from.

    Raises:
        UserError: Fewer images than components, constant features, or what `FeatureStatistics.of` refuses.
    """
    found = statistics or FeatureStatistics.of(features, labels)
    rows, components = len(found.labels), per_class * len(found.counts)
    if rows < components:
        raise UserError(
            f"a mixture of {components} components ({per_class} for each of {len(found.counts)} classes) "
            "needs as many "
            f"images; expected {components} or more, found {rows}"
        )
    if not found.spread:
        raise UserError(f"the features of all {rows} images are the same; expected some variance")
    values = found.spectrum[0][::-1]
    kept = int(np.searchsorted(np.cumsum(values) / values.sum(), variance) + 1)
    reduced = found.projected(kept)
    scale = np.sqrt(
        values[0] / rows
    )  # EM's floor on variances is absolute; without this it depends on the unit
    rows_of = np.asarray(reduced / scale, np.float64)
    if covariance == "full":
        return leep(responsibilities(rows_of, components, seed), found.labels)
    from sklearn.mixture import GaussianMixture  # a second to import, which settings do not need

    mixture = GaussianMixture(components, covariance_type=covariance, random_state=seed, max_iter=100)
    return leep(mixture.fit(rows_of).predict_proba(rows_of), found.labels)
