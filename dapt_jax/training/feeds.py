"""Where the steps of a phase get their inputs: from images, or from cached activations. One executable each."""

import time
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

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


def _draw(program: PhaseProgram, epoch: int) -> dict[str, Any]:
    return {"seed": np.uint32(program.seed), "view": np.int32(program.view(epoch))}


@runtime_checkable
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
            }
            arguments = parallel.split(example, self._mesh), _draw(program, 0), np.float32(1)
            self._step = tools.compiled(program.key, program.train_step, state, *arguments)
        self._program, self._steps = program, run.timeline.steps_per_epoch

    def epoch(self, state: State, epoch: int, first_batch: int, scale: float) -> Iterator[tuple[State, int]]:
        """See `Feed`; the device works on a batch while the next one is read."""
        done, synced = 0, time.monotonic()
        for number in range(first_batch, self._steps):
            with self._clock.span("data"):
                batch = next(self._batches)
            if int(batch.pop("epoch")) != epoch:
                raise RuntimeError(f"the data are not in epoch {epoch}, where the run is")
            rate = scale * self._program.rate(epoch * self._steps + number)
            with self._clock.span("train"):
                draw = _draw(self._program, epoch)
                state = self._step(state, parallel.split(batch, self._mesh), draw, np.float32(rate))
                done += 1
                is_due = number + 1 == self._steps or time.monotonic() - synced > SYNC_EVERY_S
                if is_due:
                    jax.block_until_ready(state["step"])
            if is_due:
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
        self._program = program
        function = program.cached_epoch if self._whole else program.cached_step
        with clock.span("compile"):
            example = self._arguments(program.first_step // program.steps_per_epoch, 0, 1.0)
            self._step = tools.compiled(program.key, function, state, self._cache, *example)

    def _arguments(self, epoch: int, number: int, scale: float) -> tuple[Any, ...]:
        """Batch, draw and rate of one call: of one step, or of all the steps of an epoch."""
        indices, weights = self._order.epoch(epoch)
        first = epoch * len(indices)
        draw = _draw(self._program, epoch)
        draw["view"] %= self._cache["x"].shape[0]
        if self._whole:
            rates = [scale * self._program.rate(first + step) for step in range(len(indices))]
            batch = parallel.split({"index": indices, "weight": weights}, self._mesh, axis=1)
            return batch, draw, np.asarray(rates, np.float32)
        batch = parallel.split({"index": indices[number], "weight": weights[number]}, self._mesh)
        return batch, draw, np.float32(scale * self._program.rate(first + number))

    def epoch(self, state: State, epoch: int, first_batch: int, scale: float) -> Iterator[tuple[State, int]]:
        """See `Feed`."""
        steps = self._order.steps_per_epoch
        stride = steps if self._whole else 1
        if first_batch % stride:
            raise RuntimeError("a checkpoint inside an epoch that runs as one program")
        done, synced = 0, time.monotonic()
        for number in range(first_batch, steps, stride):
            with self._clock.span("train"):
                state = self._step(state, self._cache, *self._arguments(epoch, number, scale))
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
