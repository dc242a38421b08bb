"""Where the steps of a phase get their inputs: from images, or from cached activations. One executable each."""

import time
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np

from dapt_jax import parallel
from dapt_jax.cost.clock import Clock
from dapt_jax.data import pipeline
from dapt_jax.models.classifier import HEAD
from dapt_jax.training.features import Activations
from dapt_jax.training.run import Run, Tools
from dapt_jax.training.steps import PhaseProgram, State

SYNC_EVERY_S = 0.5


class Feed(Protocol):
    """Runs the steps of an epoch."""

    def epoch(self, state: State, epoch: int, first_batch: int, scale: float) -> Iterator[tuple[State, int]]:
        """Runs an epoch's batches from one on; yields the state and the batches done since the last yield."""
        ...

    def position(self) -> dict[str, Any]:
        """Where the data are, for a checkpoint."""
        ...


class FromImages:
    """Steps from images that grain reads ahead."""

    def __init__(
        self, run: Run, program: PhaseProgram, tools: Tools, clock: Clock, state: State, position: dict[str, Any]
    ):
        self._clock, self._mesh = clock, tools.mesh
        hosts = {"host": jax.process_index(), "hosts": jax.process_count()}
        self._batches = pipeline.batches(run.dataset, run.order, run.timeline.epochs, threads=tools.threads, **hosts)
        self._batches.set_state(position or {"next_index": int(state["step"])})
        with clock.span("compile"):
            order = run.order.epoch(0)
            rows = order[0][0][: run.batch_size // hosts["hosts"]]
            example = {
                "image": np.zeros((len(rows), *run.dataset.images.batch(rows[:1]).shape[1:]), np.uint8),
                "label": pipeline.device_labels(run.dataset)[rows],
                "weight": np.ones(len(rows), np.float32),
                "index": rows,
                "epoch": np.int32(0),
            }
            step = jax.jit(program.train_step, donate_argnums=0)
            batch = parallel.split(example, self._mesh)
            self._step = step.lower(state, batch, np.float32(1)).compile()
        self._steps = run.timeline.steps_per_epoch

    def epoch(self, state: State, epoch: int, first_batch: int, scale: float) -> Iterator[tuple[State, int]]:
        """See `Feed`; the device works on a batch while the next one is read."""
        done, synced = 0, time.monotonic()
        for number in range(first_batch, self._steps):
            with self._clock.span("data"):
                batch = next(self._batches)
            if int(batch["epoch"]) != epoch:
                raise RuntimeError(f"the data are in epoch {int(batch['epoch'])}, the run in epoch {epoch}")
            with self._clock.span("train"):
                state = self._step(state, parallel.split(batch, self._mesh), np.float32(scale))
                done += 1
                is_last = number + 1 == self._steps
                if is_last or time.monotonic() - synced > SYNC_EVERY_S:
                    jax.block_until_ready(state["step"])
            if is_last or time.monotonic() - synced > SYNC_EVERY_S:
                yield state, done
                done, synced = 0, time.monotonic()

    def position(self) -> dict[str, Any]:
        """The state of grain's iterator."""
        return self._batches.get_state()


class FromCache:
    """Steps from activations that are on the device; a head on pooled features runs a whole epoch as one program."""

    def __init__(
        self, run: Run, program: PhaseProgram, tools: Tools, clock: Clock, state: State, activations: Activations
    ):
        self._clock, self._mesh, self._order = clock, tools.mesh, run.order
        self._whole = all(path.startswith(f"{HEAD}/") for path in program.mask.trainable)
        labels = pipeline.device_labels(run.dataset)
        self._cache = parallel.replicate({"x": activations.x, "label": labels}, self._mesh)
        function = program.cached_epoch if self._whole else program.cached_step
        with clock.span("compile"):
            step = jax.jit(function, donate_argnums=0)
            self._step = step.lower(state, self._cache, self._batch(0, 0), np.float32(1)).compile()

    def _batch(self, epoch: int, number: int) -> dict[str, Any]:
        indices, weights = self._order.epoch(epoch)
        if not self._whole:
            indices, weights = indices[number], weights[number]
        batch = {"index": indices, "weight": weights, "epoch": np.int32(epoch)}
        return parallel.split(batch, self._mesh, axis=int(self._whole))

    def epoch(self, state: State, epoch: int, first_batch: int, scale: float) -> Iterator[tuple[State, int]]:
        """See `Feed`."""
        steps = self._order.steps_per_epoch
        stride = steps if self._whole else 1
        if first_batch % stride:
            raise RuntimeError("a checkpoint inside an epoch that runs as one program")
        done, synced = 0, time.monotonic()
        for number in range(first_batch, steps, stride):
            with self._clock.span("train"):
                state = self._step(state, self._cache, self._batch(epoch, number), np.float32(scale))
                done += stride
                is_due = number + stride == steps or time.monotonic() - synced > SYNC_EVERY_S
                if is_due:
                    jax.block_until_ready(state["step"])
            if is_due:
                yield state, done
                done, synced = 0, time.monotonic()

    def position(self) -> dict[str, Any]:
        """Nothing: the step says it."""
        return {}
