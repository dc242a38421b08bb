"""The training loop: phases in order, from the newest checkpoint; a phase whose loss is no number may get a second try."""

from typing import Any

import jax

from dapt_jax.errors import UserError
from dapt_jax.runtime import processes, sharding
from dapt_jax.training import checkpoint, freezing, recovery
from dapt_jax.training.freezing import Tree
from dapt_jax.training.phase import PhaseLoop
from dapt_jax.training.run import Run, RunContext
from dapt_jax.training.steps import State, evaluation_params
from dapt_jax.weights import identity
from dapt_jax.weights.paths import flatten


def train(run: Run, params: Tree, batch_stats: Tree, context: RunContext) -> tuple[Tree, Tree]:
    """Runs all phases, or what is left of them after the newest checkpoint.

    Args:
        run: what to train, on what, how.
        params: source weights, with every layer that is new drawn from the seed.
        batch_stats: source statistics.
        context: checkpoints, ledger, cache, devices, display.

    Returns:
        Parameters (averaged ones where an average is kept) and statistics, on the host; those of where `tools.hook`
        ended the run, if it did.

    Raises:
        UserError: the loss is no longer a number; or the checkpoints are of a run from other source weights.
        Stopped: the study was told to end; what was done is saved.
    """
    params, batch_stats = jax.device_get(
        (params, batch_stats)
    )  # a step gives its buffers away, and a second try needs them again
    starts = [run.timeline.first_step(number) for number in range(len(run.programs))]
    kept = starts if context.debug.nan == "rollback" else ()
    source = _fingerprint(run, params, batch_stats)
    saver = checkpoint.Checkpoints(context.folder, kept, context.reporter.say, source) if context.folder else None
    try:
        blank = context.hook.state() if context.hook else {}
        state, meta = _start(run, params, batch_stats, saver, context)
        if at := int(state["step"]):
            context.reporter.skip(_work_until(run, at))
            context.reporter.say(f"{run.title}: goes on from step {at} of {run.timeline.steps}")
        rolled = meta.get("rolled", {})
        while True:
            try:
                state = _phases(run, state, meta, rolled, context, saver)
                break
            except _Fell as fell:
                state, meta = _start(run, params, batch_stats, saver, context)
                rolled = _after_fall(run, fell, state, meta, rolled, context)
                # From the phase's start, whatever was saved since: what comes out does not depend on when that was.
                state, meta = _start(run, params, batch_stats, saver, context, starts[fell.phase.number])
                meta.setdefault("hook", blank)
                if saver:
                    saver.forget_after(int(state["step"]))
    finally:
        context.profiler.close()
        if saver:
            saver.close()
    return sharding.gather_to_host((evaluation_params(state), state["batch_stats"]))


def _phases(
    run: Run, state: State, meta: dict[str, Any], rolled: dict[str, Any], context: RunContext,
    saver: checkpoint.Checkpoints | None,
) -> State:  # fmt: skip
    """Runs the phases that are left."""
    timeline, step = run.timeline, int(state["step"])
    if context.hook:
        context.hook.restore(meta.get("hook", {}))
    first = timeline.position(step).phase if step < timeline.steps else len(run.programs)
    for number in range(first, len(run.programs)):
        if context.hook and context.hook.ends:
            break
        state, phase = _entered(run, number, state, meta, rolled, context, saver)
        try:
            state = phase.run(state)
        except recovery.Diverged as error:
            raise _Fell(phase, error) from error
    return state


class _Fell(Exception):
    """A phase has diverged."""

    def __init__(self, phase: PhaseLoop, error: recovery.Diverged):
        super().__init__(str(error))
        self.phase, self.error = phase, error


