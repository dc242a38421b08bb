"""Cost of one image in a phase, counted from the jaxpr before anything is compiled or run."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dapt_jax import ops
from dapt_jax.cost import flops, memory
from dapt_jax.models.classifier import HEAD
from dapt_jax.models.network import Network
from dapt_jax.objectives import Objective
from dapt_jax.objectives.masking import MaskedPretext
from dapt_jax.objectives.network import POSITION
from dapt_jax.runtime import sharding
from dapt_jax.training import freezing
from dapt_jax.training.freezing import Tree
from dapt_jax.training.steps import PhaseProgram


@dataclasses.dataclass(frozen=True)
class ImageCost:
    """Model and hardware FLOPs of one image in one phase.

    Attributes:
        prefix: Forward pass below the boundary.
        suffix: Forward and backward pass above it, without gradients of frozen parameters.
        head: Of `suffix`, the passes through the head of a label-free objective and its loss.
        targets: Forward pass above the boundary of the network's own moving average under `SelfDistillation`,
            of which `suffix` counts nothing.
    """

    prefix: flops.Flops
    suffix: flops.Flops
    head: flops.Flops = dataclasses.field(default_factory=flops.Flops)
    targets: flops.Flops = dataclasses.field(default_factory=flops.Flops)


def _abstract(tree: PyTree[jax.ShapeDtypeStruct]) -> PyTree[jax.ShapeDtypeStruct]:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _traced_with_lax(fn: Callable[..., Any], *args: Any) -> flops.Flops:
    """Count a function independently of a backend's choice of convolution algorithm."""
    with ops.formulation("lax"):
        return flops.count(lambda *values: fn(*values), *args)


@functools.cache
def boundary_shapes(model: Network, image_size: int) -> tuple[Any, ...]:
    """Return shapes and dtypes, pytrees, of one image's activations at every boundary, its pixels first."""
    params, batch_stats = model.abstract()
    images = _view(model, image_size)
    with ops.formulation("lax"):
        traced = jax.eval_shape(model.activations_at_boundaries, params, batch_stats, images)
    return tuple(
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), out) for out in traced
    )


def boundary_shape(model: Network, boundary: int, image_size: int) -> Any:
    """Return a pytree of `jax.ShapeDtypeStruct`: one image's activations at a boundary."""
    return boundary_shapes(model, image_size)[boundary]


def _view(model: Network, image_size: int) -> Any:
    """Return a pytree of `jax.ShapeDtypeStruct`: one view of an image, as a prefix takes it."""
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8)
    return model.view(image) if isinstance(model, MaskedPretext) else image


def _batched(shapes: PyTree[jax.ShapeDtypeStruct], batch: int) -> PyTree[jax.ShapeDtypeStruct]:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape), leaf.dtype), shapes)


@functools.cache
def forward(model: Network, image_size: int, stop: int) -> flops.Flops:
    """Return FLOPs of one image's forward pass up to a boundary."""
    params, batch_stats = model.abstract()
    images = _view(model, image_size)
    return _traced_with_lax(lambda p, s, x: model.prefix(p, s, x, stop), params, batch_stats, images)


_costs: dict[Hashable, ImageCost] = {}
_peaks: dict[Hashable, tuple[int, int]] = {}


def image_cost(program: PhaseProgram, image_size: int) -> ImageCost:
    """Return FLOPs of one image in a phase; those of a batch are linear in its size.

    Args:
        program: The phase.
        image_size: Side of the data set's images in pixels, which the phase trains on unless it has its own.
    """
    key = (program.key, program.side(image_size))
    if key not in _costs:
        _costs[key] = _image_cost(program, image_size)
    return _costs[key]


