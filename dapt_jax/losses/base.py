"""Classification losses: targets, label smoothing, missing and uncertain labels, and probabilities."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from dapt_jax.errors import UserError
from dapt_jax.fields import check_fields, setting
from dapt_jax.losses.registry import check_name, of_loss, register

AUTO = "auto"
"""Stands for cross-entropy: `bce` where outputs are independent, else `ce`."""

LOSSES: dict[str, "type[ClassificationLoss]"] = {}
"""Losses of classes by their names in the settings."""

SMALLEST_BASE = 1e-7
"""Below it the base of a power is taken as this, so that the power's gradient stays finite."""


@dataclasses.dataclass(frozen=True)
class ClassificationLoss:
    """A loss over class logits, registered by its definition.

    With `multi_label`, or with one output for two classes, each logit passes a sigmoid and labels are 0 or 1.
    Labels that are missing (NaN) or uncertain (-1, unless `sample_targets` has replaced them) are ignored.
    Otherwise the logits pass one softmax and labels are class numbers.

    A subclass defines `sigmoid_loss`, `softmax_log_likelihood` or both; targets, smoothing, masks and weights
    are here:

        >>> @dataclasses.dataclass(frozen=True)
        ... class Brier(ClassificationLoss, name="brier"):
        ...     def sigmoid_loss(self, logits, targets):
        ...         return (jax.nn.sigmoid(logits) - targets) ** 2
        >>> make("brier", classes=2).outputs
        1
        >>> del LOSSES["brier"]

    Attributes:
        outputs: Number of logits.
        multi_label: Whether an image may have several labels, or none.
        uncertain: Bounds between which the target of a label of -1 is sampled; None without such labels.
        label_smoothing: Fraction of the target that is distributed evenly over the classes (Szegedy et al.,
            arXiv 1512.00567).
    """

    name: ClassVar[str] = ""
    compares_images: ClassVar[bool] = False
    """Whether the loss of a batch is not the sum of the losses of its images."""

    outputs: int
    multi_label: bool = False
    uncertain: tuple[float, float] | None = None
    label_smoothing: float = setting(
        0.0, at_least=0, below=1, doc="Share of the target that is spread evenly over the classes."
    )

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name
            register(LOSSES, cls, name)

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_labels()

    def check_labels(self) -> None:
        """Refuse labels that the loss does not support.

        Raises:
            UserError: The labels are not supported; names the losses that support them.
        """
        if self.is_independent and not self.of_sigmoids():
            raise UserError(
                f"loss {self.name!r} is of one softmax, but the outputs are independent; "
                f"expected {_names(loss for loss in LOSSES.values() if loss.of_sigmoids())}"
            )
        if not self.is_independent and not self.of_softmax():
            raise UserError(
                f"loss {self.name!r} is of independent outputs, but an image has one of {self.outputs} "
                "classes; "
                f"expected {_names(loss for loss in LOSSES.values() if loss.of_softmax())}"
            )

    @classmethod
    def of_softmax(cls) -> bool:
        """Return whether the loss supports one softmax output."""
        return cls.softmax_log_likelihood is not ClassificationLoss.softmax_log_likelihood

    @classmethod
    def of_sigmoids(cls) -> bool:
        """Return whether the loss supports independent outputs."""
        return cls.sigmoid_loss is not ClassificationLoss.sigmoid_loss

    @classmethod
    def outputs_of(cls, classes: int, multi_label: bool, single_logit: bool) -> int:
        """Return the number of logits for a number of classes."""
        is_one = classes == 2 and not multi_label and (single_logit or not cls.of_softmax())
        return 1 if is_one else classes

    @property
    def is_independent(self) -> bool:
        """Whether the outputs are independent: several labels, or one output for two classes."""
        return self.multi_label or self.outputs == 1

    @property
    def sigmoid(self) -> bool:
        """Whether each logit passes a sigmoid."""
        return self.is_independent

    def sigmoid_loss(
        self, logits: Float[Array, "b outputs"], targets: Float[Array, "b outputs"]
    ) -> Float[Array, "b outputs"]:
        """Return the loss of each sigmoid against its target, linear in the target.

        The loss of an example is their mean.

        Args:
            logits: Logits of a batch.
            targets: Smoothed target of each sigmoid, 0 to 1.
        """
        raise NotImplementedError

    def softmax_log_likelihood(self, logits: Float[Array, "b outputs"]) -> Float[Array, "b outputs"]:
        """Return the (modified) log-probability of each class.

        The loss is minus its mean under the target.

        Args:
            logits: Logits of a batch.
        """
        raise NotImplementedError

    def targets(self, labels: Num[Array, "b ..."]) -> Num[Array, "b ..."]:
        """Return the unsmoothed target of each output: 0 or 1; NaN or below 0 for sigmoids if unknown."""
        return labels if self.sigmoid else jax.nn.one_hot(labels, self.outputs)

    def __call__(self, logits: Float[Array, "b outputs"], labels: Num[Array, "b ..."]) -> Float[Array, " b"]:
        """Return the loss of each example, in nats."""
        targets = self.targets(labels)
        if not self.sigmoid:
            smooth = targets * (1 - self.label_smoothing) + self.label_smoothing / self.outputs
            return -jnp.sum(smooth * self.softmax_log_likelihood(logits), -1)
        targets = targets.astype(jnp.float32).reshape(logits.shape)
        known = targets >= 0
        hard = jnp.where(known, targets, 0.0)
        smooth = hard * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
        return jnp.sum(self.sigmoid_loss(logits, smooth) * known, -1) / jnp.maximum(known.sum(-1), 1)

    def total(
        self, logits: Float[Array, "b outputs"], labels: Num[Array, "b ..."], weights: Float[Array, " b"]
    ) -> Float[Array, ""]:
        """Return the weighted sum of the losses of a batch."""
        return jnp.sum(self(logits, labels) * weights)

    def sample_targets(
        self, labels: Num[Array, "b outputs"], keys: Key[Array, " b"]
    ) -> Float[Array, "b outputs"]:
        """Return the labels with every -1 replaced by a target sampled between the bounds of `uncertain`.

        Args:
            labels: Labels with values 0, 1, NaN and -1.
            keys: Random key of each example.
        """
        assert self.uncertain is not None
        low, high = self.uncertain
        draw = jax.vmap(lambda key: jax.random.uniform(key, labels.shape[1:], minval=low, maxval=high))
        return jnp.where(labels == -1, draw(keys), labels)

    def label_shape(self, batch: int, image_size: int) -> jax.ShapeDtypeStruct:
        """Return shape and dtype of a batch of labels; independent of the image size."""
        del image_size
        if self.multi_label:
            return jax.ShapeDtypeStruct((batch, self.outputs), jnp.float32)
        return jax.ShapeDtypeStruct((batch,), jnp.int32)

    def probabilities(self, logits: Float[Array, "b outputs"]) -> Float[Array, "b classes"]:
        """Return the probability of each class; two columns where one logit separates two classes."""
        if self.multi_label:
            return jax.nn.sigmoid(logits)
        if self.outputs == 1:
            positive = jax.nn.sigmoid(logits)
            return jnp.concatenate([1 - positive, positive], -1)
        return jax.nn.softmax(logits)


