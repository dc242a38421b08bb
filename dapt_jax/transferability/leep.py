"""LEEP: how well a source classifier's probabilities predict target labels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from dapt_jax.errors import UserError
from dapt_jax.transferability.inputs import FeatureStatistics, finite, in_double
from dapt_jax.transferability.registry import score


@score("leep", needs="source head", higher_is_better=True, title="LEEP")
@in_double
def leep(probabilities: Num[Any, "n z"], labels: Int[Any, " n"]) -> float:
    """Return the log expected empirical prediction, at most 0 (higher is better).

    mean_i log sum_z P(y_i|z) theta(x_i)_z with P(y, z) = (1/n) sum_{i: y_i = y} theta(x_i)_z. Nguyen et al.,
    "LEEP: A New Measure to Evaluate Transferability of Learned Representations", arXiv 2002.12462.

    Args:
        probabilities: Probabilities theta of the source classes, each row summing to 1.
        labels: Target class numbers.

    Raises:
        UserError: Rows that are not probabilities, or labels that are no classes (see
            `FeatureStatistics.of`).
    """
    found = checked_probabilities(probabilities, labels)
    return float(_leep(found.features, jax.nn.one_hot(found.labels, len(found.counts), dtype=jnp.float64)))


@jax.jit
def _leep(theta: Float[Array, "n z"], onehot: Num[Array, "n c"]) -> Float[Array, ""]:
    joint = onehot.T @ theta / len(theta)
    seen = joint.sum(0)
    conditional = joint / jnp.where(seen > 0, seen, 1.0)
    return jnp.mean(jnp.log(jnp.sum((onehot @ conditional) * theta, 1)))


def checked_probabilities(
    probabilities: Num[Any, "n z"],
    labels: Int[Any, " n"],
) -> FeatureStatistics:
    """Return a source classifier's probabilities with target labels, checked.

    Raises:
        UserError: A row does not sum to 1, or what `FeatureStatistics.of` refuses.
    """
    found = FeatureStatistics.of(finite(probabilities, 2, "source probabilities"), labels)
    if found.features.min() < 0 or np.abs(found.features.sum(1) - 1).max() > 1e-3:
        raise UserError(
            "source probabilities do not sum to 1 in every row; expected a softmax over the source classes"
        )
    return found
