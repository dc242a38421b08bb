"""Where the steps of a phase get their inputs: read ahead from images or files, or from activations on the device."""

import time
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np

from dapt_jax.cost.clock import Clock
from dapt_jax.data import pipeline
from dapt_jax.models.classifier import HEAD
from dapt_jax.runtime import processes, sharding
from dapt_jax.training.cache.store import Activations
from dapt_jax.training.run import Run, RunContext
from dapt_jax.training.steps import PhaseProgram, State

SYNC_EVERY_S = 0.5
"""Seconds between two moments at which the device is waited for; all processes come to them after the same step."""
MOST_EPOCHS = 64
"""Epochs of a head that one program may run: bounds what is uploaded for it, not what is compiled."""


def _draw(program: PhaseProgram, epoch: int) -> dict[str, Any]:
    return {"seed": np.uint32(program.seed), "view": np.int32(program.view(epoch)), "epoch": np.int32(epoch)}


class Feed(Protocol):
    """Runs the steps of an epoch."""

    def epoch(
        self, state: State, epoch: int, first_batch: int, scale: float, each: bool = False
    ) -> Iterator[tuple[State, int]]:
        """Runs an epoch's batches from one on; yields the state and the batches done since the last yield.

        Args:
            state: before them.
            epoch: of the run.
            first_batch: of the epoch.
            scale: of the learning rate.
            each: yield after each batch, not only now and then.
        """
        ...

    def position(self) -> dict[str, Any]:
        """Where the data are, for a checkpoint."""
        ...


class _StepByStep:
    """One program per step; the device works on a step while the arguments of the next one are made ready."""

    _clock: Clock
    _step: Any
    _steps: int
    _context: RunContext

    def _arguments(self, epoch: int, number: int, scale: float) -> tuple[Any, ...]:
        """What a step takes beside the state."""
        raise NotImplementedError

    def epoch(
        self, state: State, epoch: int, first_batch: int, scale: float, each: bool = False
    ) -> Iterator[tuple[State, int]]:
        """See `Feed`."""
        done, synced, until = 0, time.monotonic(), first_batch + 1
        for number in range(first_batch, self._steps):
            self._context.profiler.before(epoch * self._steps + number + 1, state)
            arguments = self._arguments(epoch, number, scale)
            with self._clock.span("train"):
                state = self._step(state, *arguments)
                done += 1
                is_told = each or (
                    bool(self._context.preemption_handler.signal_received) and not processes.is_multi_process()
                )
                is_due = is_told or number + 1 == self._steps or number + 1 >= until
                if is_due:
                    jax.block_until_ready(state["step"])
            if is_due:
                pace = (time.monotonic() - synced) / done
                until = number + 1 + processes.all_reduce_max(max(1, int(SYNC_EVERY_S / max(pace, 1e-9))))[0]
                yield state, done
                done, synced = 0, time.monotonic()


