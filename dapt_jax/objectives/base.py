"""Label-free objectives: from activations at a boundary, and targets, to a loss.

What an objective needs that does not depend on what trains (the prefix, a frozen teacher's outputs) is
computed once per image and view, and cached: see `dapt_jax.training.targets`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from dapt_jax.data.augment import Augment
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.models.trunk import Trunk
from dapt_jax.parameters import Kind

HeadParameters = dict[str, tuple[tuple[int, ...], Kind]]
"""Shape and kind of every parameter of a head, by its slash-separated path."""

AsMap = Callable[[jax.Array], jax.Array]
"""Function that converts an encoder's last output to a feature map (b, h, w, c)."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A label-free objective; subclasses define the head and the loss.

    Attributes:
        teacher: Frozen network whose outputs are the targets; None for an objective without.
        options: The objective's section of the settings, `adapt.NAME`.
    """

    name: ClassVar[str] = ""
    risk: ClassVar[str] = ""
    """What users are warned of; empty for nothing."""
    trains_head_first: ClassVar[bool] = True
    """Whether a phase of the head alone comes first; a head that starts as the identity needs none."""
    first_head_layers: ClassVar[tuple[str, ...]] = ()
    """Parts of the head that alone train in the first epoch; empty for the whole head."""
    is_corrupting: ClassVar[bool] = False
    """Whether training corrupts the activations at the boundary: see `noisy` and `replaced`."""
    is_paired: ClassVar[bool] = False
    """Whether a step sees two views of every image."""
    compares_images: ClassVar[bool] = False
    """Whether the loss compares all images of a batch, none of one patient with another of the same."""
    is_masking: ClassVar[bool] = False
    """Whether a view holds a mask of patches, of which the encoder sees the visible ones alone."""
    has_own_teacher: ClassVar[bool] = False
    """Whether the teacher is the network that is adapted, with the weights before adaptation."""
    uncertain: ClassVar[None] = None
    multi_label: ClassVar[bool] = False

    teacher: Trunk | None = None
    options: Any = None

    @property
    def pairs_patients(self) -> bool:
        """Whether the second view of a pair is of another image of the patient, where there is one."""
        return False

    def views(self, augment: Augment, encoder: Encoder) -> Augment:
        """Return the augmentation that draws an encoder's views, from that of the images."""
        del encoder
        return augment

    def head(self, encoder: Encoder) -> HeadParameters:
        """Return the parameters of the head of an encoder."""
        raise NotImplementedError

    def visible(self, patches: int) -> int:
        """Return how many patches of a view the encoder sees."""
        return patches

    def outputs(
        self, head: Tree, x: PyTree[Float[Array, "b ..."]], as_map: AsMap
    ) -> PyTree[Float[Array, "b ..."]]:
        """Return the head's outputs for the encoder's last output: a map (b, h, w, c) or tokens (b, n, c)."""
        raise NotImplementedError

    def losses(
        self, outputs: PyTree[Array], targets: PyTree[Array], weights: Float[Array, " b"]
    ) -> Float[Array, " b"]:
        """Return the loss of each example."""
        raise NotImplementedError

    def total(
        self, outputs: PyTree[Array], targets: PyTree[Array], weights: Float[Array, " b"]
    ) -> Float[Array, ""]:
        """Return the weighted sum of the losses of a batch."""
        return (self.losses(outputs, targets, weights) * weights).sum()

    def noisy(
        self, x: Float[Array, "b ..."], draws: Float[Array, "b ..."], keeps_last: Array | None = None
    ) -> Float[Array, "b ..."]:
        """Return activations with noise added, by uniform draws of their shape.

        Args:
            x: Activations.
            draws: Uniform draws.
            keeps_last: Whether the last image is that of the whole batch, of which `x` is a part; None where it
                is all of it.
        """
        raise NotImplementedError

    def replaced(
        self,
        x: Float[Array, "b ..."],
        vector: Float[Array, "..."],
        share: Float[Array, " b"],
        draws: Float[Array, "b ..."],
        extra: int,
        keeps_last: Array | None = None,
    ) -> Float[Array, "b ..."]:
        """Return activations of which some positions are replaced by a vector; the `extra` first are not.

        Args:
            x: Activations.
            vector: The vector, or one for each position.
            share: Uniform draw that decides the share of each image.
            draws: Uniform draws of all positions.
            extra: Number of first tokens that stay.
            keeps_last: See `noisy`.
        """
        raise NotImplementedError

    def label_shape(self, batch: int, side: int) -> Any:
        """Return the abstract targets of the loss of a batch of images of a side in pixels."""
        if self.teacher is None:
            return jax.ShapeDtypeStruct((batch,), jnp.int32)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype), self.teacher.shapes(side)
        )


@dataclasses.dataclass(frozen=True)
class SelfDistillation(Objective):
    """An objective whose targets are the outputs of the network's own moving average, the teacher.

    The average is `state["ema"]` of training; what is evaluated and saved is the teacher. Arrays that the
    objective keeps between steps are in `state["objective"]`.
    """

    def init_state(self) -> dict[str, np.ndarray]:
        """Return the arrays that the objective keeps, before the first step."""
        return {}

    def momentum(self, step: Int[Array, ""], total_steps: Int[Array, ""]) -> Float[Array, ""]:
        """Return the momentum of the teacher in a step of a run of so many steps."""
        raise NotImplementedError

    def targets(
        self, outputs: PyTree[Array], kept: dict[str, Array], epoch: Int[Array, ""] | None
    ) -> PyTree[Array]:
        """Return the targets of the loss.

        Args:
            outputs: Outputs of the teacher.
            kept: Arrays of the objective, before the step.
            epoch: Epoch of the run; None for the end of all schedules.
        """
        raise NotImplementedError

    def next_state(
        self, kept: dict[str, Array], outputs: PyTree[Array], weights: Float[Array, " b"]
    ) -> dict[str, Array]:
        """Return the arrays of the objective after a step, from those before it and the teacher's outputs."""
        del outputs, weights
        return kept


def dense(head: Tree, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
    """Apply a dense layer of a head in float32."""
    return x.astype(jnp.float32) @ head["kernel"] + head["bias"]


def dense_parameters(name: str, inputs: int, outputs: int) -> HeadParameters:
    """Return the parameters of a dense layer of a head."""
    return {
        f"{name}/kernel": ((inputs, outputs), Kind.DENSE_KERNEL),
        f"{name}/bias": ((outputs,), Kind.BIAS),
    }


def normalised(x: Float[Array, "*b c"], eps: float = 1e-6) -> Float[Array, "*b c"]:
    """Return vectors less their mean, divided by their standard deviation (layer norm without parameters)."""
    x = x.astype(jnp.float32)
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + eps)


def cosine(a: Float[Array, "*b c"], b: Float[Array, "*b c"], eps: float = 1e-12) -> Float[Array, "*b"]:
    """Return the cosine of the angle between vectors."""
    return (unit(a, eps) * unit(b, eps)).sum(-1)


def unit(x: Float[Array, "*b c"], eps: float = 1e-12) -> Float[Array, "*b c"]:
    """Return vectors scaled to length 1; a vector without length stays 0."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + eps)
