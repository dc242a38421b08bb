"""Agreement between two views of an image, or of a patient: SimCLR's and VICReg's losses."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dapt_jax.fields import check_fields, setting
from dapt_jax.models.classifier import pool
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.objectives.base import AsMap, HeadParameters, Objective, dense, dense_parameters, unit

LOSSES = ("nt_xent", "vicreg")
VICREG_WIDTHS = (512, 512, 512)
PROJECTED = 128
"""Dimensions of the embedding that NT-Xent compares."""
_NOT_THERE = -1e9


@dataclasses.dataclass(frozen=True)
class TwoViewsSettings:
    """Loss and positives: the section `adapt.two_views`.

    Attributes:
        loss: `nt_xent` (SimCLR, arXiv 2002.05709) or `vicreg` (arXiv 2105.04906).
        temperature: Temperature of NT-Xent.
        patient_positives: Whether the second view is of another image of the same patient where there is one
            (MICLe, arXiv 2101.05224).
    """

    loss: str = setting(
        "nt_xent", choices=LOSSES, doc="nt_xent (SimCLR), or vicreg, which needs no negatives."
    )
    temperature: float = setting(0.2, above=0, doc="Temperature of nt_xent.")
    patient_positives: bool = setting(
        False, doc="Whether the second view is of another image of the patient, where there is one."
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class TwoViews(Objective):
    """Loss between embeddings of two views, whose labels are the numbers of their patients.

    Images of the same patient, and look-alikes, are never negatives of each other, nor is padding.
    """

    name: ClassVar[str] = "two_views"
    is_paired: ClassVar[bool] = True
    compares_images: ClassVar[bool] = True

    options: TwoViewsSettings = TwoViewsSettings()

    @property
    def pairs_patients(self) -> bool:
        """Whether the second view of a pair is of another image of the patient, where there is one."""
        return self.options.patient_positives

    def _widths(self, features: int) -> tuple[int, ...]:
        return VICREG_WIDTHS if self.options.loss == "vicreg" else (features, PROJECTED)

    def head(self, encoder: Encoder) -> HeadParameters:
        """Return the dense layers of the projector, with ReLU between them."""
        found, inputs = HeadParameters(), encoder.features
        for number, outputs in enumerate(self._widths(inputs), start=1):
            found |= dense_parameters(f"dense{number}", inputs, outputs)
            inputs = outputs
        return found

    def outputs(
        self, head: Tree, x: Float[Array, "b2 ..."], as_map: AsMap
    ) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
        """Return the embeddings of the first and of the second view, from the concatenated batch of both."""
        x = pool(x)
        layers = len(head)
        for number in range(1, layers + 1):
            x = dense(head[f"dense{number}"], x)
            x = jax.nn.relu(x) if number < layers else x
        first, second = jnp.split(x, 2)
        return first, second

    def losses(
        self,
        outputs: tuple[Float[Array, "b d"], Float[Array, "b d"]],
        targets: Int[Array, " b"],
        weights: Float[Array, " b"],
    ) -> Float[Array, " b"]:
        """Return the loss of each pair; the terms of VICReg over the batch count the same for every pair."""
        if self.options.loss == "vicreg":
            return vicreg(*outputs, weights)
        return nt_xent(*outputs, targets, weights, self.options.temperature)


def nt_xent(
    first: Float[Array, "b d"],
    second: Float[Array, "b d"],
    groups: Int[Array, " b"],
    weights: Float[Array, " b"],
    temperature: float,
) -> Float[Array, " b"]:
    """Return the normalised temperature-scaled cross-entropy of each pair (SimCLR, arXiv 2002.05709, eq. 1).

    The mean over both directions. Negatives are the views of other groups in pairs of positive weight.

    Args:
        first: Embeddings of the first views.
        second: Embeddings of the second views.
        groups: Group of each pair.
        weights: Weight of each pair; those of padding are 0.
        temperature: Divisor of the cosine similarities.
    """
    z = unit(jnp.concatenate([first, second]))
    similarity = z @ z.T / temperature
    negative = (groups[:, None] != groups) & (weights > 0)
    negative = jnp.tile(negative, (2, 2))
    positive = (z * jnp.roll(z, len(first), 0)).sum(-1) / temperature
    others = jax.nn.logsumexp(jnp.where(negative, similarity, _NOT_THERE), axis=1)
    each = jnp.logaddexp(positive, others) - positive
    return each.reshape(2, -1).mean(0)


def vicreg(
    first: Float[Array, "b d"], second: Float[Array, "b d"], weights: Float[Array, " b"]
) -> Float[Array, " b"]:
    """Return VICReg's loss of each pair (arXiv 2105.04906, eq. 6; factors 25, 25 and 1).

    Args:
        first: Embeddings of the first views.
        second: Embeddings of the second views.
        weights: Weight of each pair; pairs of weight 0 count neither in variances nor in covariances.
    """
    real = (weights > 0).astype(jnp.float32)
    count = jnp.maximum(real.sum(), 1.0)
    invariance = ((first - second) ** 2).mean(-1)
    spread = covariance = jnp.float32(0)
    for z in (first, second):
        centred = (z - (z * real[:, None]).sum(0) / count) * real[:, None]
        matrix = centred.T @ centred / jnp.maximum(count - 1, 1.0)
        deviation = jnp.sqrt(jnp.diag(matrix) + 1e-4)
        spread += jax.nn.relu(1 - deviation).mean() / 2
        covariance += (jnp.sum(matrix**2) - jnp.sum(jnp.diag(matrix) ** 2)) / z.shape[1]
    return 25 * invariance + 25 * spread + covariance
