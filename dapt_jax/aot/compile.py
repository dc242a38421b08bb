"""Compilation of a run's phases for a device mesh that need not exist, and the compiler's figures."""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dapt_jax import ops
from dapt_jax.aot.collectives import Collective, of_program
from dapt_jax.aot.hlo import Program
from dapt_jax.errors import UserError
from dapt_jax.objectives import Objective
from dapt_jax.runtime import sharding
from dapt_jax.training import accounting
from dapt_jax.training.cache.policy import FLOPS_PER_BYTE, cached_spec
from dapt_jax.training.run import TrainingRun
from dapt_jax.training.step_runners import MAX_FUSED_EPOCHS, FusedEpochs


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a chip's memory while a step runs.

    Attributes:
        arguments: The state and the step's other arguments.
        outputs: Outputs other than the state, whose buffers are donated.
        temporaries: Activations, gradients and other intermediate arrays.
        code: Code of the program.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Figures of the compiler for one program; all but `seconds` and `devices` are per chip.

    Attributes:
        seconds: Seconds that compiling took.
        devices: Number of chips.
        needed: Bytes of memory; for a program that does not fit, the requirement that the compiler reports.
        available: Bytes that the compiler may use; 0 where the program fits, since it is then not reported.
        memory: Parts of the memory; None where the program does not fit, as are all that follow.
        flops: FLOPs that the compiler counts, with the bodies of loops counted once.
        traffic: Bytes read from and written to memory per run; loops count as often as they run.
        collectives: Collective operations per run.
        unknown_loops: Number of loops whose trip count is unknown; their bodies count once.
    """

    seconds: float
    devices: int
    needed: int
    available: int = 0
    memory: Memory | None = None
    flops: float = 0.0
    traffic: int = 0
    collectives: tuple[Collective, ...] = ()
    unknown_loops: int = 0

    @property
    def fits(self) -> bool:
        """Whether the program fits in memory."""
        return self.memory is not None


def phase_function(run: TrainingRun, place: int) -> Callable[..., Any]:
    """Return the phase's function that a run compiles, given how its frozen prefix is cached."""
    program = run.programs[place]
    prefixes_to_compute = run.prefixes_to_compute(place)
    if not prefixes_to_compute:
        return program.train_step
    _, tier = prefixes_to_compute[-1]
    if tier == "disk":
        return program.activation_step
    evaluates_images = program.phase.image_size and len(run.val_rows)  # of the size of the data set
    is_fused = FusedEpochs.applies(program) and not evaluates_images
    return program.cached_epochs if is_fused else program.cached_step


def abstract_arguments(run: TrainingRun, place: int, mesh: Mesh) -> tuple[Any, ...]:
    """Return the abstract arguments of a phase's function: shapes, dtypes and shardings, the state first.

    Raises:
        UserError: The run trains by an objective without labels.
    """
    program, size, batch = run.programs[place], run.dataset.images.size, run.batch_size
    if isinstance(program.objective, Objective):
        raise UserError(
            f"{run.title}: mode=aot compiles supervised adaptation only; expected adapt.objective='supervised'"
        )
    function = phase_function(run, place).__name__
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params, batch_stats = program.model.abstract()
    state = jax.eval_shape(program.init_state, params, batch_stats)
    state = jax.tree.map(_placed, state, sharding.state_shardings(state, mesh))
    targets = run.dataset.targets
    rate = _array((), np.float32, whole)
    draw = {
        "seed": _array((), np.uint32, whole),
        "view": _array((), np.int32, whole),
        "epoch": _array((), np.int32, whole),
    }
    rows = {"weight": _array((batch,), np.float32, split), "index": _array((batch,), np.int32, split)}
    labelled = {**rows, "label": _array((batch, *targets.shape[1:]), targets.dtype, split)}
    if function == "train_step":
        side = program.side(size) if program.augment.crop_from else program.phase.image_size or size
        return state, {**labelled, "image": _array((batch, side, side, 3), np.uint8, split)}, draw, rate
    decision = run.cache_decision(program)
    side = program.side(size)
    shapes = cached_spec(
        accounting.boundary_shape(program.model, program.mask.boundary, side), run.caching.dtype
    )

    def activations(*leading: int, where: jax.sharding.Sharding = whole) -> Any:
        return jax.tree.map(lambda leaf: _array((*leading, *leaf.shape), leaf.dtype, where), shapes)

    if function == "activation_step":
        return state, {**labelled, "x": activations(batch, where=split)}, draw, rate
    cache = {
        "x": activations(decision.views, len(run.dataset)),
        "label": _array(targets.shape, targets.dtype, whole),
    }
    if function == "cached_step":
        return state, cache, rows, draw, rate
    most, steps = min(MAX_FUSED_EPOCHS, program.phase.epochs), run.padded_steps
    steps_of = sharding.batch_sharding(mesh, axis=2)
    work = {
        "index": _array((most, steps, batch), np.int32, steps_of),
        "weight": _array((most, steps, batch), np.float32, steps_of),
        "view": _array((most,), np.int32, whole),
        "lr": _array((most, steps), np.float32, whole),
        "epochs": _array((), np.int32, whole),
        "steps": _array((), np.int32, whole),
        "first": _array((), np.int32, whole),
        "seed": _array((), np.uint32, whole),
    }
    return state, {**cache, "validation": activations(len(run.padded_val_rows))}, work


