"""Losses of masks, per image or over a batch, and the mask that logits say."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from dapt_jax.errors import UserError, nearest

LOSSES = ("dice", "ce", "dice_ce", "tversky")


@dataclasses.dataclass(frozen=True)
class MaskObjective:
    """A loss over the logits of pixels.

    With one output a sigmoid tells the one segment from the background; with `overlapping` each output has a sigmoid and
    stands for a segment, bit by bit of the mask; else the outputs, the background's first, have one softmax.

    Attributes:
        outputs: number of logits of a pixel.
        overlapping: see above.
        loss: `dice` (soft Dice: Milletari et al., arXiv 1606.04797, with sums instead of squares in the denominator),
            `ce` (cross-entropy, of sigmoids where there are), `dice_ce` (their sum) or `tversky` (Salehi et al., arXiv
            1706.05721). Dice and Tversky are means over the segments, the background left out.
        batchwise: whether Dice and Tversky take the pixels of a batch together instead of image by image.
        smooth: added to twice the overlap above and below, so that a segment that is nowhere and is not said to be costs
            nothing.
        false_positives: weight of them in the Tversky index; that of false negatives is what is left to 1.
    """

    outputs: int
    overlapping: bool = False
    loss: str = "dice_ce"
    batchwise: bool = False
    smooth: float = 1.0
    false_positives: float = 0.3

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"unknown loss {self.loss!r}; {nearest(self.loss, LOSSES)}")
        if not self.smooth > 0:
            raise UserError(f"smooth is {self.smooth}; expected more than 0")
        if not 0 <= self.false_positives <= 1:
            raise UserError(f"false_positives is {self.false_positives}; expected 0 to 1")

    @property
    def sigmoid(self) -> bool:
        """Whether logits are independent."""
        return self.overlapping or self.outputs == 1

    def label_shape(self, batch: int, image_size: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch of masks."""
        return jax.ShapeDtypeStruct((batch, image_size, image_size), jnp.uint8)

    def targets(self, masks: UInt8[Array, "b h w"]) -> Float[Array, "b h w outputs"]:
        """What each output should be, 0 or 1."""
        if self.overlapping:
            bits = masks[..., None] >> jnp.arange(self.outputs, dtype=jnp.uint8)
            return (bits & 1).astype(jnp.float32)
        if self.outputs == 1:
            return (masks > 0).astype(jnp.float32)[..., None]
        return jax.nn.one_hot(masks, self.outputs)

    def __call__(self, logits: Float[Array, "b h w outputs"], masks: UInt8[Array, "b h w"]) -> Float[Array, " b"]:
        """Loss of each image by itself."""
        targets = self.targets(masks)
        loss = jnp.zeros(len(logits))
        if self.loss in ("ce", "dice_ce"):
            loss += self._cross_entropy(logits, targets)
        if self.loss != "ce":
            loss += self._overlap(logits, targets, (1, 2))
        return loss

    def total(
        self, logits: Float[Array, "b h w outputs"], masks: UInt8[Array, "b h w"], weights: Float[Array, " b"]
    ) -> Float[Array, ""]:
        """Loss of a batch, times the sum of the weights of its images."""
        if not self.batchwise or self.loss == "ce":
            return jnp.sum(self(logits, masks) * weights)
        targets = self.targets(masks)
        overlap = self._overlap(logits, targets, (0, 1, 2), weights[:, None, None, None])
        if self.loss == "dice_ce":
            return overlap * weights.sum() + jnp.sum(self._cross_entropy(logits, targets) * weights)
        return overlap * weights.sum()

    def _cross_entropy(self, logits: Array, targets: Array) -> Float[Array, " b"]:
        """Mean over pixels, and over outputs that have a sigmoid each."""
        if self.sigmoid:
            each = -targets * jax.nn.log_sigmoid(logits) - (1 - targets) * jax.nn.log_sigmoid(-logits)
            return each.mean((1, 2, 3))
        return -jnp.sum(targets * jax.nn.log_softmax(logits), -1).mean((1, 2))

    def _overlap(
        self, logits: Array, targets: Array, axes: tuple[int, ...], weights: Array | float = 1.0
    ) -> Float[Array, "..."]:
        """1 minus the Dice or Tversky index, sums taken over `axes`, mean over segments."""
        said = self.probabilities(logits)
        if not self.sigmoid:
            said, targets = said[..., 1:], targets[..., 1:]
        both = jnp.sum(weights * said * targets, axes)
        over, under = jnp.sum(weights * said, axes) - both, jnp.sum(weights * targets, axes) - both
        share = self.false_positives if self.loss == "tversky" else 0.5
        index = (2 * both + self.smooth) / (2 * (both + share * over + (1 - share) * under) + self.smooth)
        return jnp.mean(1 - index, -1)

    def probabilities(self, logits: Float[Array, "b h w outputs"]) -> Float[Array, "b h w outputs"]:
        """Probability of each output."""
        return jax.nn.sigmoid(logits) if self.sigmoid else jax.nn.softmax(logits)

    def decide(self, probabilities: Float[Array, "b h w outputs"]) -> UInt8[Array, "b h w"]:
        """The mask of highest probability; of a sigmoid, where it is at least one half."""
        if not self.sigmoid:
            return probabilities.argmax(-1).astype(jnp.uint8)
        bits = (probabilities >= 0.5).astype(jnp.uint8) << jnp.arange(self.outputs, dtype=jnp.uint8)
        return bits.sum(-1, dtype=jnp.uint8)


def of_segments(segments: tuple[str, ...], *, overlapping: bool, **settings: object) -> MaskObjective:
    """The loss for segments, the background first; two of them make one sigmoid output."""
    outputs = len(segments) - 1 if overlapping or len(segments) == 2 else len(segments)
    return MaskObjective(outputs, overlapping and outputs > 1, **settings)  # type: ignore[arg-type]
