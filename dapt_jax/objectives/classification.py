"""Losses of classes: what a run minimises, per example, and how logits become probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from dapt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Objective:
    """A classification loss over logits.

    With `multi_label`, or with one output for two classes, each logit has a sigmoid and labels are 0/1 (NaN: missing,
    left out of the loss); else the logits have one softmax and labels are class numbers.

    Attributes:
        outputs: number of logits.
        multi_label: whether an image may have several labels, or none.
        smoothing: label smoothing (Szegedy et al., arXiv 1512.00567).
    """

    outputs: int
    multi_label: bool = False
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise UserError(f"label smoothing is {self.smoothing}; expected 0 to less than 1")

    @property
    def sigmoid(self) -> bool:
        """Whether logits are independent."""
        return self.multi_label or self.outputs == 1

    def __call__(self, logits: Float[Array, "b outputs"], labels: Num[Array, "b ..."]) -> Float[Array, " b"]:
        """Loss of each example, in nats."""
        if self.sigmoid:
            targets = labels.astype(jnp.float32).reshape(logits.shape)
            known = ~jnp.isnan(targets)
            hard = jnp.where(known, targets, 0.0)
            soft = hard * (1 - self.smoothing) + 0.5 * self.smoothing
            each = -soft * jax.nn.log_sigmoid(logits) - (1 - soft) * jax.nn.log_sigmoid(-logits)
            return jnp.sum(each * known, -1) / jnp.maximum(known.sum(-1), 1)
        targets = jax.nn.one_hot(labels, self.outputs)
        soft = targets * (1 - self.smoothing) + self.smoothing / self.outputs
        return -jnp.sum(soft * jax.nn.log_softmax(logits), -1)

    def total(
        self, logits: Float[Array, "b outputs"], labels: Num[Array, "b ..."], weights: Float[Array, " b"]
    ) -> Float[Array, ""]:
        """Sum of the losses of a batch, weighted."""
        return jnp.sum(self(logits, labels) * weights)

    def label_shape(self, batch: int, image_size: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch of labels; the images' size does not matter."""
        del image_size
        if self.multi_label:
            return jax.ShapeDtypeStruct((batch, self.outputs), jnp.float32)
        return jax.ShapeDtypeStruct((batch,), jnp.int32)

    def probabilities(self, logits: Float[Array, "b outputs"]) -> Float[Array, "b classes"]:
        """Probability per class; two columns where one logit tells two classes apart."""
        if self.outputs == 1 and not self.multi_label:
            positive = jax.nn.sigmoid(logits)
            return jnp.concatenate([1 - positive, positive], -1)
        return jax.nn.sigmoid(logits) if self.multi_label else jax.nn.softmax(logits)
