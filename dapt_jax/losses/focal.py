"""The focal loss of a softmax or of sigmoids."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dapt_jax.fields import SettingError, setting
from dapt_jax.losses.base import ClassificationLoss, power


@dataclasses.dataclass(frozen=True)
class FocalLoss(ClassificationLoss, name="focal"):
    """Cross-entropy times (1 - p)^gamma, p the probability of the true class (Lin et al., arXiv 1708.02002).

    Attributes:
        gamma: Focusing power; 0 gives the cross-entropy.
        alpha: Weight of positive targets of sigmoids; 0 for equal weights.
    """

    gamma: float = setting(
        2.0, at_least=0, doc="Power by which examples that are classified well count less."
    )
    alpha: float = setting(
        0.0,
        at_least=0,
        below=1,
        doc="Share of the weight that positive targets of sigmoids have; 0: all alike.",
    )

    def check_labels(self) -> None:
        """Refuse labels that the loss does not support, and a weight of positive targets where there are none.

        Raises:
            SettingError: `alpha` is set, but the outputs pass one softmax, where it has no meaning.
        """
        super().check_labels()
        if self.alpha and not self.is_independent:
            expected = f"0.0, since an image has one of {self.outputs} classes, whose softmax has no positive targets"
            raise SettingError("alpha", self.alpha, expected)

    def softmax_log_likelihood(self, logits: Float[Array, "b outputs"]) -> Float[Array, "b outputs"]:
        """See `ClassificationLoss`."""
        log_p = jax.nn.log_softmax(logits)
        return log_p * power(-jnp.expm1(log_p), self.gamma)

    def sigmoid_loss(
        self, logits: Float[Array, "b outputs"], targets: Float[Array, "b outputs"]
    ) -> Float[Array, "b outputs"]:
        """See `ClassificationLoss`."""
        p = jax.nn.sigmoid(logits)
        of_positive, of_negative = (self.alpha, 1 - self.alpha) if self.alpha else (1.0, 1.0)
        positive = -jax.nn.log_sigmoid(logits) * power(1 - p, self.gamma) * of_positive
        negative = -jax.nn.log_sigmoid(-logits) * power(p, self.gamma) * of_negative
        return targets * positive + (1 - targets) * negative