def _image_cost(program: PhaseProgram, image_size: int) -> ImageCost:
    program = dataclasses.replace(
        program, grad_accum_steps=1, batch_norm_groups=1
    )  # one image cannot be split
    model, side = program.model, program.side(image_size)
    params, batch_stats = model.abstract()
    state = _abstract(jax.eval_shape(program.init_state, params, batch_stats))
    batch = program.batch_size  # see `PhaseProgram.batch_size`
    x = _inputs(program, side, batch)
    weight, lr = jax.ShapeDtypeStruct((batch,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    labels = program.objective.label_shape(batch, side)
    head = _head_cost(program, state["params"], side, labels, weight)
    update, targets = program.update, flops.Flops()
    if _needs_key(program):
        update = functools.partial(update, key=jax.random.key(0))
    if program.self_distillation:
        update = functools.partial(update, rng={"epoch": jnp.int32(0), "total_steps": jnp.int32(1)})
        labels = jax.eval_shape(program.own_targets, state, x)
        targets = _traced_with_lax(program.own_targets, state, x)
    suffix = _traced_with_lax(update, state, x, labels, weight, lr)
    prefix = forward(model, side, program.mask.boundary) * (2 if program.is_paired else 1)
    return ImageCost(prefix, _each(suffix, batch), _each(head, batch), _each(targets, batch))


def _needs_key(program: PhaseProgram) -> bool:
    """Return whether random draws change what is computed: corruption, or patches or branches that are left out."""
    is_corrupting = isinstance(program.objective, Objective) and program.objective.is_corrupting
    options = program.model.encoder.options
    return is_corrupting or options.patch_dropout > 0 or options.drop_path_subset


def _inputs(program: PhaseProgram, side: int, batch: int) -> Any:
    """Return the abstract activations at the boundary of a phase, a pair of them for two views."""
    x = _batched(boundary_shape(program.model, program.mask.boundary, side), batch)
    return (x, x) if program.is_paired else x


def _each(found: flops.Flops, batch: int) -> flops.Flops:
    """Return the FLOPs of one image of a batch, rounded down."""
    by_op = {name: count // batch for name, count in found.by_op.items()}
    return flops.Flops(
        found.model // batch, found.hardware // batch, found.padded // batch, by_op, found.unknown
    )


def _head_cost(program: PhaseProgram, params: Tree, side: int, labels: Any, weight: Any) -> flops.Flops:
    """Return FLOPs of head and loss of a label-free objective, forward and backward; none for a classifier."""
    model, objective = program.model, program.objective
    if not isinstance(objective, Objective):
        return flops.Flops()
    last = _batched(
        boundary_shape(model, len(model.groups) - 1, side), weight.shape[0] * (1 + program.is_paired)
    )

    def loss(train: Tree, x: jax.Array, rest: Tree, labels: Any, weight: jax.Array) -> jax.Array:
        outputs = objective.outputs(freezing.combine(train, rest)[HEAD], x, model.encoder.as_map)
        return objective.total(outputs, labels, weight)

    trains_encoder = any(not path.startswith(f"{HEAD}/") for path in program.mask.trainable)
    gradient = jax.value_and_grad(loss, argnums=(0, 1) if trains_encoder else 0)
    head = {key: value for key, value in params[HEAD].items() if key != POSITION}
    train, rest = freezing.partition({HEAD: head}, program.mask.trainable)
    return _traced_with_lax(gradient, train, last, rest, labels, weight)


def peak_bytes(program: PhaseProgram, image_size: int, batch: int, fsdp: int = 1) -> int:
    """Estimate peak memory of one training step of a phase, in bytes of one device, without compiling it.

    The estimate counts parameters, statistics, optimizer state, gradients, the batch, and the activations
    that the backward pass needs for one part of the batch (see `PhaseProgram.grad_accum_steps`).

    Args:
        program: The phase.
        image_size: Side of the data set's images in pixels, as in `image_cost`.
        batch: Images of a step on the device.
        fsdp: Devices over which parameters, gradients and optimizer state are sharded; buffers gathered for
            one layer at a time are not counted.
    """
    return max(_peaks_of(program, image_size, batch, fsdp))


def _peaks_of(program: PhaseProgram, image_size: int, batch: int, fsdp: int) -> tuple[int, int]:
    """Return the bytes that are live in the frozen prefix, and when the backward pass begins, of one device."""
    key = (program.key, program.phase.image_size or image_size, batch, fsdp)
    if key not in _peaks:
        _peaks[key] = _traced_peaks(program, image_size, batch, fsdp)
    return _peaks[key]


def _traced_peaks(program: PhaseProgram, image_size: int, batch: int, fsdp: int) -> tuple[int, int]:
    model, side = program.model, program.side(image_size)
    params, batch_stats = model.abstract()
    train, rest = freezing.partition(params, program.mask.trainable)
    at_once = -(-batch // program.grad_accum_steps)
    inputs = _inputs(program, side, at_once)
    key = jax.random.key(0) if _needs_key(program) else None

    def loss(
        train: Tree,
        rest: Tree,
        batch_stats: Tree,
        x: PyTree[jax.Array],
        labels: jax.Array,
    ) -> jax.Array:
        full = freezing.combine(train, rest)
        logits, _ = model.suffix(
            full, batch_stats, x, program.mask.boundary, program.mask.batch_norm_modes, key
        )
        return program.objective.total(logits, labels, jnp.ones(at_once))

    opt = jax.eval_shape(program.tx.init, params)
    with ops.formulation("lax"):
        stored = memory.train_peak_bytes(
            loss,
            train,
            rest,
            batch_stats,
            inputs,
            program.objective.label_shape(at_once, side),
            optimizer_state=opt,
        )
    waiting = memory.tree_bytes(boundary_shape(model, program.mask.boundary, side)) * (batch - at_once)
    images = batch * (program.phase.image_size or image_size) ** 2 * 3
    elsewhere = sum(_elsewhere(tree, fsdp) for tree in (params, opt))
    average = memory.tree_bytes(train) - _elsewhere(train, fsdp) if program.keeps_average else 0
    always = images + average - elsewhere
    # The prefix has run, and its activations are gone, when the first residual of the suffix is kept.
    in_prefix = memory.tree_bytes((params, batch_stats, opt)) + _prefix_bytes(program, side, batch)
    gradients_elsewhere = _elsewhere(train, fsdp)
    return in_prefix + always, stored + waiting - gradients_elsewhere + always


def _elsewhere(state: object, fsdp: int) -> int:
    """Return the bytes of a state that other devices hold."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if sharding.fsdp_axis(leaf.shape, fsdp) is not None]
    return sum(memory.tree_bytes(leaf) * (fsdp - 1) // fsdp for leaf in leaves)


def largest_batch(program: PhaseProgram, image_size: int, memory_bytes: int, fsdp: int = 1) -> int:
    """Return the images of a step that fit on one device by the same estimate; 0 for none."""
    unit = program.grad_accum_steps
    first, second = (_peaks_of(program, image_size, number * unit, fsdp) for number in (1, 2))
    if max(first) > memory_bytes:
        return 0
    return unit * min(
        1 + (memory_bytes - one) // max(two - one, 1) for one, two in zip(first, second, strict=True)
    )


def _prefix_bytes(program: PhaseProgram, image_size: int, batch: int) -> int:
    """Return the bytes of the largest pair of neighbouring activations of an uncached prefix."""
    shapes = boundary_shapes(program.model, image_size)[: program.mask.boundary + 1]
    sizes = [memory.tree_bytes(_batched(shape, batch)) for shape in shapes]
    return max((a + b for a, b in itertools.pairwise(sizes)), default=0)
