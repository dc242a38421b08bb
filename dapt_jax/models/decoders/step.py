"""Decoders as ordered steps: the maps that each step reads from the encoder and emits for later steps."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from dapt_jax.models.encoder import Tree
from dapt_jax.models.parameters import kinds_of
from dapt_jax.parameters import BatchNormMode, Kind


@dataclasses.dataclass(frozen=True)
class Step:
    """One named layer group of a decoder.

    Attributes:
        name: Slash-separated name, which is the prefix of its parameters' paths.
        build: Function that returns its nnx module, called as `module(x, skips, mode)` with the output of the
            previous step (of the encoder, for the first), the maps named by `skips`, and the mode of batch
            norm.
        skips: Names of pyramid levels of the encoder, or of maps that earlier steps emit.
        emits: Name under which later steps may read its output.
        has_input: Whether it reads the output of the previous step; otherwise its module receives None.
        is_stochastic: Whether its module takes a fourth argument, a PRNG key or None.
    """

    name: str
    build: Callable[[], nnx.Module]
    skips: tuple[str, ...] = ()
    emits: str = ""
    has_input: bool = True
    is_stochastic: bool = False


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The steps of a decoder on a certain encoder.

    Attributes:
        steps: The steps, first to last.
        features: Channels of the last step's output.
        reduction: Ratio of the image's side to the side of that output.
        unit: Number that the image sides must be multiples of.
        head_size: Side of the kernel of the convolution from that output to logits.
        head_bias: Whether that convolution has a bias.
    """

    steps: tuple[Step, ...]
    features: int
    reduction: int
    unit: int
    head_size: int
    head_bias: bool = True


@dataclasses.dataclass(frozen=True)
class Part:
    """A step that is ready to run.

    Attributes:
        step: The step.
        graph: Graph definition of its module.
        params: Abstract parameters.
        batch_stats: Abstract running statistics.
        kinds: Kind of each parameter and statistic by path.
    """

    step: Step
    graph: Any
    params: Tree
    batch_stats: Tree
    kinds: Mapping[str, Kind]

    @classmethod
    def of(cls, step: Step) -> "Part":
        """Return the part of a step, with its abstract shapes and kinds."""
        graph, params, batch_stats = nnx.split(nnx.eval_shape(step.build), nnx.Param, nnx.BatchStat)
        kinds = kinds_of(step.name, params, batch_stats)
        return cls(step, graph, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats), kinds)

    def __call__(
        self,
        params: Tree,
        batch_stats: Tree,
        x: jax.Array | None,
        skips: Sequence[jax.Array],
        mode: BatchNormMode,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Tree]:
        """Run the step; return its output, and its statistics if they changed."""
        module = nnx.merge(self.graph, params, batch_stats)
        x = module(x, skips, mode, key) if self.step.is_stochastic else module(x, skips, mode)
        return x, {} if mode == "frozen" else nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
