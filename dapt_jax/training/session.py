"""Progress of a run: its state, its next phase, and its handling of divergence and stops."""

import contextlib
from collections.abc import Iterator, Mapping

import jax

from dapt_jax.errors import UserError
from dapt_jax.runtime import processes, sharding
from dapt_jax.training import recovery
from dapt_jax.training.checkpointer import Checkpointer
from dapt_jax.training.context import RunContext
from dapt_jax.training.freezing import Tree
from dapt_jax.training.phase import ActivePhase
from dapt_jax.training.recovery import PhaseDiverged, Rollback
from dapt_jax.training.run import TrainingRun
from dapt_jax.training.steps import State, evaluation_params
from dapt_jax.weights import identity
from dapt_jax.weights.paths import flatten


@contextlib.contextmanager
def open_session(
    run: TrainingRun, params: Tree, batch_stats: Tree, context: RunContext
) -> Iterator["Session"]:
    """Yield the session of a run; checkpoints and profiler are closed after the block."""
    checkpointer = Checkpointer(run, context, source_fingerprint(run, params, batch_stats))
    try:
        yield Session(run, params, batch_stats, context, checkpointer)
    finally:
        context.profiler.close()
        checkpointer.close()


def source_fingerprint(run: TrainingRun, params: Tree, batch_stats: Tree) -> str:
    """Return what identifies the weights that a run starts from: the same in all processes.

    Raises:
        UserError: This process has loaded different weights from the first one.
    """
    own = identity.fingerprint(flatten(params) | flatten(batch_stats))
    with processes.barrier_or_raise():
        if own != processes.broadcast_from_primary(lambda: own):
            raise UserError(
                f"{run.title}: process {jax.process_index()} has loaded other source weights than the first "
                "process; "
                "expected the same file in all"
            )
    return own


