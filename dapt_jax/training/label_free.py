"""Networks of label-free runs, and refusal of runs that could only fail or mean nothing."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dapt_jax.data import near_duplicates
from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError
from dapt_jax.models.encoder import Encoder
from dapt_jax.models.tokens import visible_count
from dapt_jax.objectives import Objective
from dapt_jax.objectives.masking import MaskedPretext, MaskedViews
from dapt_jax.objectives.network import Pretext
from dapt_jax.training import freezing
from dapt_jax.training.phases import Phase
from dapt_jax.training.steps import PhaseProgram


def pretext(
    encoder: Encoder, objective: Objective, phases: Sequence[Phase], dtype: str = "float32"
) -> Pretext:
    """Return an encoder with the head of an objective, for a run of these phases.

    Args:
        encoder: The encoder.
        objective: The objective.
        phases: Phases of training, at whose boundaries activations may be corrupted.
        dtype: Dtype of activations.

    Raises:
        UserError: The objective drops patches of an encoder that needs all of them.
    """
    if objective.is_masking and not encoder.token_patch:
        raise UserError(
            f"objective {objective.name!r} drops patches, which model {encoder.name!r} cannot: expected a "
            "vision transformer with learnt positions, such as model.name='vit_small', or "
            "adapt.objective='reconstruct'"
        )
    teacher = objective.teacher
    needs_all = objective.is_masking or objective.is_corrupting or (teacher and teacher.reads == "map")
    if encoder.options.patch_dropout and needs_all:
        raise UserError(
            f"objective {objective.name!r} needs all patches, but model.patch_dropout is "
            f"{encoder.options.patch_dropout:g}; expected 0, or adapt.objective='two_views'"
        )
    network = MaskedPretext if objective.is_masking else Pretext
    model = network(encoder, dtype=dtype, objective=objective)
    masks = [freezing.resolve_trainable(phase, model.groups, model.kinds) for phase in phases]
    return dataclasses.replace(model, boundaries=tuple(sorted({mask.boundary for mask in masks})))


def distinct_rows(dataset: Dataset) -> np.ndarray:
    """Return the rows of a data set whose pixels no earlier row has, int [k], ascending."""
    return np.sort(np.unique(near_duplicates.looks(dataset.images).digests, return_index=True)[1])


def check(programs: Sequence[PhaseProgram], dataset: Dataset, rows: np.ndarray, groups: np.ndarray) -> None:
    """Refuse a run whose objective its data or settings contradict.

    Args:
        programs: Programs of its phases.
        dataset: Its data set.
        rows: Rows that are trained on.
        groups: Number of the patient of every row of the data set, where the objective compares patients.

    Raises:
        UserError: Images are mixed, there are fewer than two different ones, the two views of every image would
            be equal, or the phases would train an encoder against a random head.
    """
    objective = programs[0].objective
    assert isinstance(objective, Objective)
    if any(not program.mix.is_identity for program in programs):
        raise UserError(
            f"objective {objective.name!r} compares unmixed images; expected adapt.mix without mixing"
        )
    if len(rows) < 2:
        raise UserError(
            f"{dataset.name}: {len(rows)} image to train on; objective {objective.name!r} needs two or more "
            "different ones"
        )
    if programs[0].self_distillation:
        _check_self_distillation(programs)
    for program in programs:
        if program.is_paired:
            _check_views(program)
        if objective.compares_images:
            _check_groups(program, dataset, groups[rows])
        if isinstance(program.augment, MaskedViews):
            _check_masks(program.augment, program.phase.image_size or dataset.images.size)


def _check_masks(views: MaskedViews, image_size: int) -> None:
    side = views.size(image_size)
    patches = (side // views.token_patch) ** 2
    visible = visible_count(patches, views.mask_ratio)
    if patches and not 0 < visible < patches:
        raise UserError(
            f"adapt.mae.mask_ratio is {views.mask_ratio:g}, which leaves {visible} of the {patches} patches "
            f"of {side} x {side} pixels; expected 1 to {patches - 1}, such as "
            f"mask_ratio={_ratio_of(patches):g}, or larger images"
        )


def _ratio_of(patches: int) -> float:
    """Return a share of patches, near three quarters, that masks some and not all."""
    return round((patches * 3 // 4) / patches, 4)


def _check_groups(program: PhaseProgram, dataset: Dataset, groups: np.ndarray) -> None:
    name = program.objective.name
    if len(np.unique(groups)) < 2:
        raise UserError(
            f"{dataset.name}: all {len(groups)} images are of one patient or look alike; objective "
            f"{name!r} compares patients: expected two or more, or adapt.objective='reconstruct'"
        )


def _check_views(program: PhaseProgram) -> None:
    name, phase = program.objective.name, program.phase
    if program.augment.is_fixed or phase.views == 1:
        why = "adapt.augment changes nothing" if program.augment.is_fixed else "it has one fixed view"
        raise UserError(
            f"phase {phase.name!r}: the two views of an image are equal, since {why}; objective "
            f"{name!r} needs an augmentation, and views (adapt.num_fixed_views) of 2 or more, or 0"
        )


def _check_self_distillation(programs: Sequence[PhaseProgram]) -> None:
    """Refuse what would train an encoder against a random head, or judge by a loss whose targets move."""
    first, name = programs[0], programs[0].objective.name
    if first.mask.boundary < len(first.model.encoder.groups):
        raise UserError(
            f"phase {first.phase.name!r} trains the encoder against a random head; objective {name!r} needs a "
            "phase of the head alone first: expected adapt.head_epochs of 1 or more, or a first phase in "
            "custom_strategies whose trainable is ('head',)"
        )
    if first.optimizer.ema:
        raise UserError(
            f"adapt.optimizer.ema is {first.optimizer.ema:g}, but objective {name!r} keeps an average of its "
            "own; expected adapt.optimizer.ema=0"
        )
    for program in programs:
        if program.phase.schedule == "plateau":
            raise UserError(
                f"phase {program.phase.name!r}: the loss of objective {name!r} has targets that move, and is "
                "lowest when it collapses; expected another schedule than 'plateau', such as 'cosine'"
            )


def warning(strategy: str, program: PhaseProgram) -> str:
    """Return a line on a strategy whose objective is a risk; empty for others."""
    objective = program.objective
    if not (isinstance(objective, Objective) and objective.risk):
        return ""
    return f"warning: {strategy}: objective {objective.name!r} {objective.risk}"
