"""NCE: negative conditional entropy of target labels given source labels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from dapt_jax.transferability.inputs import in_double
from dapt_jax.transferability.leep import checked_probabilities
from dapt_jax.transferability.registry import score


@score("nce", needs="source head", higher_is_better=True, title="NCE")
@in_double
def nce(probabilities: Num[Any, "n z"], labels: Int[Any, " n"]) -> float:
    """Return the negative conditional entropy of target given source labels (higher is better).

    Source labels are the most likely ones; the score is at most 0:

    sum_{y,z} P(y, z) log[P(y, z) / P(z)]. Tran et al., "Transferability and Hardness of Supervised
    Classification Tasks", arXiv 1908.08142.

    Args:
        probabilities: Probabilities of the source classes.
        labels: Target class numbers.

    Raises:
        UserError: Rows that are not probabilities, or labels that are no classes (see
            `FeatureStatistics.of`).
    """
    found = checked_probabilities(probabilities, labels)
    joint = np.zeros((len(found.counts), found.features.shape[1]))
    np.add.at(joint, (found.labels, found.features.argmax(1)), 1 / len(found.labels))
    return float(_nce(joint))


@jax.jit
def _nce(joint: Float[Array, "c z"]) -> Float[Array, ""]:
    return jnp.sum(jax.scipy.special.xlogy(joint, joint)) - jnp.sum(
        jax.scipy.special.xlogy(joint.sum(0), joint.sum(0))
    )
