"""The training loop: phases, epochs, steps."""

import dataclasses
from typing import Any

from dapt_jax.records.ledger import Row
from dapt_jax.runtime import sharding
from dapt_jax.training import image_batches
from dapt_jax.training.context import RunContext
from dapt_jax.training.freezing import Tree
from dapt_jax.training.run import TrainingRun
from dapt_jax.training.session import open_session


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        params: Parameters, on the host: averaged ones with `Optimizer.ema`.
        batch_stats: Batch-norm statistics, on the host.
        costs: Rows of the ledger, one per phase.
    """

    params: Tree
    batch_stats: Tree
    costs: tuple[Row, ...]

    @property
    def curve(self) -> list[dict[str, Any]]:
        """One point for every epoch of the run: `epoch`, `loss`, `lr`, and the validation metrics."""
        return [point for row in self.costs for point in row.curve]


def train(
    run: TrainingRun, params: Tree, batch_stats: Tree, context: RunContext | None = None
) -> TrainResult:
    """Run all phases, or the remaining ones after the newest checkpoint.

    The order must not change, since bitwise resumption, the ledger and multi-process runs rely on it:

    - of a phase: lay out the state (mask, moments), compute frozen prefixes and compile, run the epochs,
      enter the phase into the ledger, save;
    - of an epoch: steps (each report of the runner is checked, shown, and saved where that is due), evaluate,
      curve and plateau, callbacks, reset of the epoch's sums, save where that is due.

    A checkpoint inside an epoch therefore precedes its evaluation and one at its end follows it: every epoch
    is evaluated exactly once. A phase that diverges (non-finite loss) ends immediately; `Session.recovering`
    may roll it back to its start.

    Args:
        run: Model, data, phases and options of training.
        params: Source weights, every new layer initialised.
        batch_stats: Source statistics of batch norm.
        context: Devices, cache, ledger, checkpoints, callbacks, display; by default everything in memory.

    Returns:
        The weights at the end of the run, or where a callback ended it, and what they cost.

    Raises:
        UserError: The batch does not divide among the devices and into its parts, or the loss is no longer
            finite.
        Stopped: A signal to stop was received; the progress is saved.
    """
    context = context or RunContext()
    sharding.check_batch(run.batch_size, run.grad_accum_steps, context.mesh.size)
    # The run plans its cache in this dtype.
    context = dataclasses.replace(context, cache=context.cache.in_dtype(run.caching.dtype))
    with open_session(run, params, batch_stats, context) as session:
        while phase := session.enter_phase():
            with session.recovering(phase), phase.account.clock.span("train"):
                state = session.state
                phase.start(state)
                phase.runner.compile(state)
                image_batches.compile_next(run, phase.number, context, state)
                with context.preemption_handler.deferred():
                    for epoch in phase.epochs_left(state):
                        for report in phase.runner.epoch(state, epoch, phase.plateau.scale):
                            state = report.state
                            phase.observe(epoch, report)
                            if report.step < (epoch + 1) * run.steps_per_epoch:
                                session.checkpointer.save_if_due(phase, state)
                        metrics = phase.evaluate(report)
                        phase.record_epoch(epoch, report, metrics)
                        is_stopped = session.after_epoch(phase, epoch, state, metrics)
                        state = phase.reset_sums(state)
                        if is_stopped:
                            break
                        if epoch < phase.last_epoch and not report.is_ahead:
                            session.checkpointer.save_if_due(phase, state)
                    session.finish_phase(phase, state)
        trained = session.weights()
    keys = [run.row_key(number) for number in range(len(run.phases))]
    return TrainResult(*trained, tuple(row for row in context.ledger.rows() if row.key in keys))