def _after_fall(
    run: Run, fell: _Fell, state: State, meta: dict[str, Any], rolled: dict[str, Any], context: RunContext
) -> dict[str, Any]:
    """Finds and keeps the batch that made a loss no number, by a replay from the newest checkpoint.

    Returns:
        What the phase's second try has to know.

    Raises:
        UserError: there is no second try.
    """
    number, first = fell.phase.number, run.timeline.first_step(fell.phase.number)
    name, value, at = fell.phase.program.phase.name, fell.error.value, fell.error.step
    start, where = int(state["step"]), "no checkpoint of its phase is there to replay it from"
    if first <= start < at:
        with fell.phase.meter.clock.span("train"):
            state, again = _entered(run, number, state, meta, rolled, context, None)
            again.meter = fell.phase.meter
            found = recovery.find(state, again.replay(state), at)
        where = f"replayed from step {start} it did not happen again, which points to the hardware"
        if found:
            at, value, where = found.step + 1, found.loss, "its batch is not kept"
            if context.debug.folder:
                where = f"its batch is in {recovery.keep_batch(context.debug.folder, run, number, found)}"
    epoch = (at - 1) // run.timeline.steps_per_epoch + 1
    line = (
        f"{run.title}: the training loss is {value} in epoch {epoch} of phase {name!r}, step {at} of the run; {where}"
    )
    if rolled or context.debug.nan != "rollback":
        second = ", after a rollback" if rolled else ""
        raise UserError(f"{line}{second}; expected a number: lower its lr, or clip the gradient")
    factor = context.debug.nan_factor
    context.reporter.say(f"{line}; back to the start of the phase, with {factor:g} of its rate")
    context.reporter.advance((first - fell.error.step) * fell.phase.work_of_step, f"{run.title}  {name} again")
    spent = {"meter": fell.phase.meter.state(), "filled": fell.phase.filled}
    return {"phase": number, "step": at, "steps": at - first, "factor": factor, "spent": spent}


def _entered(
    run: Run, number: int, state: State, meta: dict[str, Any], rolled: dict[str, Any], context: RunContext,
    saver: checkpoint.Checkpoints | None,
) -> tuple[State, PhaseLoop]:  # fmt: skip
    """A phase, and the state as it takes it: laid out anew at its first step."""
    is_fresh = int(state["step"]) == run.timeline.first_step(number)
    if is_fresh and number:
        state = sharding.shard_state(run.programs[number].transition_from(state), context.mesh)
    return state, PhaseLoop(run, number, {} if is_fresh else meta, rolled, context, saver)


def _fingerprint(run: Run, params: Tree, batch_stats: Tree) -> str:
    """What identifies the weights that a run starts from: the same in all processes, or the run does not start."""
    own = identity.fingerprint(flatten(params) | flatten(batch_stats))
    with processes.barrier_or_raise():
        if own != processes.broadcast_from_primary(lambda: own):
            raise UserError(
                f"{run.title}: process {jax.process_index()} has loaded other source weights than the first process has; "
                "expected the same file in all"
            )
    return own


def _start(
    run: Run,
    params: Tree,
    batch_stats: Tree,
    saver: checkpoint.Checkpoints | None,
    context: RunContext,
    most: int | None = None,
) -> tuple[State, dict[str, Any]]:
    """The state to go on from: the newest checkpoint, up to a step, laid over the source weights, or a fresh one."""
    programs = list(run.programs)
    state, meta = programs[0].init_state(params, batch_stats), dict[str, Any]()

    def layout(step: int) -> State:
        phase = run.timeline.phase_of_state(step)
        fresh = jax.eval_shape(programs[phase].init_state, params, batch_stats)
        return checkpoint.saved_part(fresh, programs, phase)

    found = saver.restore(layout, most) if saver else None
    if found:
        _, part, meta = found
        full_stats = freezing.overlay(batch_stats, part["batch_stats"])
        state = {**part, "params": freezing.overlay(params, part["params"]), "batch_stats": full_stats}
    return sharding.shard_state(state, context.mesh), meta


def _work_until(run: Run, step: int) -> float:
    """Model FLOPs of a run's first steps, for the display."""
    first = run.timeline.first_step
    ends = [(number, min(step, first(number + 1))) for number in range(len(run.programs)) if step > first(number)]
    return float(sum(run.flops_per_image(number) * (end - first(number)) * run.batch_size for number, end in ends))
