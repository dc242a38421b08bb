"""A frozen teacher's outputs for every image and view: cached, or computed with every batch."""

import dataclasses
from typing import Any

import jax
import numpy as np

from dapt_jax.cost.flops import Flops
from dapt_jax.cost.memory import tree_bytes
from dapt_jax.data import file_crops
from dapt_jax.data.decode import ImageStore
from dapt_jax.models.trunk import Trunk
from dapt_jax.objectives import Objective
from dapt_jax.training import accounting
from dapt_jax.training.cache.fill import forward_fn
from dapt_jax.training.cache.policy import CacheDecision, Caching, budget_decision
from dapt_jax.training.cache.prefix import Activations, Prefix
from dapt_jax.training.freezing import Tree
from dapt_jax.training.steps import PhaseProgram


def teacher_of(program: PhaseProgram) -> Trunk | None:
    """Return the teacher of a phase's objective; None for a loss without."""
    return program.objective.teacher if isinstance(program.objective, Objective) else None


def are_fresh(program: PhaseProgram) -> bool:
    """Return whether every epoch of a phase sees views, and so targets, that no earlier one has seen."""
    return not (program.augment.is_fixed or program.phase.views)


def view_of(program: PhaseProgram, view: int) -> int:
    """Return the view of a phase's targets that goes with a view of its images; plain images have one."""
    return 0 if program.augment.is_fixed else view


def target_prefix(program: PhaseProgram, teacher: Trunk) -> Prefix:
    """Return the computation of the targets of a phase, on its own views."""
    seed = 0 if program.augment.is_fixed else program.view_seed
    views = 1 if program.augment.is_fixed else max(program.phase.views, 1)
    size = program.phase.image_size
    return Prefix(teacher, len(teacher.encoder.groups), program.augment, seed, views, size)


def cacheable(program: PhaseProgram) -> list[Prefix]:
    """Return what a phase could cache of each view: activations above boundary 0, and a teacher's outputs."""
    teacher = teacher_of(program)
    found = [Prefix.of(program, 1)] if program.mask.boundary else []
    return found + ([target_prefix(program, teacher)] if teacher else [])


def forward_cost(program: PhaseProgram, image_size: int) -> Flops:
    """Return FLOPs of the teacher's forward pass on one image; none without a teacher."""
    teacher = teacher_of(program)
    if teacher is None:
        return Flops()
    return accounting.forward(teacher, program.side(image_size), len(teacher.encoder.groups))


def choose_target_cache(
    program: PhaseProgram, images: int, image_size: int, caching: Caching, prefix: CacheDecision
) -> CacheDecision:
    """Choose where the targets of a phase are cached, beside the activations of its prefix.

    Args:
        program: The phase.
        images: Number of images in the corpus.
        image_size: Side of the images in pixels.
        caching: Caching options.
        prefix: Decision about the activations of the prefix, which take their bytes first.

    Raises:
        UserError: `mode` is `on`, and the targets fit neither in memory nor on disk.
    """
    teacher = teacher_of(program)
    if teacher is None:
        return CacheDecision("", 0, 0, "no targets")
    if are_fresh(program):
        return CacheDecision("", 0, 0, "images are augmented anew each epoch; views=K would fix K of them")
    views = target_prefix(program, teacher).views
    size = images * views * tree_bytes(target_prefix(program, teacher).shapes(image_size, caching.dtype))
    return budget_decision(program.phase.name, "targets", views, size, caching, prefix)


@dataclasses.dataclass(frozen=True)
class OnlineTargets(Activations):
    """Targets that are computed for every batch; each process computes its own rows.

    Attributes:
        prefix: Computation of the targets.
        weights: Parameters and batch-norm statistics of the teacher.
        images: All images.
    """

    prefix: Prefix = dataclasses.field(kw_only=True)
    weights: tuple[Tree, Tree] = dataclasses.field(kw_only=True)
    images: ImageStore = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, prefix: Prefix, weights: tuple[Tree, Tree], images: ImageStore) -> "OnlineTargets":
        """Return the targets of all images, none of which is computed yet."""
        parts = prefix.part(weights[0]), prefix.part(weights[1])
        structure = jax.tree.structure(prefix.shapes(images.size))
        return cls(structure, prefix.views, 0, 0.0, 0, prefix=prefix, weights=parts, images=images)

    def rows(self, view: int, rows: np.ndarray) -> Any:
        """Return the targets of some rows in one view, each leaf [k, ...]."""
        prefix, index = self.prefix, np.asarray(rows, np.int32)
        forward = forward_fn(prefix.model, prefix.boundary, prefix.augment)
        rng = {"seed": np.uint32(prefix.seed), "view": np.int32(view)}
        images = file_crops.batch(self.images, prefix.augment, index, prefix.seed, view)
        return jax.tree.map(np.asarray, forward(*self.weights, images, rng, index))