def power(base: Float[Array, "..."], exponent: float) -> Float[Array, "..."]:
    """Return a power whose gradient stays finite at a base of 0."""
    return jnp.maximum(base, SMALLEST_BASE) ** exponent if exponent else jnp.ones_like(base)


def make(
    name: str = AUTO,
    params: Mapping[str, Any] | None = None,
    *,
    classes: int,
    multi_label: bool = False,
    single_logit: bool = False,
    smoothing: float = 0.0,
    uncertain: tuple[float, float] | None = None,
) -> ClassificationLoss:
    """Return a loss for a number of classes; both determine the number of logits.

    Args:
        name: Key of `LOSSES`, or "auto".
        params: Parameters of any loss; those that this loss lacks must have their default values.
        classes: Number of classes.
        multi_label: Whether an image may have several labels, or none.
        single_logit: Whether two classes use one sigmoid output; implied by losses of independent outputs.
        smoothing: Label smoothing, where `params` does not contain it.
        uncertain: Bounds between which the targets of uncertain labels are sampled.

    Raises:
        UserError: The loss or a parameter does not exist, a value is outside its range, or the loss does not
            support the classes.
    """
    check_name(LOSSES, name, (AUTO,))
    if name == AUTO:
        name = "bce" if multi_label or (single_logit and classes == 2) or classes == 1 else "ce"
    loss = LOSSES[name]
    outputs = loss.outputs_of(classes, multi_label, single_logit)
    own = of_loss(LOSSES, name, {"label_smoothing": smoothing, **(params or {})})
    return loss(outputs, multi_label, uncertain, **own)


def _names(losses: "Iterable[type[ClassificationLoss]]") -> str:
    """Return the names of some losses, as the end of an error line."""
    *others, last = sorted(repr(loss.name) for loss in losses)
    return f"{', '.join(others)} or {last}" if others else last