class Session:
    """A run from its newest checkpoint to its end.

    Attributes:
        state: Current training state.
        checkpointer: Checkpointer of the run.
        is_stopped: Whether a callback has ended the run.
    """

    def __init__(
        self,
        run: TrainingRun,
        params: Tree,
        batch_stats: Tree,
        context: RunContext,
        checkpointer: Checkpointer,
    ):
        """Read the newest checkpoint.

        Args:
            run: The run.
            params: Parameters before the run.
            batch_stats: Batch-norm statistics before the run.
            context: Surroundings.
            checkpointer: Saves the run.
        """
        self._run, self._context, self.checkpointer = run, context, checkpointer
        # A step donates the buffers of its state, and a second attempt needs the source weights again.
        self._source: tuple[Tree, Tree] = jax.device_get((params, batch_stats))
        self._blank = {callback.name: callback.state() for callback in context.callbacks}
        self.state, self._stored = self.checkpointer.restore(*self._source)
        rollback = self._stored.get("rollback")
        self._rollback = Rollback(**rollback) if rollback else None
        self.is_stopped = self._restore_callbacks()
        if step := int(self.state["step"]):
            context.reporter.skip(run.flops_until(step))
            context.reporter.say(f"{run.title}: goes on from step {step} of {run.timeline.steps}")

    def enter_phase(self) -> ActivePhase | None:
        """Set up the state for the next phase and return the phase; None where no phase is left."""
        step = int(self.state["step"])
        if self.is_stopped or step >= self._run.timeline.steps:
            return None
        return self._enter(self._run.timeline.position(step).phase)

    def _enter(self, number: int, diverged: ActivePhase | None = None) -> ActivePhase:
        """Enter a phase, or re-enter a diverged one to replay it."""
        is_new = int(self.state["step"]) == self._run.timeline.first_step(number)
        if is_new and number:
            laid_out = self._run.programs[number].transition_from(self.state)
            self.state = sharding.shard_state(laid_out, self._context.mesh)
        stored = {} if is_new else self._stored
        account = diverged.account if diverged else None
        return ActivePhase(self._run, number, self._context, stored, self._rollback, account, self._source)

    @contextlib.contextmanager
    def recovering(self, phase: ActivePhase) -> Iterator[None]:
        """Roll back to the start of the phase, once per run, if the loss becomes non-finite in the block.

        Raises:
            UserError: No further attempt is allowed; names the step and the file of its batch.
        """
        try:
            yield
        except PhaseDiverged as error:
            self._recover(phase, error)

    def _recover(self, phase: ActivePhase, error: PhaseDiverged) -> None:
        run, non_finite, reporter = self._run, self._context.non_finite, self._context.reporter
        self.state, self._stored = self.checkpointer.restore(*self._source)
        step, loss, where = self._diagnose(phase, error)
        epoch, name = (step - 1) // run.steps_per_epoch + 1, phase.program.phase.name
        line = (
            f"{run.title}: the training loss is {loss} in epoch {epoch} of phase {name!r}, step {step} of "
            "the run; "
            f"{where}"
        )
        if self._rollback or non_finite.policy != "rollback":
            second = ", after a rollback" if self._rollback else ""
            raise UserError(f"{line}{second}; expected a finite loss: lower its lr, or clip the gradient")
        steps = step - phase.first_step
        reporter.say(
            f"{line}; back to the start of the phase, with {non_finite.lr_factor:g} of its learning rate"
        )
        reporter.advance(-phase.work(error.step), f"{run.title}  {name} again")
        spent = {name: value for name, value in phase.account.state().items() if name != "curve"}
        self._rollback = Rollback(phase.number, step, steps, non_finite.lr_factor, spent)
        # From the phase's start, whatever was saved since, so that results do not depend on checkpoint times.
        self.state, self._stored = self.checkpointer.restore(*self._source, phase.first_step)
        self._stored.setdefault("callbacks", self._blank)
        self.is_stopped = self._restore_callbacks()
        self.checkpointer.forget_after(int(self.state["step"]))

    def _diagnose(self, phase: ActivePhase, error: PhaseDiverged) -> tuple[int, float, str]:
        """Replay a phase from the newest checkpoint; return steps, loss, and where the batch is."""
        start = int(self.state["step"])
        if not phase.first_step <= start < error.step:
            return error.step, error.value, "no checkpoint of its phase is there to replay it from"
        with phase.account.clock.span("train"):
            replayed = self._enter(phase.number, phase).replay(self.state)
            found = recovery.find_step(self.state, replayed, error.step)
        if not found:
            where = f"replayed from step {start} it did not happen again, which points to the hardware"
            return error.step, error.value, where
        where = "its batch is not saved"
        if self._context.non_finite.folder:
            path = recovery.save_batch(self._context.non_finite.folder, self._run, phase.number, found)
            where = f"its batch is in {path}"
        return found.step + 1, found.loss, where

    def after_epoch(self, phase: ActivePhase, epoch: int, state: State, metrics: Mapping[str, float]) -> bool:
        """Call all callbacks, and return whether one of them ends the run."""
        context = self._context
        if context.callbacks:
            with phase.account.clock.span("eval"):
                params, batch_stats = evaluation_params(state), state["batch_stats"]
                if processes.is_multi_process() or context.mesh.shape[sharding.FSDP] > 1:
                    # Each process evaluates them separately.
                    params, batch_stats = sharding.gather_to_host((params, batch_stats))
                stops = [
                    callback.after_epoch(phase.number, epoch, params, batch_stats, metrics)
                    for callback in context.callbacks
                ]
            self.is_stopped = any(stops)
        return self.is_stopped

    def _restore_callbacks(self) -> bool:
        """Restore every callback from the checkpoint; return whether one of them has ended the run."""
        states = self._stored.get("callbacks", {})
        restored = [
            each.restore(states[each.name]) for each in self._context.callbacks if each.name in states
        ]
        return any(restored)

    def finish_phase(self, phase: ActivePhase, state: State) -> None:
        """Enter the phase into the ledger and save; after a kill in between, the same entry is rewritten.

        Raises:
            Stopped: A signal to stop was received by one of the processes; the progress is saved.
            PhaseDiverged: A parameter is not finite.
        """
        self.checkpointer.check_finite(phase, state)
        step = int(state["step"])
        with phase.account.clock.span("checkpoint"):  # the ledger waits for the disk
            phase.account.enter(step)
        if self.checkpointer.is_enabled:
            self.checkpointer.save(phase, state)
            with phase.account.clock.span("checkpoint"):
                self.checkpointer.wait()
            phase.account.enter(step)
        self.state = state
        self.checkpointer.stop_if_told()

    def weights(self) -> tuple[Tree, Tree]:
        """Return the parameters (averaged ones where there is an average) and statistics, on the host."""
        return sharding.gather_to_host((evaluation_params(self.state), self.state["batch_stats"]))
