"""Saving and restoring of a run: its state, the progress of its phase, and its callbacks."""

import dataclasses
import math
import time
from typing import Any

import jax

from dapt_jax.records.ledger import Row
from dapt_jax.runtime import processes, sharding
from dapt_jax.runtime.preemption import Stopped
from dapt_jax.training import freezing, run_identity
from dapt_jax.training.checkpoint import CheckpointFolder, CheckpointStore, NoCheckpoints, saved_part
from dapt_jax.training.context import RunContext
from dapt_jax.training.freezing import Tree
from dapt_jax.training.phase import ActivePhase
from dapt_jax.training.recovery import PhaseDiverged
from dapt_jax.training.run import TrainingRun
from dapt_jax.training.steps import State


class Checkpointer:
    """Saves and restores one run."""

    def __init__(self, run: TrainingRun, context: RunContext, source: str):
        """Open the run's folder, if it has one.

        Args:
            run: The run.
            context: Surroundings.
            source: Fingerprint of the weights that the run starts from.
        """
        self._run, self._context = run, context
        starts = [run.timeline.first_step(number) for number in range(len(run.phases))]
        keep = starts if context.non_finite.policy == "rollback" else []
        self._store: CheckpointStore = NoCheckpoints()
        if context.checkpoint_dir:
            of_run = run_identity.digests(run)
            self._store = CheckpointFolder(context.checkpoint_dir, keep, context.reporter.say, source, of_run)
        self._saved_at = time.monotonic()

    @property
    def is_enabled(self) -> bool:
        """Whether checkpoints are saved."""
        return self._context.checkpoint_dir is not None

    def restore(
        self, params: Tree, batch_stats: Tree, at_most: int | None = None
    ) -> tuple[State, dict[str, Any]]:
        """Return the newest checkpoint merged into the weights before the run, or a fresh state.

        Args:
            params: Parameters before the run.
            batch_stats: Batch-norm statistics before the run.
            at_most: Largest step of the checkpoint.

        Returns:
            The state, on the devices; and the stored metadata, empty for a fresh state.
        """
        run = self._run
        state, stored = run.programs[0].init_state(params, batch_stats), dict[str, Any]()

        def layout(step: int) -> State:
            phase = run.timeline.phase_of_state(step)
            fresh = jax.eval_shape(run.programs[phase].init_state, params, batch_stats)
            return saved_part(fresh, run.programs, phase)

        if found := self._store.restore(layout, at_most):
            _, part, stored = found
            ledger = self._context.ledger
            for row in map(Row.from_dict, stored.get("ledger", ())):
                if ledger.find(row.key) is None:
                    ledger.put(row)
            full_stats = freezing.overlay(batch_stats, part["batch_stats"])
            state = {**part, "params": freezing.overlay(params, part["params"]), "batch_stats": full_stats}
        return sharding.shard_state(state, self._context.mesh), stored

    def save_if_due(self, phase: ActivePhase, state: State) -> None:
        """Save when due or when the run must stop; all processes call it after the same step.

        Raises:
            Stopped: A signal to stop was received; the progress is saved.
            PhaseDiverged: A parameter is not finite.
        """
        is_late = time.monotonic() - self._saved_at > self._context.checkpoint_every_s
        number, is_due = processes.all_reduce_max(self._context.preemption_handler.signal_received, is_late)
        if self.is_enabled and (number or is_due):
            self.save(phase, state)
        # A signal that came since is for the next step: the other processes do not know of it yet.
        if number:
            raise Stopped(number)

    def stop_if_told(self) -> None:
        """Stop in all processes at once, since one that ends alone leaves the others waiting for it.

        Raises:
            Stopped: A signal to stop was received.
        """
        processes.all_reduce_max(0)  # waits for the slowest, so that hardly any time is left below
        (number,) = processes.all_reduce_max(self._context.preemption_handler.signal_received)
        if number:
            raise Stopped(number)

    def save(self, phase: ActivePhase, state: State) -> None:
        """Save a state in the background.

        Raises:
            PhaseDiverged: A parameter is not finite.
        """
        self.check_finite(phase, state)
        with phase.account.clock.span("checkpoint"):
            part = saved_part(state, self._run.programs, phase.number)
            callbacks = {callback.name: callback.state() for callback in self._context.callbacks}
            meta = {
                **phase.state(),
                "seed": self._run.seed,
                "callbacks": callbacks,
                "ledger": self._rows(phase),
            }
            self._store.save(int(state["step"]), part, meta)
        self._saved_at = time.monotonic()

    def _rows(self, phase: ActivePhase) -> list[dict[str, Any]]:
        """Return the ledger rows of the run up to a phase where the ledger is in memory; a file keeps its own."""
        ledger = self._context.ledger
        if ledger.path is not None:
            return []
        keys = [self._run.row_key(number) for number in range(phase.number + 1)]
        return [dataclasses.asdict(row) for row in ledger.rows() if row.key in keys]

    @staticmethod
    def check_finite(phase: ActivePhase, state: State) -> None:
        """Refuse non-finite parameters, since no loss reflects the last update yet.

        Raises:
            PhaseDiverged: A parameter is not finite.
        """
        if not sharding.all_finite(freezing.partition(state["params"], phase.program.mask.trainable)[0]):
            raise PhaseDiverged(int(state["step"]), math.nan)

    def forget_after(self, step: int) -> None:
        """Remove checkpoints of later steps, since a rollback repeats those steps."""
        self._store.forget_after(step)

    def wait(self) -> None:
        """Wait until all saves are on disk."""
        self._store.wait()

    def close(self) -> None:
        """Wait, and close the folder."""
        self._store.close()
