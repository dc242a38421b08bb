"""Networks of label-free runs, and refusal of runs that could only fail or mean nothing."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dapt_jax.data import near_duplicates
from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError
from dapt_jax.models.encoder import Encoder
from dapt_jax.models.pretext import Pretext
from dapt_jax.objectives import Objective
from dapt_jax.training import freezing
from dapt_jax.training.phases import Phase

if TYPE_CHECKING:
    from dapt_jax.training.run import TrainingRun


def pretext(
    encoder: Encoder, objective: Objective, phases: Sequence[Phase], dtype: str = "float32"
) -> Pretext:
    """Return an encoder with the head of an objective, for a run of these phases.

    Args:
        encoder: The encoder.
        objective: The objective.
        phases: Phases of training, at whose boundaries activations may be corrupted.
        dtype: Dtype of activations.
    """
    model = Pretext(encoder, dtype=dtype, objective=objective)
    masks = [freezing.resolve_trainable(phase, model.groups, model.kinds) for phase in phases]
    return dataclasses.replace(model, boundaries=tuple(sorted({mask.boundary for mask in masks})))


def distinct_rows(dataset: Dataset) -> np.ndarray:
    """Return the rows of a data set whose pixels no earlier row has, int [k], ascending."""
    return np.sort(np.unique(near_duplicates.looks(dataset.images).digests, return_index=True)[1])


def check(run: "TrainingRun") -> None:
    """Refuse a run whose objective its data or settings contradict.

    Raises:
        UserError: Images are mixed, there are fewer than two different ones, or the two views of every image
            would be equal.
    """
    objective, name = run.loss, run.dataset.name
    assert isinstance(objective, Objective)
    if not run.mix.is_identity:
        raise UserError(
            f"objective {objective.name!r} compares unmixed images; expected adapt.mix without mixing"
        )
    if len(run.train_rows) < 2:
        raise UserError(
            f"{name}: {len(run.train_rows)} image to train on; objective {objective.name!r} needs two or more "
            "different ones"
        )
    if objective.is_paired:
        _check_pairs(run, objective)


def _check_pairs(run: "TrainingRun", objective: Objective) -> None:
    if run.grad_accum_steps > 1:
        raise UserError(
            f"objective {objective.name!r} compares all images of a batch, but grad_accum_steps="
            f"{run.grad_accum_steps} computes it in parts; expected grad_accum_steps=1"
        )
    if len(np.unique(run.labels[run.train_rows])) < 2:
        raise UserError(
            f"{run.dataset.name}: all {len(run.train_rows)} images are of one patient or look alike; objective "
            f"{objective.name!r} compares patients: expected two or more, or adapt.objective='reconstruct'"
        )
    for program in run.programs:
        phase = program.phase
        if program.augment.is_fixed or phase.views == 1:
            why = "adapt.augment changes nothing" if program.augment.is_fixed else "it has one fixed view"
            raise UserError(
                f"phase {phase.name!r}: the two views of an image are equal, since {why}; objective "
                f"{objective.name!r} needs an augmentation, and views (adapt.num_fixed_views) of 2 or more, or 0"
            )
