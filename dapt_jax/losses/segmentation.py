"""Losses of masks: targets of pixels, totals of a batch, and the mask that logits decide on."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from dapt_jax.fields import check_fields
from dapt_jax.losses.registry import check_name, of_loss, register

SEGMENTATION_LOSSES: dict[str, "type[SegmentationLoss]"] = {}
"""Losses of masks by their names in the settings."""


@dataclasses.dataclass(frozen=True)
class SegmentationLoss:
    """A loss over the logits of pixels; a subclass says what an image costs, and is registered by being defined.

    With one output a sigmoid tells the one class from the background. With `multi_label` each output has a
    sigmoid and stands for a class, bit by bit of the mask. Else the outputs, the background's first, have one
    softmax.

    Attributes:
        outputs: Number of logits of a pixel.
        multi_label: Whether a pixel may have several classes.
    """

    name: ClassVar[str] = ""

    outputs: int
    multi_label: bool = False

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            register(SEGMENTATION_LOSSES, cls, name)

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def sigmoid(self) -> bool:
        """Whether each logit has a sigmoid."""
        return self.multi_label or self.outputs == 1

    def label_shape(self, batch: int, image_size: int) -> jax.ShapeDtypeStruct:
        """Return shape and dtype of a batch of masks."""
        return jax.ShapeDtypeStruct((batch, image_size, image_size), jnp.uint8)

    def targets(self, masks: UInt8[Array, "b h w"]) -> Float[Array, "b h w outputs"]:
        """Return what each output should be, 0 or 1."""
        if self.multi_label:
            bits = masks[..., None] >> jnp.arange(self.outputs, dtype=jnp.uint8)
            return (bits & 1).astype(jnp.float32)
        if self.outputs == 1:
            return (masks > 0).astype(jnp.float32)[..., None]
        return jax.nn.one_hot(masks, self.outputs)

    def __call__(
        self, logits: Float[Array, "b h w outputs"], masks: UInt8[Array, "b h w"]
    ) -> Float[Array, " b"]:
        """Return the loss of each image by itself."""
        raise NotImplementedError

    def total(
        self, logits: Float[Array, "b h w outputs"], masks: UInt8[Array, "b h w"], weights: Float[Array, " b"]
    ) -> Float[Array, ""]:
        """Return the loss of a batch, times the sum of the weights of its images."""
        return jnp.sum(self(logits, masks) * weights)

    def probabilities(self, logits: Float[Array, "b h w outputs"]) -> Float[Array, "b h w outputs"]:
        """Return the probability of each output."""
        return jax.nn.sigmoid(logits) if self.sigmoid else jax.nn.softmax(logits)

    def decide(self, probabilities: Float[Array, "b h w outputs"]) -> UInt8[Array, "b h w"]:
        """Return the mask of highest probability; of sigmoids, where it is at least one half."""
        if not self.sigmoid:
            return probabilities.argmax(-1).astype(jnp.uint8)
        bits = (probabilities >= 0.5).astype(jnp.uint8) << jnp.arange(self.outputs, dtype=jnp.uint8)
        return bits.sum(-1, dtype=jnp.uint8)


@dataclasses.dataclass(frozen=True)
class PixelCrossEntropy(SegmentationLoss, name="ce"):
    """Cross-entropy, mean over pixels, and over outputs that have a sigmoid each."""

    def __call__(
        self, logits: Float[Array, "b h w outputs"], masks: UInt8[Array, "b h w"]
    ) -> Float[Array, " b"]:
        """Return the loss of each image."""
        return pixel_cross_entropy(logits, self.targets(masks), self.sigmoid)


def pixel_cross_entropy(
    logits: Float[Array, "b h w outputs"], targets: Float[Array, "b h w outputs"], sigmoid: bool
) -> Float[Array, " b"]:
    """Return the cross-entropy of each image: mean over pixels, and over outputs that have a sigmoid each."""
    if sigmoid:
        each = -targets * jax.nn.log_sigmoid(logits) - (1 - targets) * jax.nn.log_sigmoid(-logits)
        return each.mean((1, 2, 3))
    return -jnp.sum(targets * jax.nn.log_softmax(logits), -1).mean((1, 2))


def make_segmentation(
    name: str, params: Mapping[str, Any] | None = None, *, classes: Sequence[str], multi_label: bool = False
) -> SegmentationLoss:
    """Return the loss of the classes of masks; the background and one other make one sigmoid output.

    Args:
        name: A name of `SEGMENTATION_LOSSES`.
        params: Values of parameters of any loss of masks, those that this one lacks at their defaults.
        classes: Names of the classes, the background first.
        multi_label: Whether masks are bit fields, bit k for `classes[k + 1]`.

    Raises:
        UserError: There is no such loss or parameter, or a value is outside its range.
    """
    check_name(SEGMENTATION_LOSSES, name)
    outputs = len(classes) - 1 if multi_label or len(classes) == 2 else len(classes)
    own = of_loss(SEGMENTATION_LOSSES, name, params or {})
    return SEGMENTATION_LOSSES[name](outputs, multi_label and outputs > 1, **own)
