"""Step runners: the steps of an epoch from images, from cached activations, or fused for a head."""

import collections
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.typing import ArrayLike

from dapt_jax.cost.clock import Clock
from dapt_jax.data import pipeline
from dapt_jax.models.classifier import HEAD
from dapt_jax.objectives import Objective
from dapt_jax.runtime import processes, sharding
from dapt_jax.training import image_batches
from dapt_jax.training.cache.prefix import Activations, DeviceActivations
from dapt_jax.training.context import RunContext
from dapt_jax.training.epoch_metrics import EpochMetrics
from dapt_jax.training.run import TrainingRun
from dapt_jax.training.steps import PhaseProgram, State

MAX_FUSED_EPOCHS = 64
"""Epochs of a head that one program may run: bounds what is uploaded for it, not what is compiled."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """Periodic report of a step runner, once the device has finished the submitted steps.

    Attributes:
        state: State after `step`, or after a later step where the runner is ahead; it must then not be saved.
        step: Finished steps of the run.
        steps: Steps since the previous report.
        seconds: Wall time since the previous report.
        metrics: Metrics of the training rows over the epoch so far.
        val_logits: Logits of the validation rows after `step`, float32 [v, ...], where the runner computes
            them too.
    """

    state: State
    step: int
    steps: int
    seconds: float
    metrics: EpochMetrics
    val_logits: np.ndarray | None = None

    @property
    def is_ahead(self) -> bool:
        """Whether the state is that of a later step."""
        return int(self.state["step"]) != self.step


@runtime_checkable
class StepRunner(Protocol):
    """Runs the steps of an epoch."""

    def compile(self, state: State) -> None:
        """Compile the steps for a state of the phase; called once, before the first epoch."""
        ...

    def epoch(
        self, state: State, epoch: int, lr_scale: float, every_step: bool = False
    ) -> Iterator[StepReport]:
        """Run the remaining steps of an epoch, and report about twice a second and at its end.

        Args:
            state: State before them; its step gives the position in the epoch.
            epoch: Index of the epoch in the run.
            lr_scale: Factor on the learning rate.
            every_step: Report after every step.
        """
        ...

    def data_position(self) -> dict[str, Any]:
        """Return the data position for a checkpoint; empty where the step determines it."""
        ...


@dataclasses.dataclass(frozen=True)
class RunnerSetup:
    """Inputs of every step runner.

    Attributes:
        run: The run.
        program: Program of its phase.
        context: Surroundings.
        clock: Clock of the phase.
        first_step: Step of the run that is run first.
        data_position: Data position of an earlier runner to resume from; or empty.
    """

    run: TrainingRun
    program: PhaseProgram
    context: RunContext
    clock: Clock
    first_step: int
    data_position: dict[str, Any]


def choose(
    setup: RunnerSetup,
    activations: Activations | None,
    clean: Activations | None,
    targets: Activations | None = None,
    *,
    fuse: bool = True,
) -> StepRunner:
    """Return the fastest applicable step runner of a phase.

    Args:
        setup: Inputs of the runner.
        activations: Cached activations at the phase's boundary; None to start from images.
        clean: The same without augmentation, for the validation rows.
        targets: A teacher's outputs; None for a loss without.
        fuse: Whether many steps may run as one program.
    """
    if not isinstance(activations, DeviceActivations) or not isinstance(targets, DeviceActivations | None):
        return ImageSteps(setup, activations, targets)
    # Fused epochs are whole ones. A run goes on inside an epoch where its activations were not cached before.
    is_whole = setup.first_step % setup.run.steps_per_epoch == 0
    if fuse and is_whole and isinstance(clean, DeviceActivations) and FusedEpochs.applies(setup.program):
        return FusedEpochs(setup, activations, clean)
    return CachedSteps(setup, activations, targets)


class _Steps:
    """One program per step; the device works on a step while the arguments of the next one are prepared."""

    _step: Any

    def __init__(self, setup: RunnerSetup):
        self._run, self._program, self._context, self._clock = (
            setup.run,
            setup.program,
            setup.context,
            setup.clock,
        )
        self._mesh, self._steps = setup.context.mesh, setup.run.steps_per_epoch

    def _arguments(self, epoch: int, number: int, lr_scale: float) -> tuple[Any, ...]:
        """Return the arguments of a step besides the state."""
        raise NotImplementedError

    def _lr(self, epoch: int, number: int, lr_scale: float) -> np.float32:
        return np.float32(lr_scale * self._program.lr(epoch * self._steps + number))

    def epoch(
        self, state: State, epoch: int, lr_scale: float, every_step: bool = False
    ) -> Iterator[StepReport]:
        """Run the remaining steps of an epoch: see `StepRunner`."""
        first = int(state["step"]) - epoch * self._steps
        handler = self._context.preemption_handler
        done, since, next_sync = 0, time.monotonic(), first + 1
        for number in range(first, self._steps):
            self._context.profiler.before(epoch * self._steps + number + 1, state)
            arguments = self._arguments(epoch, number, lr_scale)
            with self._clock.span("train"):
                state = self._step(state, *arguments)
                done += 1
                is_stopping = bool(handler.signal_received) and not processes.is_multi_process()
                is_due = every_step or is_stopping or number + 1 >= min(self._steps, next_sync)
                if is_due:
                    jax.block_until_ready(state["step"])
            if is_due:
                seconds = time.monotonic() - since
                steps = max(1, int(self._context.sync_every_s / max(seconds / done, 1e-9)))
                next_sync = number + 1 + processes.all_reduce_max(steps)[0]
                metrics = _epoch_metrics(state["loss"], state["weight"])
                yield StepReport(state, int(state["step"]), done, seconds, metrics)
                done, since = 0, time.monotonic()


class ImageSteps(_Steps):
    """Steps from batches prefetched by grain: images, or cached activations on disk."""

    def __init__(
        self,
        setup: RunnerSetup,
        activations: Activations | None = None,
        targets: Activations | None = None,
    ):
        """Start reading.

        Args:
            setup: The run and its surroundings.
            activations: Cached activations at the phase's boundary; None to read images.
            targets: A teacher's outputs; None for a loss without.
        """
        super().__init__(setup)
        run, program = setup.run, setup.program
        self._own = sharding.local_slice(run.batch_size, self._mesh)
        self._function = program.activation_step if activations else program.train_step

        self._read = read = image_batches.reader(run, program, activations, targets)
        self._batches = pipeline.batches(
            run.dataset,
            run.order,
            run.timeline.epochs,
            read=read,
            labels=run.labels,
            threads=self._context.threads,
            share=self._own,
        )
        self._batches.set_state(setup.data_position or {"next_index": setup.first_step})

    def compile(self, state: State) -> None:
        """Compile the step for a batch of the first rows."""
        program = self._program
        with self._clock.span("compile"):
            arguments = image_batches.first_arguments(self._run, program, self._mesh, self._read)
            self._step = self._context.compiled(program.key, self._function, state, *arguments)

    def _arguments(self, epoch: int, number: int, lr_scale: float) -> tuple[Any, ...]:
        """Return the next batch, the random seed data, and the learning rate."""
        with self._clock.span("data"):
            batch = next(self._batches)
        if int(batch.pop("epoch")) != epoch:
            raise RuntimeError(f"the data are not in epoch {epoch}, where the run is")
        lr = self._lr(epoch, number, lr_scale)
        with self._clock.span("train"):
            return (
                sharding.shard_batch(batch, self._mesh),
                image_batches.rng_context(self._program, epoch),
                lr,
            )

    def data_position(self) -> dict[str, Any]:
        """Return the state of grain's iterator."""
        return self._batches.get_state()


