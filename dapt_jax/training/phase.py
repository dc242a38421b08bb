"""A running phase: its step runner, the state of its schedule, and its cost."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from dapt_jax.monitoring.metric_writer import Epoch
from dapt_jax.objectives import Objective
from dapt_jax.runtime import sharding
from dapt_jax.training import step_runners
from dapt_jax.training import targets as training_targets
from dapt_jax.training.account import PhaseAccount
from dapt_jax.training.cache.fill import Filling
from dapt_jax.training.cache.prefix import Activations
from dapt_jax.training.context import RunContext
from dapt_jax.training.evaluate import Evaluator
from dapt_jax.training.freezing import Tree
from dapt_jax.training.label_free_evaluator import LabelFreeEvaluator
from dapt_jax.training.optim import PlateauState
from dapt_jax.training.recovery import Rollback, check_loss
from dapt_jax.training.run import TrainingRun
from dapt_jax.training.step_runners import RunnerSetup, StepReport, StepRunner
from dapt_jax.training.steps import State
from dapt_jax.training.targets import OnlineTargets


class ActivePhase:
    """One phase of a run while it runs.

    Attributes:
        run: The run.
        number: Index of the phase.
        program: Compiled functions of the phase.
        account: Cost so far.
        plateau: State of the schedule `plateau`; its `scale` is the factor on the learning rate.
        rollback: Rollback of the run, if any.
        runner: Step runner, once `start` was called.
    """

    runner: StepRunner
    _evaluator: Evaluator | LabelFreeEvaluator

    def __init__(
        self,
        run: TrainingRun,
        number: int,
        context: RunContext,
        stored: dict[str, Any],
        rollback: Rollback | None = None,
        account: PhaseAccount | None = None,
        source: tuple[Tree, Tree] | None = None,
    ):
        """Enter a phase, or resume within it.

        Args:
            run: The run.
            number: Index of the phase.
            context: Surroundings.
            stored: What `state` returned before a restart; empty at the start of the phase.
            rollback: The rollback that the run has had, if any.
            account: Account of the same phase to continue; None for a new one.
            source: Parameters and batch-norm statistics before the run, from which an objective may take its
                targets.
        """
        self._source = source
        self.run, self.number, self.context, self.rollback = run, number, context, rollback
        self.program = run.programs[number]
        self.plateau = PlateauState()
        self._is_second_attempt = rollback is not None and rollback.phase == number
        repeated_steps = 0
        if rollback is not None and self._is_second_attempt:
            repeated_steps = rollback.steps
            if not stored:
                stored = dict(rollback.spent)
                self.plateau = PlateauState(scale=rollback.lr_factor)
        if "plateau" in stored:
            self.plateau = PlateauState(**stored["plateau"])
        self._data_position: dict[str, Any] = stored.get("data_position", {})
        self.account = account or PhaseAccount(run, number, context, stored, repeated_steps)
        self._step_work, self._epoch_steps, self._epoch_seconds = 0.0, 0, 0.0

    @property
    def first_step(self) -> int:
        """Steps of the run before the phase."""
        return self.run.timeline.first_step(self.number)

    def epochs_left(self, state: State) -> range:
        """Return the indices, in the run, of the remaining epochs."""
        epoch = int(state["step"]) // self.run.steps_per_epoch
        return range(epoch, self.run.timeline.first_epoch(self.number + 1))

    @property
    def last_epoch(self) -> int:
        """Index, in the run, of the phase's last epoch."""
        return self.run.timeline.first_epoch(self.number + 1) - 1

    def work(self, step: int) -> float:
        """Return model FLOPs of the phase's steps up to a step of the run, for the display."""
        return (step - self.first_step) * self._step_work

    def start(self, state: State, *, fuse: bool = True) -> None:
        """Compute frozen prefixes that are not cached, and choose the step runner.

        Args:
            state: State of the phase.
            fuse: Whether many steps may run as one program.
        """
        with self.account.clock.span("compile"):  # caching and reading inside are credited to their kinds
            activations, clean = self._activations(state)
            targets = self._targets(activations)
            step, clock = int(state["step"]), self.account.clock
            setup = RunnerSetup(self.run, self.program, self.context, clock, step, self._data_position)
            self.runner = step_runners.choose(setup, activations, clean, targets, fuse=fuse)
            run, program, mesh = self.run, self.program, self.context.mesh
            if isinstance(program.objective, Objective):
                self._evaluator = LabelFreeEvaluator(run, program, activations, targets, mesh)
            else:
                self._evaluator = Evaluator(run, program, clean, mesh)
            self._step_work = self.run.flops_per_step(self.number)

    def _activations(self, state: State) -> tuple[Activations | None, Activations | None]:
        """Return the phase's cached activations, and those of images that are not augmented; or None.

        The latter are None too where the phase trains on images of its own size and rows are held out.
        """
        run, context, account = self.run, self.context, self.account
        wanted = run.prefixes_to_compute(self.number)
        if not wanted:
            return None, None
        title = f"{run.title}  {self.program.phase.name}"
        context.reporter.advance(0, f"{title}: computing the frozen prefix once")
        source = state["params"], state["batch_stats"], run.images_of(self.program)
        filling = Filling(clock=account.clock, mesh=context.mesh, on_computed=account.add_fill)
        with account.clock.span("cache"):
            found, ran = None, 0
            for prefix, tier in wanted:  # each computed from the one below
                found = context.cache.get(prefix, *source, tier, filling)
                if found:
                    filling, ran = (
                        dataclasses.replace(filling, base=(prefix.boundary, found)),
                        ran + found.ran,
                    )
            clean, (prefix, tier) = found, wanted[-1]
            is_clean_needed = len(run.val_rows) and not isinstance(run.loss, Objective)
            has_own_size = bool(self.program.phase.image_size)
            if found and is_clean_needed and has_own_size:
                clean = None  # a few validation rows at full size cost less than all rows would once
            elif found and is_clean_needed and prefix != prefix.plain:
                plain = Filling(clock=account.clock, mesh=context.mesh)
                clean = context.cache.get(prefix.plain, *source, tier, plain)
        if found is None or (clean is None and not has_own_size):
            account.settle_fill(ran, 0.0, cached=False)
            return None, None
        account.settle_fill(ran, found.seconds, error=found.rounding_error)
        context.reporter.advance(ran, title)
        return found, clean

    def _targets(self, activations: Activations | None) -> Activations | None:
        """Return the teacher's outputs of the phase; None for a loss without a teacher."""
        run, context, account = self.run, self.context, self.account
        teacher = training_targets.teacher_of(self.program)
        if teacher is None:
            return None
        weights = run.teacher_weights() if run.teacher_weights else self._source
        if weights is None:
            raise ValueError("an objective whose targets are those of the source needs the source weights")
        if not run.teacher_weights:  # low-rank updates start at zero
            weights = run.model.encoder.merged(weights[0]), weights[1]
        wanted, images = run.targets_to_compute(self.number), run.images_of(self.program)
        prefix = training_targets.target_prefix(self.program, teacher)
        if wanted is None:
            return OnlineTargets.of(prefix, weights, images)
        context.reporter.advance(0, f"{run.title}  {self.program.phase.name}: computing the targets once")
        with account.clock.span("cache"):
            is_based = activations is not None and run.extends_prefix(self.number)
            base = (self.program.mask.boundary, activations) if is_based and activations else None
            filling = Filling(
                base=base, clock=account.clock, mesh=context.mesh, on_computed=account.add_targets
            )
            found = context.cache.get(prefix, *weights, images, wanted[1], filling)
        if found is None:
            account.settle_targets(0, 0.0, cached=False)
            return OnlineTargets.of(prefix, weights, images)
        account.settle_targets(found.ran, found.seconds, error=found.rounding_error)
        context.reporter.advance(found.ran, run.title)
        return found

    def observe(self, epoch: int, report: StepReport) -> None:
        """Check the loss in a step runner's report, and show the progress of the run.

        Raises:
            PhaseDiverged: The loss is not finite.
        """
        check_loss(report)
        self._epoch_steps += report.steps
        self._epoch_seconds += report.seconds
        run, phase = self.run, self.program.phase
        epoch_of_phase = epoch - run.timeline.first_epoch(self.number) + 1
        doing = f"{run.title}  {phase.name} epoch {epoch_of_phase}/{phase.epochs}"
        speed = report.steps * run.batch_size / max(report.seconds, 1e-9)
        self.context.reporter.advance(report.steps * self._step_work, doing, speed)
        at = {
            "phase": run.tag.label + phase.name,
            "epoch": epoch_of_phase,
            "epochs": phase.epochs,
            "step": report.step,
            "steps": run.timeline.steps,
        }
        done = self.work(report.step) + self.account.fill.flops + self.account.targets.flops
        row = {"key": list(run.row_key(self.number)), "model_flops": done, **self.account.meter.spent()}
        self.context.heartbeat.at(at, row)

    def evaluate(self, report: StepReport) -> dict[str, float]:
        """Return the metrics of the validation rows at the end of an epoch."""
        with self.account.clock.span("eval"):
            return self._evaluator(report.state, report.val_logits)

    def record_epoch(self, epoch: int, report: StepReport, metrics: dict[str, float]) -> None:
        """Add an epoch to the curve and the metrics, and update the schedule `plateau`.

        Args:
            epoch: Index of the epoch in the run.
            report: The runner's last report of the epoch.
            metrics: Metrics of the validation rows.
        """
        trained = report.metrics.compute()
        values = {**trained, "lr": self.plateau.scale * self.program.lr(report.step - 1), **metrics}
        rolled_back = {}
        if self._is_second_attempt and self.rollback and not self.account.curve:
            rolled_back = {"rolled_back_from": self.rollback.step}
        self.account.add_epoch(epoch, {**values, **rolled_back})
        speed = self._epoch_steps * self.run.batch_size / max(self._epoch_seconds, 1e-9)
        self._epoch_steps, self._epoch_seconds = 0, 0.0
        shown = {**values, "images_per_s": speed}
        self.context.heartbeat.epoch(Epoch(*self.run.row_key(self.number), epoch, report.step, shown))
        self._update_plateau(trained["loss"], metrics)

    def _update_plateau(self, loss: float, metrics: dict[str, float]) -> None:
        if self.program.phase.schedule == "plateau":
            self.plateau = self.run.plateau.update(self.plateau, metrics.get("val_loss", loss))

    def reset_sums(self, state: State) -> State:
        """Return the state at the start of an epoch: the sums of loss and weight are zero."""
        zeros = sharding.replicate({"loss": np.float32(0), "weight": np.float32(0)}, self.context.mesh)
        return {**state, **zeros}

    def replay(self, state: State) -> Iterator[State]:
        """Yield the state after each remaining step, without saving or display."""
        self.start(state, fuse=False)
        self.runner.compile(state)
        for epoch in self.epochs_left(state):
            for report in self.runner.epoch(state, epoch, self.plateau.scale, every_step=True):
                state = report.state
                yield state
                last = report
            if self.program.phase.schedule == "plateau":
                self._update_plateau(last.metrics.compute()["loss"], self._evaluator(state))
            state = self.reset_sums(state)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores in addition to the training state, as plain JSON values."""
        return {
            **self.account.state(),
            "data_position": self.runner.data_position(),
            "plateau": self.plateau._asdict(),
            "rollback": dataclasses.asdict(self.rollback) if self.rollback else {},
        }
