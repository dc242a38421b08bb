"""The loss of ordinal classes."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from dapt_jax.errors import UserError
from dapt_jax.losses.cross_entropy import BinaryCrossEntropy


@dataclasses.dataclass(frozen=True)
class OrdinalLoss(BinaryCrossEntropy, name="ordinal"):
    """Binary cross-entropy over the thresholds between ordinal classes.

    Logit k predicts whether the class number is above k (Niu et al., CVPR 2016; Cao et al., arXiv 1901.07884,
    who share the weights of the outputs).
    """

    def check_labels(self) -> None:
        """Refuse images with several labels.

        Raises:
            UserError: An image may have several labels.
        """
        if self.multi_label:
            raise UserError(
                "loss 'ordinal' is of classes in an order, but an image has several labels; expected 'bce'"
            )

    @classmethod
    def outputs_of(cls, classes: int, multi_label: bool, single_logit: bool) -> int:
        """Return the number of thresholds between the classes."""
        del multi_label, single_logit
        return classes - 1

    @classmethod
    def of_sigmoids(cls) -> bool:
        """Return whether the loss supports independent outputs: no, its outputs are thresholds."""
        return False

    @property
    def sigmoid(self) -> bool:
        """Whether each logit passes a sigmoid: always true."""
        return True

    def targets(self, labels: Num[Array, " b"]) -> Bool[Array, "b outputs"]:
        """Return whether each class number is above each threshold."""
        return labels.reshape(-1, 1) > jnp.arange(self.outputs)

    def probabilities(self, logits: Float[Array, "b outputs"]) -> Float[Array, "b classes"]:
        """Return the differences of neighbouring sigmoids, each clipped to at most the one before it."""
        above = jax.lax.cummin(jax.nn.sigmoid(logits), axis=1)
        edges = jnp.pad(above, ((0, 0), (1, 0)), constant_values=1.0), jnp.pad(above, ((0, 0), (0, 1)))
        return edges[0] - edges[1]
