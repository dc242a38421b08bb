"""Distillation of a frozen teacher of any architecture."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from dapt_jax.fields import check_fields, setting
from dapt_jax.models import resize
from dapt_jax.models.classifier import pool
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.objectives.base import AsMap, HeadParameters, Objective, cosine, dense, dense_parameters


@dataclasses.dataclass(frozen=True)
class DistilSettings:
    """The teacher: the section `adapt.distil`.

    Attributes:
        teacher: Weights of the teacher, in the form of the setting `weights`.
        model: Architecture of the teacher; empty for that of the study.
        image_size: Side in pixels of the teacher's images, resized from the student's; 0 for the student's.
        local: Weight of the local term; 0 for the global term alone.
    """

    teacher: str = setting("", doc="Weights of the teacher, named as the setting weights names them.")
    model: str = setting("", doc="Architecture of the teacher; empty: that of the study.")
    image_size: int = setting(
        0, at_least=0, doc="Side in pixels of the teacher's images; 0: that of the student's."
    )
    local: float = setting(
        0.0, at_least=0, doc="Weight of the loss over the teacher's map; 0: global loss alone."
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Distil(Objective):
    """Cosine distance between linear maps of the student's features and the teacher's.

    The global term compares pooled features: 1 - cos. The local term compares, at every position of the
    teacher's grid, to which the student's map is resampled, .9 (1 - cos) + .1 smooth L1 (the mixture of
    AM-RADIO, arXiv 2312.06709).
    With it the teacher reads its map as well.
    """

    name: ClassVar[str] = "distil"

    options: DistilSettings = DistilSettings()

    def head(self, encoder: Encoder) -> HeadParameters:
        """Return a dense layer from the student's to the teacher's features for each term."""
        assert self.teacher is not None
        width = self.teacher.encoder.features
        found = dense_parameters("pooled", encoder.features, width)
        return found | (dense_parameters("map", encoder.features, width) if self.options.local else {})

    def outputs(
        self, head: Tree, x: Float[Array, "b ..."], as_map: AsMap
    ) -> dict[str, Float[Array, "b ..."]]:
        """Return predictions of the teacher's pooled features, and at the student's positions of its map."""
        found = {"pooled": dense(head["pooled"], pool(x))}
        return found | ({"map": dense(head["map"], as_map(x))} if self.options.local else {})

    def losses(
        self,
        outputs: dict[str, Float[Array, "b ..."]],
        targets: dict[str, Float[Array, "b ..."]],
        weights: Float[Array, " b"],
    ) -> Float[Array, " b"]:
        """Return the loss of each image: the global term, and the weighted local term."""
        loss = 1 - cosine(outputs["pooled"], targets["pooled"])
        if not self.options.local:
            return loss
        target = targets["map"].astype(jnp.float32)
        # A dense layer and bilinear resampling commute; the smaller of both grids is the cheaper one.
        found = resize.bilinear(outputs["map"], (target.shape[1], target.shape[2]))
        local = 0.9 * (1 - cosine(found, target)) + 0.1 * _smooth_l1(found - target).mean(-1)
        return loss + self.options.local * local.mean((1, 2))


def _smooth_l1(x: Float[Array, "..."]) -> Float[Array, "..."]:
    size = jnp.abs(x)
    return jnp.where(size < 1, 0.5 * x * x, size - 0.5)