def _array(shape: tuple[int, ...], dtype: DTypeLike, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _placed(leaf: jax.Array | jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return _array(leaf.shape, leaf.dtype, sharding)


def for_tpus(run: TrainingRun, norm_groups: int = 1) -> TrainingRun:
    """Return a run with the settings that depend on the kind and the number of devices set for TPUs.

    Args:
        run: The run as configured for this machine.
        norm_groups: Groups into which batch norm in training mode splits a batch: see `PhaseProgram`.
    """
    least = run.caching.flops_per_byte or float(FLOPS_PER_BYTE["tpu"])
    caching = dataclasses.replace(run.caching, flops_per_byte=least)
    return dataclasses.replace(run, caching=caching, batch_norm_groups=norm_groups)


def lower(run: TrainingRun, place: int, mesh: Mesh) -> Any:
    """Lower the program of a phase for an accelerator, whatever the backend of this machine."""
    function = phase_function(run, place)

    def step(*values: Any) -> Any:  # a new function, which JAX has not traced for this machine
        return function(*values)

    with ops.formulation("lax"):
        arguments = abstract_arguments(run, place, mesh)
        return sharding.jit_step(step, *arguments, mesh=mesh).lower(*arguments)


def compile_phase(run: TrainingRun, place: int, mesh: Mesh) -> Compiled:
    """Compile a phase of a run for the devices of a mesh."""
    lowered = lower(run, place, mesh)
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, available = exhausted(str(error))
        return Compiled(time.monotonic() - start, mesh.size, needed, available)
    seconds = time.monotonic() - start
    said = compiled.memory_analysis()
    memory = Memory(
        arguments=said.argument_size_in_bytes,
        outputs=said.output_size_in_bytes - said.alias_size_in_bytes,
        temporaries=said.temp_size_in_bytes,
        code=said.generated_code_size_in_bytes,
    )
    program = Program.parse(compiled.as_text())
    costs = compiled.cost_analysis()
    return Compiled(
        seconds=seconds,
        devices=mesh.size,
        needed=memory.total,
        memory=memory,
        flops=float(costs.get("flops", 0.0)),
        traffic=program.memory_bytes,
        collectives=tuple(of_program(program)),
        unknown_loops=program.unknown_loops,
    )


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def exhausted(message: str) -> tuple[int, int]:
    """Return the bytes needed and available, parsed from the compiler's error; 0 where it gives none."""
    size = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"\({size}\) exceeds available HBM \({size}\)|Used {size} of {size}", message)
    if not found:
        return 0, 0
    used, used_unit, most, most_unit = (part for part in found.groups() if part is not None)
    return int(float(used) * _UNITS[used_unit]), int(float(most) * _UNITS[most_unit])
