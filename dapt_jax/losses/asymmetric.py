"""The asymmetric loss for multi-label classification."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dapt_jax.fields import setting
from dapt_jax.losses.base import ClassificationLoss, power


@dataclasses.dataclass(frozen=True)
class AsymmetricLoss(ClassificationLoss, name="asymmetric"):
    """Binary cross-entropy with separate focusing powers for positive and negative targets.

    Ridnik et al., arXiv 2009.14119.

    Attributes:
        gamma_positive: Power for positive targets.
        gamma_negative: Power for negative targets.
        margin: Amount subtracted from the probability of negative targets, clipped at 0.
    """

    gamma_positive: float = setting(0.0, at_least=0, doc="Power for positive targets.")
    gamma_negative: float = setting(4.0, at_least=0, doc="Power for negative targets.")
    margin: float = setting(
        0.05,
        at_least=0,
        below=1,
        doc="By how much the probability of negative targets is lowered, at least to 0.",
    )

    def sigmoid_loss(
        self, logits: Float[Array, "b outputs"], targets: Float[Array, "b outputs"]
    ) -> Float[Array, "b outputs"]:
        """See `ClassificationLoss`."""
        p = jax.nn.sigmoid(logits)
        shifted = jnp.maximum(p - self.margin, 0.0)
        positive = -jax.nn.log_sigmoid(logits) * power(1 - p, self.gamma_positive)
        # Without a margin, log(1 - p) is computed from the logit, where it cannot overflow.
        log_not = jnp.log1p(-shifted) if self.margin else jax.nn.log_sigmoid(-logits)
        return targets * positive - (1 - targets) * log_not * power(shifted, self.gamma_negative)