class Streamed(_StepByStep):
    """Steps from batches that grain reads ahead: images, or cached activations that are on disk."""

    def __init__(
        self,
        run: Run,
        program: PhaseProgram,
        context: RunContext,
        clock: Clock,
        state: State,
        position: dict[str, Any],
        activations: Activations | None = None,
    ):
        self._clock, self._mesh, self._context = clock, context.mesh, context
        own = sharding.local_slice(run.batch_size, context.mesh)

        def read(epoch: int, rows: np.ndarray) -> dict[str, Any]:
            if activations is None:
                return {"image": run.dataset.images.batch(rows)}
            return {"x": activations.rows(_stored_view(program, epoch, activations), rows)}

        self._batches = pipeline.batches(
            run.dataset,
            run.order,
            run.timeline.epochs,
            read=read,
            threads=context.threads,
            share=own,
        )
        self._batches.set_state(position or {"next_index": int(state["step"])})
        with clock.span("compile"):
            rows = run.order.epoch(0)[0][0][own]
            example = {
                **read(program.first_step // program.steps_per_epoch, rows),
                "label": run.dataset.targets[rows],
                "weight": np.ones(len(rows), np.float32),
                "index": rows,
            }
            arguments = sharding.shard_batch(example, self._mesh), _draw(program, 0), np.float32(1)
            function = program.activation_step if activations else program.train_step
            self._step = context.compiled(program.key, function, state, *arguments)
        self._program, self._steps = program, run.timeline.steps_per_epoch

    def _arguments(self, epoch: int, number: int, scale: float) -> tuple[Any, ...]:
        """The next batch, draw and rate."""
        with self._clock.span("data"):
            batch = next(self._batches)
        if int(batch.pop("epoch")) != epoch:
            raise RuntimeError(f"the data are not in epoch {epoch}, where the run is")
        rate = scale * self._program.rate(epoch * self._steps + number)
        with self._clock.span("train"):
            return sharding.shard_batch(batch, self._mesh), _draw(self._program, epoch), np.float32(rate)

    def position(self) -> dict[str, Any]:
        """The state of grain's iterator."""
        return self._batches.get_state()


class OnDevice(_StepByStep):
    """Steps from activations that are on the device."""

    def __init__(
        self, run: Run, program: PhaseProgram, context: RunContext, clock: Clock, state: State, activations: Activations
    ):
        self._clock, self._mesh, self._order, self._context = clock, context.mesh, run.order, context
        self._activations, self._program = activations, program
        labels = run.dataset.targets
        self._cache = {"x": activations.x, "label": sharding.replicate(labels, self._mesh)}
        with clock.span("compile"):
            example = self._arguments(program.first_step // program.steps_per_epoch, 0, 1.0)
            self._step = context.compiled(program.key, program.cached_step, state, *example)
        self._steps = run.timeline.steps_per_epoch

    def _arguments(self, epoch: int, number: int, scale: float) -> tuple[Any, ...]:
        """Cache, batch, draw and rate of a step."""
        indices, weights = self._order.epoch(epoch)
        draw = {**_draw(self._program, epoch), "view": np.int32(_stored_view(self._program, epoch, self._activations))}
        with self._clock.span("train"):
            own = sharding.local_slice(indices.shape[1], self._mesh)
            batch = sharding.shard_batch({"index": indices[number, own], "weight": weights[number, own]}, self._mesh)
        rate = scale * self._program.rate(epoch * len(indices) + number)
        return self._cache, batch, draw, np.float32(rate)

    def position(self) -> dict[str, Any]:
        """Nothing: the step says it."""
        return {}


class Epochs:
    """A head on pooled features that are on the device: many epochs, and their evaluation, as one program.

    How many are run at once follows from how long the last ones took; it changes neither the program nor a bit of the
    result, since each epoch is the same iteration of one loop.
    """

    def __init__(
        self,
        run: Run,
        program: PhaseProgram,
        context: RunContext,
        clock: Clock,
        state: State,
        activations: Activations,
        clean: Activations,
    ):
        self._clock, self._mesh, self._order = clock, context.mesh, run.order
        self._activations, self._program = activations, program
        self._most = min(MOST_EPOCHS, program.phase.epochs)
        self._at_once = 1
        self._cache = {
            "x": activations.x,
            "label": sharding.replicate(run.dataset.targets, self._mesh),
            "watched": jax.tree.map(lambda leaf: leaf[0, run.val_rows], clean.x),
        }
        with clock.span("compile"):
            example = self._work(program.first_step // program.steps_per_epoch, 1, 1.0)
            self._run = context.compiled(program.key, program.cached_epochs, state, self._cache, example)

    @staticmethod
    def serve(program: PhaseProgram, activations: Activations) -> bool:
        """Whether nothing but the head trains, on features that are on the device."""
        is_head_alone = all(path.startswith(f"{HEAD}/") for path in program.mask.trainable)
        return is_head_alone and not program.mask.batch_norm_modes and activations.file is None

    def _work(self, first: int, count: int, scale: float) -> dict[str, Any]:
        """What the program is told of `count` epochs from `first` on."""
        program, steps = self._program, self._order.steps_per_epoch
        orders = [self._order.epoch(epoch) for epoch in range(first, first + count)]
        rates = [
            [scale * program.rate(epoch * steps + n) for n in range(steps)] for epoch in range(first, first + count)
        ]
        views = [_stored_view(program, epoch, self._activations) for epoch in range(first, first + count)]
        own = sharding.local_slice(orders[0][0].shape[1], self._mesh)
        work = {
            "index": np.stack([index[:, own] for index, _ in orders]),
            "weight": np.stack([weight[:, own] for _, weight in orders]),
            "view": np.asarray(views, np.int32),
            "rate": np.asarray(rates, np.float32),
        }
        padded = {
            name: np.pad(values, [(0, self._most - count), *[(0, 0)] * (values.ndim - 1)])
            for name, values in work.items()
        }
        return sharding.shard_batch(
            {**padded, "epochs": np.int32(count), "first": np.int32(first), "seed": np.uint32(program.seed)},
            self._mesh,
            axis=2,
        )

    def epochs(self, state: State, first: int, most: int, scale: float) -> tuple[State, np.ndarray, np.ndarray]:
        """Runs some epochs.

        Args:
            state: before them.
            first: the first one's number.
            most: how many there may be.
            scale: of the learning rate.

        Returns:
            The state; per epoch the sums of loss and weight, float32 [k, 2]; and the logits of the run's validation
            rows, float32 [k, v, outputs].
        """
        count = min(self._at_once, most, self._most)  # the same in all processes, as `_at_once` is
        start = time.monotonic()
        with self._clock.span("train"):
            state, sums, logits = self._run(state, self._cache, self._work(first, count, scale))
            sums, logits = np.asarray(sums)[:count], np.asarray(logits)[:count]
        each = (time.monotonic() - start) / count
        (self._at_once,) = processes.all_reduce_max(
            max(1, min(self._most, 2 * count, int(2 * SYNC_EVERY_S / max(each, 1e-9))))
        )
        return state, sums, logits

    def position(self) -> dict[str, Any]:
        """Nothing: the step says it."""
        return {}


def _stored_view(program: PhaseProgram, epoch: int, activations: Activations) -> int:
    """Which of the views that are kept an epoch sees."""
    return program.view(epoch) % activations.views
