"""Overlap losses for masks: soft Dice, with and without cross-entropy, and Tversky."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from dapt_jax.fields import setting
from dapt_jax.losses.segmentation import SegmentationLoss, pixel_cross_entropy


@dataclasses.dataclass(frozen=True)
class Dice(SegmentationLoss, name="dice"):
    """1 minus soft Dice, mean over the classes without the background.

    Milletari et al., arXiv 1606.04797, with sums instead of squares in the denominator.

    Attributes:
        batchwise: Whether the overlap is computed over a batch instead of per image.
        smoothing_constant: Constant added to numerator and denominator, so that a class that is neither in
            the mask nor predicted has no loss.
    """

    with_cross_entropy: ClassVar[bool] = False

    batchwise: bool = setting(
        False, doc="Whether the pixels of a batch are taken together, not image by image."
    )
    smoothing_constant: float = setting(1.0, above=0, doc="Added to twice the overlap, above and below.")

    @property
    def compares_images(self) -> bool:
        """Whether the loss of a batch is not the sum of the losses of its images: where it is `batchwise`."""
        return self.batchwise

    @property
    def share_of_false_positives(self) -> float:
        """Weight of false positives; the weight of false negatives is its complement. Dice: one half."""
        return 0.5

    def __call__(
        self, logits: Float[Array, "b h w outputs"], masks: UInt8[Array, "b h w"]
    ) -> Float[Array, " b"]:
        """Return the loss of each image separately."""
        targets = self.targets(masks)
        loss = jnp.zeros(len(logits))
        if self.with_cross_entropy:
            loss += pixel_cross_entropy(logits, targets, self.sigmoid)
        return loss + self.overlap(logits, targets, (1, 2))

    def total(
        self, logits: Float[Array, "b h w outputs"], masks: UInt8[Array, "b h w"], weights: Float[Array, " b"]
    ) -> Float[Array, ""]:
        """Return the loss of a batch, times the sum of the weights of its images."""
        if not self.batchwise:
            return super().total(logits, masks, weights)
        targets = self.targets(masks)
        overlap = self.overlap(logits, targets, (0, 1, 2), weights[:, None, None, None])
        if self.with_cross_entropy:
            entropy = pixel_cross_entropy(logits, targets, self.sigmoid)
            return overlap * weights.sum() + jnp.sum(entropy * weights)
        return overlap * weights.sum()

    def overlap(
        self, logits: Array, targets: Array, axes: tuple[int, ...], weights: Array | float = 1.0
    ) -> Float[Array, "..."]:
        """Return 1 minus the Dice or Tversky index, sums taken over `axes`, mean over classes."""
        predicted = self.probabilities(logits)
        if not self.sigmoid:
            predicted, targets = predicted[..., 1:], targets[..., 1:]
        both = jnp.sum(weights * predicted * targets, axes)
        over, under = jnp.sum(weights * predicted, axes) - both, jnp.sum(weights * targets, axes) - both
        share, constant = self.share_of_false_positives, self.smoothing_constant
        index = (2 * both + constant) / (2 * (both + share * over + (1 - share) * under) + constant)
        return jnp.mean(1 - index, -1)


@dataclasses.dataclass(frozen=True)
class DiceCrossEntropy(Dice, name="dice_ce"):
    """The sum of soft Dice and cross-entropy."""

    with_cross_entropy = True


@dataclasses.dataclass(frozen=True)
class Tversky(Dice, name="tversky"):
    """1 minus the Tversky index (Salehi et al., arXiv 1706.05721), mean over the foreground classes.

    Attributes:
        false_positives: Weight of false positives; the weight of false negatives is its complement.
    """

    false_positives: float = setting(
        0.3,
        at_least=0,
        at_most=1,
        doc="Weight of false positives; that of false negatives is what is left to 1.",
    )

    @property
    def share_of_false_positives(self) -> float:
        """Weight of false positives in the index."""
        return self.false_positives
