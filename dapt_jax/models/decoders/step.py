"""Decoders as ordered steps: what they read of the encoder's maps, and what they leave for later steps."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from dapt_jax.models.encoder import NormMode, Tree


@dataclasses.dataclass(frozen=True)
class Step:
    """One named layer group of a decoder.

    Attributes:
        name: slash-separated, the leading part of the paths of its parameters.
        build: makes its nnx module, which is called as `module(x, skips, norm)`: the output of the step before (of the
            encoder, for the first), and the maps named by `skips`.
        skips: names of levels of the encoder, or of what earlier steps emit.
        emits: name under which later steps may read its output.
        has_input: whether it reads the output of the step before; else its module is given None for it.
    """

    name: str
    build: Callable[[], nnx.Module]
    skips: tuple[str, ...] = ()
    emits: str = ""
    has_input: bool = True


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The steps of a decoder behind a certain encoder.

    Attributes:
        steps: first to last.
        features: channels of the last step's output.
        reduction: side of the image over side of that output.
        unit: sides of the images have to be multiples of it.
        head_size: side of the kernel of the convolution that makes logits of that output.
    """

    steps: tuple[Step, ...]
    features: int
    reduction: int
    unit: int
    head_size: int


@dataclasses.dataclass(frozen=True)
class Part:
    """A step, ready to run.

    Attributes:
        step: the step.
        graph: its module's graph definition.
        params: its abstract parameters.
        batch_stats: its abstract statistics.
    """

    step: Step
    graph: Any
    params: Tree
    batch_stats: Tree

    @classmethod
    def of(cls, step: Step) -> "Part":
        """Works out the shapes of a step."""
        graph, params, batch_stats = nnx.split(nnx.eval_shape(step.build), nnx.Param, nnx.BatchStat)
        return cls(step, graph, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats))

    def __call__(
        self, params: Tree, batch_stats: Tree, x: jax.Array | None, skips: Sequence[jax.Array], mode: NormMode
    ) -> tuple[jax.Array, Tree]:
        """The step's output, and its statistics if they changed."""
        module = nnx.merge(self.graph, params, batch_stats)
        x = module(x, skips, mode)
        return x, {} if mode == "frozen" else nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
