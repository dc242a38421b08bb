"""Losses of classes: what a run minimises, per example, and how logits become probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from dapt_jax.errors import UserError, nearest

AUTO, CE, BCE, FOCAL, ASYMMETRIC, ORDINAL = LOSSES = ("auto", "ce", "bce", "focal", "asymmetric", "ordinal")
TINY = 1e-7


@dataclasses.dataclass(frozen=True)
class Objective:
    """A classification loss over logits.

    With `multi_label`, or with one output for two classes, each logit has a sigmoid and labels are 0/1 (left out of the
    loss: NaN, which is missing, and -1, which is uncertain until `drawn` says otherwise). With `loss="ordinal"`, logit k
    has a sigmoid that says whether the class number is above k. Else the logits have one softmax and labels are class
    numbers.

    Attributes:
        outputs: number of logits.
        multi_label: whether an image may have several labels, or none.
        smoothing: label smoothing (Szegedy et al., arXiv 1512.00567).
        loss: `ce` (cross-entropy of the softmax); `bce` (cross-entropy of each sigmoid, mean over known labels); `auto`,
            whichever of the two there is; `focal` (Lin et al., arXiv 1708.02002), of softmax or sigmoids; `asymmetric`
            (Ridnik et al., arXiv 2009.14119), of sigmoids; `ordinal`, the cross-entropies of the sigmoids above (Niu et
            al., CVPR 2016; Cao et al., arXiv 1901.07884, who share the weights of the outputs).
        focal_gamma: power of the focal loss by which what is told well counts less.
        focal_alpha: share of the weight that positive targets of sigmoids have in the focal loss; 0 to weigh all alike.
        gamma_positive: power for positive targets in the asymmetric loss.
        gamma_negative: power for negative targets in the asymmetric loss.
        margin: by which the asymmetric loss lowers the probability of negative targets.
        uncertain: between which bounds the target is drawn for a label of -1; None where there is none.
    """

    outputs: int
    multi_label: bool = False
    smoothing: float = 0.0
    loss: str = AUTO
    focal_gamma: float = 2.0
    focal_alpha: float = 0.0
    gamma_positive: float = 0.0
    gamma_negative: float = 4.0
    margin: float = 0.05
    uncertain: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise UserError(f"label smoothing is {self.smoothing}; expected 0 to less than 1")
        if self.loss not in LOSSES:
            raise UserError(f"unknown loss {self.loss!r}; {nearest(self.loss, LOSSES)}")
        for name in ("focal_gamma", "gamma_positive", "gamma_negative"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("focal_alpha", "margin"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 0 to less than 1")
        independent = self.multi_label or self.outputs == 1
        if self.loss == ORDINAL and self.multi_label:
            raise UserError("loss 'ordinal' is of classes in an order, but an image has several labels; expected 'bce'")
        if self.loss == CE and independent:
            raise UserError("loss 'ce' is of one softmax, but the outputs are independent; expected 'bce'")
        if self.loss in (BCE, ASYMMETRIC) and not independent:
            raise UserError(
                f"loss {self.loss!r} is of independent outputs, but an image has one of {self.outputs} classes; "
                "expected 'ce' or 'focal'"
            )

    @property
    def sigmoid(self) -> bool:
        """Whether logits are independent."""
        return self.multi_label or self.outputs == 1 or self.loss == ORDINAL

    def __call__(self, logits: Float[Array, "b outputs"], labels: Num[Array, "b ..."]) -> Float[Array, " b"]:
        """Loss of each example, in nats."""
        if self.loss == ORDINAL:
            labels = labels.reshape(-1, 1) > jnp.arange(self.outputs)
        if self.sigmoid:
            targets = labels.astype(jnp.float32).reshape(logits.shape)
            known = targets >= 0
            hard = jnp.where(known, targets, 0.0)
            soft = hard * (1 - self.smoothing) + 0.5 * self.smoothing
            each = self._of_sigmoids(logits, soft)
            return jnp.sum(each * known, -1) / jnp.maximum(known.sum(-1), 1)
        targets = jax.nn.one_hot(labels, self.outputs)
        soft = targets * (1 - self.smoothing) + self.smoothing / self.outputs
        log_p = jax.nn.log_softmax(logits)
        if self.loss == FOCAL:
            log_p = log_p * _power(-jnp.expm1(log_p), self.focal_gamma)
        return -jnp.sum(soft * log_p, -1)

    def _of_sigmoids(
        self, logits: Float[Array, "b outputs"], targets: Float[Array, "b outputs"]
    ) -> Float[Array, "b outputs"]:
        """Loss of each logit, linear in its target."""
        if self.loss == ASYMMETRIC:
            p = jax.nn.sigmoid(logits)
            shifted = jnp.maximum(p - self.margin, 0.0)
            positive = -jax.nn.log_sigmoid(logits) * _power(1 - p, self.gamma_positive)
            # Without a margin the logarithm of 1 - p has to come from the logit, where it cannot overflow.
            log_not = jnp.log1p(-shifted) if self.margin else jax.nn.log_sigmoid(-logits)
            return targets * positive - (1 - targets) * log_not * _power(shifted, self.gamma_negative)
        if self.loss == FOCAL:
            p = jax.nn.sigmoid(logits)
            of_positive, of_negative = (self.focal_alpha, 1 - self.focal_alpha) if self.focal_alpha else (1.0, 1.0)
            positive = -jax.nn.log_sigmoid(logits) * _power(1 - p, self.focal_gamma) * of_positive
            negative = -jax.nn.log_sigmoid(-logits) * _power(p, self.focal_gamma) * of_negative
            return targets * positive + (1 - targets) * negative
        return -targets * jax.nn.log_sigmoid(logits) - (1 - targets) * jax.nn.log_sigmoid(-logits)

    def total(
        self, logits: Float[Array, "b outputs"], labels: Num[Array, "b ..."], weights: Float[Array, " b"]
    ) -> Float[Array, ""]:
        """Sum of the losses of a batch, weighted."""
        return jnp.sum(self(logits, labels) * weights)

    def drawn(self, labels: Num[Array, "b outputs"], keys: Key[Array, " b"]) -> Float[Array, "b outputs"]:
        """Labels with a target drawn between `uncertain` in place of every -1, one key per example."""
        assert self.uncertain is not None
        low, high = self.uncertain
        draw = jax.vmap(lambda key: jax.random.uniform(key, labels.shape[1:], minval=low, maxval=high))
        return jnp.where(labels == -1, draw(keys), labels)

    def label_shape(self, batch: int, image_size: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch of labels; the images' size does not matter."""
        del image_size
        if self.multi_label:
            return jax.ShapeDtypeStruct((batch, self.outputs), jnp.float32)
        return jax.ShapeDtypeStruct((batch,), jnp.int32)

    def probabilities(self, logits: Float[Array, "b outputs"]) -> Float[Array, "b classes"]:
        """Probability per class; two columns where one logit tells two classes apart.

        Of grades, the differences of neighbouring sigmoids, each of these taken no higher than the one before it.
        """
        if self.loss == ORDINAL:
            above = jax.lax.cummin(jax.nn.sigmoid(logits), axis=1)
            edges = jnp.pad(above, ((0, 0), (1, 0)), constant_values=1.0), jnp.pad(above, ((0, 0), (0, 1)))
            return edges[0] - edges[1]
        if self.outputs == 1 and not self.multi_label:
            positive = jax.nn.sigmoid(logits)
            return jnp.concatenate([1 - positive, positive], -1)
        return jax.nn.sigmoid(logits) if self.multi_label else jax.nn.softmax(logits)


def _power(base: Float[Array, "..."], power: float) -> Float[Array, "..."]:
    """A power whose gradient stays finite at a base of 0."""
    return jnp.maximum(base, TINY) ** power if power else jnp.ones_like(base)


def of_classes(
    classes: int, *, multi_label: bool = False, single_logit: bool = False, loss: str = AUTO, **settings: object
) -> Objective:
    """The loss for a number of classes: how many logits there are follows from it.

    Args:
        classes: how many there are.
        multi_label: whether an image may have several, or none.
        single_logit: whether two classes have one sigmoid; `loss="bce"` and `loss="asymmetric"` imply it.
        loss: see `Objective`, as are other settings.
        **settings: "

    Raises:
        UserError: the loss does not go with the classes.
    """
    outputs = classes
    if loss == ORDINAL and not multi_label:
        outputs = classes - 1
    elif classes == 2 and not multi_label and (single_logit or loss in (BCE, ASYMMETRIC)):
        outputs = 1
    return Objective(outputs, multi_label, loss=loss, **settings)  # type: ignore[arg-type]
