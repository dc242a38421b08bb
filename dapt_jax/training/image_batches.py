"""Batches of images, or of cached activations on disk, for the steps of a phase; its next phase's step ahead."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dapt_jax.data import file_crops
from dapt_jax.runtime import sharding
from dapt_jax.training.cache.prefix import Activations
from dapt_jax.training.context import RunContext
from dapt_jax.training.run import TrainingRun
from dapt_jax.training.steps import PhaseProgram, State
from dapt_jax.training.targets import teacher_of, view_of

Read = Callable[[int, np.ndarray], dict[str, Any]]
"""Function from an epoch and rows to the contents of a batch besides labels and weights."""


def reader(
    run: TrainingRun, program: PhaseProgram, activations: Activations | None, targets: Activations | None
) -> Read:
    """Return the function from an epoch and rows to the contents of a batch besides labels and weights."""
    images = run.images_of(program)

    def read(epoch: int, rows: np.ndarray) -> dict[str, Any]:
        own, compared = program.view_pair(epoch)
        found: dict[str, Any] = {}
        if program.is_paired:
            found["other"] = run.partners(epoch)[rows]
        if targets is not None:
            found["label"] = host(targets.rows(view_of(program, own), rows))
        if activations is None:
            augment, seed = program.augment, program.view_seed
            found["image"] = file_crops.batch(images, augment, rows, seed, own)
            if program.is_paired:
                found["other_image"] = file_crops.batch(images, augment, found["other"], seed, compared)
            return found
        x = host(activations.rows(own % activations.views, rows))
        if program.is_paired:
            x = x, host(activations.rows(compared % activations.views, found["other"]))
        return {**found, "x": x}

    return read


def first_arguments(run: TrainingRun, program: PhaseProgram, mesh: Mesh, read: Read) -> tuple[Any, ...]:
    """Return arguments of a step besides the state, with the run's first rows as their batch."""
    rows = run.order.epoch(0)[0][0][sharding.local_slice(run.batch_size, mesh)]
    example = {
        "label": run.labels[rows],
        **read(program.first_step // program.steps_per_epoch, rows),
        "weight": np.ones(len(rows), np.float32),
        "index": rows,
    }
    return sharding.shard_batch(example, mesh), rng_context(program, 0), np.float32(1)


def compile_next(run: TrainingRun, number: int, context: RunContext, state: State) -> None:
    """Begin to compile the step of the phase after `number` where it reads images.

    Args:
        run: The run.
        number: Index of the phase that is about to train.
        context: Surroundings.
        state: State of that phase.
    """
    if not context.compiles_ahead or number + 1 == len(run.programs):
        return
    program = run.programs[number + 1]
    if run.prefixes_to_compute(number + 1) or teacher_of(program) is not None:
        return  # what these steps take follows from caches that are not there yet
    abstract = jax.eval_shape(program.transition_from, state)
    following = jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        abstract,
        sharding.state_shardings(abstract, context.mesh),
    )
    arguments = first_arguments(run, program, context.mesh, reader(run, program, None, None))
    context.compile_ahead(program.key, program.train_step, following, *arguments)


def rng_context(program: PhaseProgram, epoch: int) -> dict[str, Any]:
    """Return what the random numbers of an epoch follow from."""
    view, other = program.view_pair(epoch)
    pair = {"other_view": np.int32(other)} if program.is_paired else {}
    total = {"total_steps": np.int32(program.total_steps)} if program.self_distillation else {}
    return {
        **seeds(program),
        "view": np.int32(view),
        **pair,
        **total,
        "epoch": np.int32(epoch),
    }


def seeds(program: PhaseProgram) -> dict[str, Any]:
    """Return the seed of a program, and that of its views where it is another."""
    own = {"seed": np.uint32(program.seed)}
    return own if program.view_seed == program.seed else {**own, "view_seed": np.uint32(program.view_seed)}


def host(tree: Any) -> Any:
    """Return a pytree of arrays as NumPy arrays: other threads read ahead."""
    return jax.tree.map(np.asarray, tree)