class CachedSteps(_Steps):
    """Steps from activations that are on the device."""

    def __init__(
        self, setup: RunnerSetup, activations: DeviceActivations, targets: DeviceActivations | None = None
    ):
        """Put the labels beside the activations.

        Args:
            setup: The run and its surroundings.
            activations: Cached activations at the phase's boundary.
            targets: A teacher's outputs; None for a loss without.
        """
        super().__init__(setup)
        self._activations, self._order = activations, setup.run.order
        labels = sharding.replicate(setup.run.labels, self._mesh)
        self._cache = {"x": activations.x, "label": labels} | ({"target": targets.x} if targets else {})

    def compile(self, state: State) -> None:
        """Compile the step for the first batch of the phase."""
        program = self._program
        with self._clock.span("compile"):
            example = self._arguments(program.first_step // program.steps_per_epoch, 0, 1.0)
            self._step = self._context.compiled(program.key, program.cached_step, state, *example)

    def _arguments(self, epoch: int, number: int, lr_scale: float) -> tuple[Any, ...]:
        """Return the cache, the rows of a batch, the random seed data, and the learning rate."""
        indices, weights = self._order.epoch(epoch)
        views = self._activations.views
        rng = {
            name: np.int32(value % views) if name in ("view", "other_view") else value
            for name, value in image_batches.rng_context(self._program, epoch).items()
        }
        with self._clock.span("train"):
            own = sharding.local_slice(indices.shape[1], self._mesh)
            rows = {"index": indices[number, own], "weight": weights[number, own]}
            if self._program.is_paired:
                rows["other"] = self._run.partners(epoch)[rows["index"]]
            batch = sharding.shard_batch(rows, self._mesh)
        return self._cache, batch, rng, self._lr(epoch, number, lr_scale)

    def data_position(self) -> dict[str, Any]:
        """Return an empty dict: the step determines the position."""
        return {}


class FusedEpochs:
    """Epochs of a head on features that are on the device: many, with their evaluation, as one program.

    The number of epochs per call follows from the duration of the last ones, and is one where a callback
    needs the state after every epoch. It changes neither the program nor any bit of the result, since each
    epoch is the same iteration of one loop. The epochs of one call are reported one by one, all with the
    state after the last of them.
    """

    def __init__(self, setup: RunnerSetup, activations: DeviceActivations, clean: DeviceActivations):
        """Put labels and validation rows beside the features.

        Args:
            setup: The run and its surroundings.
            activations: Cached features of all images.
            clean: The same without augmentation.
        """
        run, program, context = setup.run, setup.program, setup.context
        self._program, self._context, self._clock, self._order = program, context, setup.clock, run.order
        self._activations, self._mesh = activations, context.mesh
        self._size = min(MAX_FUSED_EPOCHS, program.phase.epochs)
        self._end = program.first_step // program.steps_per_epoch + program.phase.epochs
        self._val_rows, self._padded_steps = len(run.val_rows), run.padded_steps
        self._at_once, self._reports = 1, collections.deque[StepReport]()
        self._one_by_one = bool(context.callbacks) or program.phase.schedule == "plateau"
        self._cache = {
            "x": activations.x,
            "label": sharding.replicate(run.dataset.targets, self._mesh),
            "validation": jax.tree.map(lambda leaf: leaf[0, run.padded_val_rows], clean.x),
        }

    def compile(self, state: State) -> None:
        """Compile the program for as many epochs as it may run at once."""
        program = self._program
        with self._clock.span("compile"):
            example = self._work(program.first_step // program.steps_per_epoch, 1, 1.0)
            self._fused = self._context.compiled(
                program.key, program.cached_epochs, state, self._cache, example
            )

    @staticmethod
    def applies(program: PhaseProgram) -> bool:
        """Return whether a phase trains nothing but a classifier's head."""
        if isinstance(program.objective, Objective):
            return False
        is_head_alone = all(path.startswith(f"{HEAD}/") for path in program.mask.trainable)
        return is_head_alone and not program.mask.batch_norm_modes

    def epoch(
        self, state: State, epoch: int, lr_scale: float, every_step: bool = False
    ) -> Iterator[StepReport]:
        """Report an epoch, once: see `StepRunner`."""
        del every_step
        if not self._reports:
            self._run_some(state, epoch, lr_scale)
        yield self._reports.popleft()

    def _run_some(self, state: State, first: int, lr_scale: float) -> None:
        """Run some epochs as one program."""
        # The same number in all processes, as `_at_once` is.
        count = min(1 if self._one_by_one else self._at_once, self._end - first, self._size)
        start = time.monotonic()
        with self._clock.span("train"):
            state, sums, logits = self._fused(state, self._cache, self._work(first, count, lr_scale))
            sums, logits = np.asarray(sums)[:count], np.asarray(logits)[:count, : self._val_rows]
        seconds = (time.monotonic() - start) / count
        fitting = int(2 * self._context.sync_every_s / max(seconds, 1e-9))
        (self._at_once,) = processes.all_reduce_max(max(1, min(self._size, 2 * count, fitting)))
        steps = self._order.steps_per_epoch
        for number, ((loss, weight), each) in enumerate(zip(sums, logits, strict=True), start=first):
            step = (number + 1) * steps
            self._reports.append(StepReport(state, step, steps, seconds, _epoch_metrics(loss, weight), each))

    def _work(self, first: int, count: int, lr_scale: float) -> dict[str, Any]:
        """Return the arguments of the program for `count` epochs from `first` on, padded to one shape."""
        program, steps = self._program, self._order.steps_per_epoch
        epochs = range(first, first + count)
        orders = [self._order.epoch(epoch) for epoch in epochs]
        lrs = [[lr_scale * program.lr(epoch * steps + number) for number in range(steps)] for epoch in epochs]
        views = [_cached_view(program, epoch, self._activations) for epoch in epochs]
        own = sharding.local_slice(orders[0][0].shape[1], self._mesh)
        work = {
            "index": np.stack([index[:, own] for index, _ in orders]),
            "weight": np.stack([weight[:, own] for _, weight in orders]),
            "view": np.asarray(views, np.int32),
            "lr": np.asarray(lrs, np.float32),
        }
        unused = [(0, self._size - count), (0, self._padded_steps - steps)]
        padded = {name: np.pad(values, [*unused, (0, 0)][: values.ndim]) for name, values in work.items()}
        counts = {"epochs": np.int32(count), "steps": np.int32(steps), "first": np.int32(first)}
        return sharding.shard_batch({**padded, **counts, **image_batches.seeds(program)}, self._mesh, axis=2)

    def data_position(self) -> dict[str, Any]:
        """Return an empty dict: the step determines the position."""
        return {}


def _epoch_metrics(loss: ArrayLike, weight: ArrayLike) -> EpochMetrics:
    """Return the metrics of an epoch from its sums of loss and weight, over all devices."""
    found: EpochMetrics = EpochMetrics.single_from_model_output(loss_sum=loss, weight_sum=weight)
    return found


def _cached_view(program: PhaseProgram, epoch: int, activations: Activations) -> int:
    """Return the index of the cached view that an epoch sees."""
    return program.view(epoch) % activations.views
