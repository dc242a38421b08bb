"""A training step of dapt_jax as its loop runs it, for benchmarks that time it alone."""

import statistics
import time
from typing import Any

import jax
import numpy as np

from dapt_jax.data.augment import Augment
from dapt_jax.models import registry
from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.objectives import Objective
from dapt_jax.training import accounting
from dapt_jax.training import steps as training
from dapt_jax.training.evaluate import logits_of
from dapt_jax.training.optim import Optimizer
from dapt_jax.training.phases import Phase
from dapt_jax.weights import tables

CLASSES = 3
FULL, LAST, FORWARD = STRATEGIES = ("full", "last block", "forward")
TORCH = ("torchvision", "timm")
"""Schemes of `weights.tables` whose names the PyTorch side's networks have."""


def trained_by(model: str, strategy: str) -> tuple[str, ...]:
    """Groups that a strategy trains; `forward` trains none, and is given the head for the sake of a program."""
    groups = registry.build(model).groups
    last = max(number for number, name in enumerate(groups) if "/block" in name)
    return {FULL: ("*",), LAST: (*groups[last:], HEAD), FORWARD: (HEAD,)}[strategy]


def program(model: str, trained: tuple[str, ...], dtype: str = "float32") -> training.PhaseProgram:
    """The program of one phase: Adam, frozen batch norm, no augmentation."""
    network = Classifier(registry.build(model), CLASSES, dtype)
    phase = Phase("phase", 1, trained, 1e-4)
    return training.programs(network, (phase,), Optimizer(), Objective(CLASSES), Augment(), 0, 1)[0]


def torch_names(made: training.PhaseProgram) -> dict[str, str]:
    """What torchvision or timm calls each parameter and statistic of a model."""
    scheme = next(each for each in tables.schemes(made.model.encoder.name) if each.name in TORCH)
    return {path: entry.key for path, entry in tables.table(scheme, made.model).items()}


def model_flops(made: training.PhaseProgram, strategy: str, size: int) -> int:
    """Model FLOPs of one image in a step of a strategy, its prefix not cached."""
    if strategy == FORWARD:
        model = made.model
        return accounting.forward(model, size, len(model.encoder.groups)).model + 2 * model.encoder.features * CLASSES
    cost = accounting.image_cost(made, size)
    return cost.prefix.model + cost.suffix.model


class Step:
    """One compiled step, with a batch of random images."""

    def __init__(self, made: training.PhaseProgram, size: int, batch: int, kind: str = "whole"):
        """Compiles the step and runs it once.

        Args:
            made: what trains.
            size: side of the images in pixels.
            batch: images.
            kind: `whole`, from images; `suffix`, from cached activations at the program's boundary; or `forward`, from
                images to logits.
        """
        params, stats = made.model.init(0)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (batch, size, size, 3)).astype(np.uint8)
        data = {"label": np.arange(batch, dtype=np.int32) % CLASSES, "weight": np.ones(batch, np.float32)}
        rate = np.float32(1e-4)
        function: Any
        if kind == "forward":
            self._state, forward = None, logits_of(made.model, None)
            placed = jax.device_put((params, stats))
            self._run = lambda state: (state, forward(*placed, images))
        else:
            self._state = jax.device_put(made.fresh_state(params, stats))
            if kind == "suffix":
                shape = accounting.boundary_shape(made.model, made.mask.boundary, size)
                function, inputs = made.update, rng.standard_normal((batch, *shape.shape), np.float32)
                arguments: Any = (jax.device_put(inputs.astype(shape.dtype)), data["label"], data["weight"], rate)
            else:
                data |= {"image": images, "index": np.arange(batch, dtype=np.int32)}
                draw = {"seed": np.uint32(0), "view": np.int32(0)}
                function, arguments = made.train_step, (data, draw, rate)
            step = jax.jit(function, donate_argnums=0)
            self._run = lambda state: (step(state, *arguments),) * 2
        self()

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
            times.append(time.perf_counter() - start)
        return statistics.median(times)
