"""Segmentation losses: targets of pixels, totals of a batch, and the predicted mask."""

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
    """A loss over pixel logits; a subclass defines the loss of an image and is registered by its definition.

    With one output, a sigmoid separates one class from the background. With `multi_label`, each output passes
    a sigmoid and stands for one class (one bit of the mask). Otherwise the outputs, background first, pass
    one softmax.

    Attributes:
        outputs: Number of logits per pixel.
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
    def compares_images(self) -> bool:
        """Whether the loss of a batch is not the sum of the losses of its images."""
        return False

    @property
    def sigmoid(self) -> bool:
        """Whether each logit passes a sigmoid."""
        return self.multi_label or self.outputs == 1

    def label_shape(self, batch: int, image_size: int) -> jax.ShapeDtypeStruct:
        """Return shape and dtype of a batch of masks."""
        return jax.ShapeDtypeStruct((batch, image_size, image_size), jnp.uint8)

    def targets(self, masks: UInt8[Array, "b h w"]) -> Float[Array, "b h w outputs"]:
        """Return the target of each output, 0 or 1."""
        if self.multi_label:
            bits = masks[..., None] >> jnp.arange(self.outputs, dtype=jnp.uint8)
            return (bits & 1).astype(jnp.float32)
        if self.outputs == 1:
            return (masks > 0).astype(jnp.float32)[..., None]
        return jax.nn.one_hot(masks, self.outputs)

    def __call__(
        self, logits: Float[Array, "b h w outputs"], masks: UInt8[Array, "b h w"]
    ) -> Float[Array, " b"]:
        """Return the loss of each image separately."""
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
        """Return the class of highest probability; with sigmoids, all classes with at least one half."""
        if not self.sigmoid:
            return probabilities.argmax(-1).astype(jnp.uint8)
        bits = (probabilities >= 0.5).astype(jnp.uint8) << jnp.arange(self.outputs, dtype=jnp.uint8)
        return bits.sum(-1, dtype=jnp.uint8)


@dataclasses.dataclass(frozen=True)
class PixelCrossEntropy(SegmentationLoss, name="ce"):
    """Cross-entropy, mean over pixels and over independent outputs."""

    def __call__(
        self, logits: Float[Array, "b h w outputs"], masks: UInt8[Array, "b h w"]
    ) -> Float[Array, " b"]:
        """Return the loss of each image."""
        return pixel_cross_entropy(logits, self.targets(masks), self.sigmoid)


def pixel_cross_entropy(
    logits: Float[Array, "b h w outputs"], targets: Float[Array, "b h w outputs"], sigmoid: bool
) -> Float[Array, " b"]:
    """Return the cross-entropy of each image: mean over pixels and over independent outputs."""
    if sigmoid:
        each = -targets * jax.nn.log_sigmoid(logits) - (1 - targets) * jax.nn.log_sigmoid(-logits)
        return each.mean((1, 2, 3))
    return -jnp.sum(targets * jax.nn.log_softmax(logits), -1).mean((1, 2))


def make_segmentation(
    name: str, params: Mapping[str, Any] | None = None, *, classes: Sequence[str], multi_label: bool = False
) -> SegmentationLoss:
    """Return the loss for the classes of masks; background and one class use one sigmoid output.

    Args:
        name: Key of `SEGMENTATION_LOSSES`.
        params: Parameters of any segmentation loss; those that this loss lacks must have their default
            values.
        classes: Names of the classes, the background first.
        multi_label: Whether masks are bit fields, bit k for `classes[k + 1]`.

    Raises:
        UserError: The loss or a parameter does not exist, or a value is outside its range.
    """
    check_name(SEGMENTATION_LOSSES, name)
    outputs = len(classes) - 1 if multi_label or len(classes) == 2 else len(classes)
    own = of_loss(SEGMENTATION_LOSSES, name, params or {})
    return SEGMENTATION_LOSSES[name](outputs, multi_label and outputs > 1, **own)
