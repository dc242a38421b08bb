"""A training step of dapt_jax as its loop runs it, for benchmarks that time it alone."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dapt_jax.data.augment import Augment
from dapt_jax.data.mix import Mix
from dapt_jax.losses.cross_entropy import CrossEntropy
from dapt_jax.models import registry
from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.training import accounting, steps
from dapt_jax.training.evaluate import forward_fn
from dapt_jax.training.optim import Optimizer
from dapt_jax.training.phases import Phase
from dapt_jax.training.steps import PhaseProgram
from dapt_jax.weights import tables

CLASSES = 3
FULL, LAST, FORWARD = STRATEGIES = ("full", "last block", "forward")
TORCH = ("torchvision", "timm")
"""Schemes of `weights.tables` whose names the PyTorch side's networks have."""
HEAD_STEPS = 64
"""Steps of a head on pooled features that run as one program."""
DRAW: dict[str, Any] = {"seed": np.uint32(0), "view": np.int32(0)}
LR = np.float32(1e-4)


def trained_by(model: str, strategy: str) -> tuple[str, ...]:
    """Groups that a strategy trains; `forward` trains none, and is given the head for the sake of a program."""
    groups = registry.build(model).groups
    last = max(number for number, name in enumerate(groups) if "block" in name)
    return {FULL: ("*",), LAST: (*groups[last:], HEAD), FORWARD: (HEAD,)}[strategy]


def program(model: str, trained: tuple[str, ...], dtype: str = "float32") -> PhaseProgram:
    """The program of one phase: Adam, frozen batch norm, no augmentation."""
    network = Classifier(registry.build(model), CLASSES, dtype)
    phase = Phase("phase", 1, trained, 1e-4)
    return steps.programs(
        network,
        (phase,),
        optimizer=Optimizer(),
        loss=CrossEntropy(CLASSES),
        augment=Augment(),
        mix=Mix(),
        seed=0,
        steps_per_epoch=1,
    )[0]


def torch_names(made: PhaseProgram) -> dict[str, str]:
    """What torchvision or timm calls each parameter and statistic of a model."""
    scheme = next(each for each in tables.schemes(made.model.encoder.name) if each.name in TORCH)
    return {path: entry.key for path, entry in tables.table(scheme, made.model).items()}


def model_flops(made: PhaseProgram, strategy: str, size: int) -> int:
    """Model FLOPs of one image in a step of a strategy, its prefix not cached."""
    if strategy == FORWARD:
        model = made.model
        return (
            accounting.forward(model, size, len(model.encoder.groups)).model
            + 2 * model.encoder.features * CLASSES
        )
    cost = accounting.image_cost(made, size)
    return cost.prefix.model + cost.suffix.model


class Step:
    """One compiled step, with a batch of random images."""

    def __init__(self, made: PhaseProgram, size: int, batch: int, kind: str = "whole"):
        """Compiles the step and runs it once.

        Args:
            made: what trains.
            size: side of the images in pixels.
            batch: images.
            kind: `whole`, from images; `cached`, from activations at the program's boundary as the loop keeps
                them (a head on pooled features runs many steps as one program); or `forward`, from images to
                logits.
        """
        self._steps, self._compiled, self.compile_s = 1, None, 0.0
        params, batch_stats = made.model.init(0)
        self._state = jax.device_put(made.init_state(params, batch_stats))
        if kind == "forward":
            images, placed, forward = (
                _images(batch, size),
                jax.device_put((params, batch_stats)),
                forward_fn(made.model, None),
            )
            self._run: Callable[[Any], Any] = lambda state: (state, forward(*placed, images))
        else:
            function, arguments = (
                self._cached(made, size, batch) if kind == "cached" else _whole(made, size, batch)
            )
            lowered = jax.jit(function, donate_argnums=0).lower(self._state, *arguments)
            start = time.perf_counter()
            step = lowered.compile()
            self.compile_s = time.perf_counter() - start
            self._compiled = step
            self._run = lambda state: _pair(step(state, *arguments))
        self()

    def memory_bytes(self) -> int:
        """Return the peak memory of the compiled step by XLA's buffer assignment; 0 where the backend does not say."""
        return memory_of(self._compiled)

    def donates(self) -> bool:
        """Return whether a step reuses the buffers of the state that it is given: no second copy exists."""
        before = jax.tree.leaves(self._state)
        self()
        return all(leaf.is_deleted() for leaf in before if isinstance(leaf, jax.Array))

    def _cached(self, made: PhaseProgram, size: int, batch: int) -> tuple[Any, tuple[Any, ...]]:
        shape = accounting.boundary_shape(made.model, made.mask.boundary, size)
        rows = 4 * batch
        x = np.random.default_rng(0).standard_normal((1, rows, *shape.shape), np.float32).astype(shape.dtype)
        cache = jax.device_put({"x": x, "label": np.arange(rows, dtype=np.int32) % CLASSES})
        index, weight = np.arange(batch, dtype=np.int32), np.ones(batch, np.float32)
        if not all(path.startswith(f"{HEAD}/") for path in made.mask.trainable):
            return made.cached_step, (cache, {"index": index, "weight": weight}, DRAW, LR)
        self._steps = HEAD_STEPS
        work = {
            "epochs": np.int32(1),
            "steps": np.int32(HEAD_STEPS),
            "first": np.int32(0),
            "seed": np.uint32(0),
            "view": np.zeros(1, np.int32),
            "lr": np.full((1, HEAD_STEPS), LR),
            "index": np.tile(index, (1, HEAD_STEPS, 1)),
            "weight": np.tile(weight, (1, HEAD_STEPS, 1)),
        }
        return made.cached_epochs, (cache | {"validation": cache["x"][0, :1]}, work)

    def __call__(self) -> None:
        """Runs the step to its end."""
        self._state, result = self._run(self._state)
        jax.block_until_ready(result)

    def seconds(self, steps: int) -> float:
        """Median time of some steps."""
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            self()
            times.append((time.perf_counter() - start) / self._steps)
        return statistics.median(times)


def memory_of(compiled: Any) -> int:
    """Peak memory of a compiled program by XLA's buffer assignment; 0 where the backend does not say."""
    said = compiled.memory_analysis() if compiled else None
    if said is None:
        return 0
    held = said.argument_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    return held + said.temp_size_in_bytes


def _pair(result: Any) -> tuple[Any, Any]:
    """The state after a step, and all of what the step gives."""
    return (result[0] if isinstance(result, tuple) else result), result


def _images(batch: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3)).astype(np.uint8)


def _whole(made: PhaseProgram, size: int, batch: int) -> tuple[Any, tuple[Any, ...]]:
    index = np.arange(batch, dtype=np.int32)
    data = {
        "image": _images(batch, size),
        "label": index % CLASSES,
        "weight": np.ones(batch, np.float32),
        "index": index,
    }
    return made.train_step, (data, DRAW, LR)
