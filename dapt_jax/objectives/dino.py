"""Self-distillation: the network learns what its own moving average says of another view (DINO)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dapt_jax.fields import check_fields, setting
from dapt_jax.models.classifier import pool
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.objectives.base import AsMap, HeadParameters, SelfDistillation, dense, dense_parameters, unit
from dapt_jax.ops import gelu
from dapt_jax.parameters import Kind

STUDENT_TEMPERATURE = 0.1
CENTRE_MOMENTUM = 0.9
LAYERS = ("dense1", "dense2", "dense3")
"""Layers of the head below its prototypes, which stay as they are in the first epoch."""

Pair = tuple[Float[Array, "b k"], Float[Array, "b k"]]
"""Values of the first and of the second view."""


@dataclasses.dataclass(frozen=True)
class DinoSettings:
    """Head and teacher: the section `adapt.dino`.

    Attributes:
        out_dim: Number of prototypes, the outputs of the head; 65,536 as published.
        hidden_dim: Channels between the dense layers of the head.
        bottleneck_dim: Channels that are compared with the prototypes.
        teacher_temp: Temperature of the teacher's softmax.
        warmup_teacher_temp: That of the first epoch of the run, from which it goes linearly to `teacher_temp`.
        warmup_teacher_temp_epochs: Epochs on the way, both ends included; 0 for `teacher_temp` throughout.
        momentum_teacher: Momentum of the moving average in the first step; it rises to 1 along a cosine.
    """

    out_dim: int = setting(4096, at_least=2, doc="Prototypes, the outputs of the head; published: 65536.")
    hidden_dim: int = setting(2048, at_least=1, doc="Channels between the dense layers of the head.")
    bottleneck_dim: int = setting(256, at_least=1, doc="Channels that are compared with the prototypes.")
    teacher_temp: float = setting(
        0.04, above=0, doc="Temperature of the teacher; a lower one is against uniform outputs."
    )
    warmup_teacher_temp: float = setting(0.04, above=0, doc="Temperature of the teacher in the first epoch.")
    warmup_teacher_temp_epochs: int = setting(
        0,
        at_least=0,
        doc="Epochs from warmup_teacher_temp to teacher_temp, linearly; 0: teacher_temp at once.",
    )
    momentum_teacher: float = setting(
        0.996, at_least=0, below=1, doc="Momentum of the teacher at the start; it rises to 1 along a cosine."
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Dino(SelfDistillation):
    """Cross-entropy between the teacher's and the student's distribution over prototypes (DINO, arXiv 2104.14294).

    Teacher and student see both views, and each is compared with the other view. Local crops are not drawn.
    The centre, the moving mean of the teacher's outputs, is kept between steps.
    """

    name: ClassVar[str] = "dino"
    risk: ClassVar[str] = (
        "is the riskiest choice: its head starts at random and its targets move with the network, so that small "
        "corpora may make features worse, or collapse to one; watch RankMe, and put strategy 'none' and objective "
        "'reconstruct' or 'distil', whose targets are fixed, beside it"
    )
    is_paired: ClassVar[bool] = True
    first_head_layers: ClassVar[tuple[str, ...]] = LAYERS

    options: DinoSettings = DinoSettings()

    def head(self, encoder: Encoder) -> HeadParameters:
        """Return three dense layers, and the prototypes without a bias."""
        hidden, last = self.options.hidden_dim, self.options.bottleneck_dim
        widths = (encoder.features, hidden, hidden, last)
        found = HeadParameters()
        for name, inputs, outputs in zip(LAYERS, widths[:-1], widths[1:], strict=True):
            found |= dense_parameters(name, inputs, outputs)
        return found | {"prototypes/kernel": ((last, self.options.out_dim), Kind.DENSE_KERNEL)}

    def outputs(self, head: Tree, x: Float[Array, "b2 ..."], as_map: AsMap) -> Pair:
        """Return cosines with the prototypes, from the concatenated batch of both views.

        Bottleneck and prototypes are scaled to length 1, the published weight norm with a fixed scale.
        """
        x = pool(x)
        for name in LAYERS:
            x = dense(head[name], x)
            x = gelu(x) if name != LAYERS[-1] else x
        first, second = jnp.split(unit(x) @ unit(head["prototypes"]["kernel"].T).T, 2)
        return first, second

    def label_shape(self, batch: int, side: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Return the abstract distributions of the teacher for both views of a batch."""
        of_view = jax.ShapeDtypeStruct((batch, self.options.out_dim), jnp.float32)
        return of_view, of_view

    def temperature(self, epoch: Int[Array, ""]) -> Float[Array, ""]:
        """Return the temperature of the teacher in an epoch of the run."""
        first, last, epochs = (
            self.options.warmup_teacher_temp,
            self.options.teacher_temp,
            self.options.warmup_teacher_temp_epochs,
        )
        if not epochs:
            return jnp.float32(last)
        return first + (last - first) * jnp.clip(epoch / max(epochs - 1, 1), 0, 1)

    def init_state(self) -> dict[str, np.ndarray]:
        """Return a centre of zeros."""
        return {"centre": np.zeros(self.options.out_dim, np.float32)}

    def momentum(self, step: Int[Array, ""], total_steps: Int[Array, ""]) -> Float[Array, ""]:
        """Return the momentum of the teacher, which rises to 1 along a cosine."""
        left = (1 + jnp.cos(jnp.pi * step / total_steps)) / 2
        return 1 - (1 - self.options.momentum_teacher) * left

    def soft_targets(
        self, outputs: Pair, centre: Float[Array, " k"], temperature: Float[Array, ""] | float
    ) -> Pair:
        """Return the distributions of the teacher for both views: its outputs less the centre, sharpened."""
        first, second = (jax.nn.softmax((each - centre) / temperature) for each in outputs)
        return first, second

    def next_centre(
        self, centre: Float[Array, " k"], outputs: Pair, weights: Float[Array, " b"]
    ) -> Float[Array, " k"]:
        """Return the centre after a step: the moving mean of the teacher's outputs over images and views."""
        total = (weights[:, None] * (outputs[0] + outputs[1])).sum(0)
        mean = total / (2 * jnp.maximum(weights.sum(), 1e-9))
        return CENTRE_MOMENTUM * centre + (1 - CENTRE_MOMENTUM) * mean

    def targets(self, outputs: Pair, kept: dict[str, Array], epoch: Int[Array, ""] | None) -> Pair:
        """Return `soft_targets` at the temperature of an epoch, by default the last one."""
        temperature = self.options.teacher_temp if epoch is None else self.temperature(epoch)
        return self.soft_targets(outputs, kept["centre"], temperature)

    def next_state(
        self, kept: dict[str, Array], outputs: Pair, weights: Float[Array, " b"]
    ) -> dict[str, Array]:
        """Return the next centre."""
        return {"centre": self.next_centre(kept["centre"], outputs, weights)}

    def losses(self, outputs: Pair, targets: Pair, weights: Float[Array, " b"]) -> Float[Array, " b"]:
        """Return the cross-entropy of each image, the mean over both directions."""
        first, second = (jax.nn.log_softmax(each / STUDENT_TEMPERATURE) for each in outputs)
        return -((targets[0] * second).sum(-1) + (targets[1] * first).sum(-1)) / 2
