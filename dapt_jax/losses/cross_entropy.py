"""Cross-entropy of one softmax and of independent sigmoids."""

import dataclasses

import jax
from jaxtyping import Array, Float

from dapt_jax.losses.base import ClassificationLoss


@dataclasses.dataclass(frozen=True)
class CrossEntropy(ClassificationLoss, name="ce"):
    """Cross-entropy of the softmax: -log p of the true class."""

    def softmax_log_likelihood(self, logits: Float[Array, "b outputs"]) -> Float[Array, "b outputs"]:
        """See `ClassificationLoss`."""
        return jax.nn.log_softmax(logits)


@dataclasses.dataclass(frozen=True)
class BinaryCrossEntropy(ClassificationLoss, name="bce"):
    """Cross-entropy of each sigmoid, mean over the known labels."""

    def sigmoid_loss(
        self, logits: Float[Array, "b outputs"], targets: Float[Array, "b outputs"]
    ) -> Float[Array, "b outputs"]:
        """See `ClassificationLoss`."""
        return -targets * jax.nn.log_sigmoid(logits) - (1 - targets) * jax.nn.log_sigmoid(-logits)
