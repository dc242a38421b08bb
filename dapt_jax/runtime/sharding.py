"""The device mesh: batches are split over all devices, the model's state over its `fsdp` axis, all else is everywhere."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dapt_jax.errors import UserError

PyTree = Any
"""Arrays, or what stands for them, in nested containers."""

AnyArray = jax.Array | np.ndarray
DATA, FSDP = "data", "fsdp"
"""Axes of the mesh: copies of the model's state, and the devices over which each copy is spread."""

MIN_SHARD_SIZE = 2**14
"""Elements from which on an array of the state is spread: a collective costs some microseconds, however
little it moves."""


def make_mesh(devices: Sequence[jax.Device] | None = None, fsdp: int = 1) -> Mesh:
    """A mesh of `data` x `fsdp`.

    Args:
        devices: in their order; by default all there are, over all processes.
        fsdp: devices over which each copy of the model's state is spread (fully sharded data parallel,
            Rajbhandari et al., arXiv 1910.02054, and Zhao et al., arXiv 2304.11277); 0 for all.

    Raises:
        UserError: the devices do not divide by it.
    """
    # Each process' devices side by side, in the order of processes: `share` goes by it.
    found = (
        sorted(jax.devices(), key=lambda one: (one.process_index, one.id))
        if devices is None
        else list(devices)
    )
    fsdp = fsdp or len(found)
    if fsdp < 0 or len(found) % fsdp:
        fitting = [each for each in range(1, len(found) + 1) if len(found) % each == 0]
        near = min(fitting, key=lambda each: abs(each - fsdp))
        raise UserError(f"runtime.fsdp is {fsdp}, which does not divide {len(found)} devices; {near} does")
    # The compiler lays out what is between inputs and outputs; newer JAX would have every array typed by its
    # sharding.
    return Mesh(np.asarray(found).reshape(-1, fsdp), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def check_batch(batch_size: int, parts: int, devices: int | None = None) -> None:
    """Refuses a batch that does not divide among the devices, and there into parts.

    Args:
        batch_size: of a step, over all devices.
        parts: into which each device cuts its share: see `training.steps`.
        devices: how many; by default all there are.

    Raises:
        UserError: it does not.
    """
    devices = jax.device_count() if devices is None else devices
    if parts < 1:
        raise UserError(f"accumulate is {parts}; expected 1 or more")
    if batch_size % (devices * parts):
        unit = devices * parts
        lower = batch_size // unit * unit or unit
        cut = f" and there into {parts} parts" if parts > 1 else ""
        raise UserError(f"batch_size {batch_size} does not divide among {devices} devices{cut}; {lower} does")


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Split along an axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, (DATA, FSDP)))


def fsdp_axis(shape: Sequence[int], fsdp: int) -> int | None:
    """The axis along which an array of the state is spread over some devices: the longest that divides, of large arrays."""
    fitting = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not fitting or np.prod(shape) < MIN_SHARD_SIZE:
        return None
    return max(fitting, key=lambda axis: shape[axis])


def state_shardings(state: PyTree, mesh: Mesh) -> PyTree:
    """Where the leaves of a state go: the large ones spread over `fsdp` along their longest axis that divides.

    Args:
        state: a pytree of arrays or their shapes: parameters and whatever the optimizer keeps for each.
        mesh: the devices.

    Returns:
        The same pytree of shardings.
    """

    def of(leaf: AnyArray) -> NamedSharding:
        axis = fsdp_axis(np.shape(leaf), mesh.shape[FSDP])
        return replicated(mesh) if axis is None else NamedSharding(mesh, PartitionSpec(*[None] * axis, FSDP))

    return jax.tree.map(of, state)


def device_put_global(tree: PyTree, shardings: PyTree) -> PyTree:
    """Puts the leaves of a pytree, alike in every process, where they belong."""

    def put(value: AnyArray, sharding: NamedSharding) -> jax.Array:
        is_spread = isinstance(value, jax.Array) and not value.is_fully_addressable
        if is_spread or sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        array = np.asarray(value)
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    return jax.tree.map(put, tree, shardings)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts every leaf on every device."""
    return device_put_global(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def shard_state(state: PyTree, mesh: Mesh) -> PyTree:
    """Puts a state where `state_shardings` says."""
    return device_put_global(state, state_shardings(state, mesh))


def shard_batch(batch: PyTree, mesh: Mesh, axis: int = 0) -> PyTree:
    """Puts a batch, a pytree, on the mesh: this process's rows of each array, split along `axis`.

    Arrays without such an axis go to every device.
    """

    def put(value: AnyArray) -> jax.Array:
        array = np.asarray(value)
        sharding = batch_sharding(mesh, axis) if array.ndim > axis else replicated(mesh)
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(put, batch)


def local_slice(size: int, mesh: Mesh) -> slice:
    """The part of a batch that this process reads: of `size` rows those that go to its own devices."""
    processes = sorted({device.process_index for device in mesh.devices.flat})
    if len(processes) == 1:
        return slice(0, size)
    position = processes.index(jax.process_index())
    return slice(position * size // len(processes), (position + 1) * size // len(processes))


def local_mesh() -> Mesh:
    """The devices of this process alone."""
    return make_mesh(jax.local_devices())


def gather_to_host(tree: PyTree) -> PyTree:
    """Every leaf, whole, as numpy; all processes have to ask for it where one holds but a part."""

    def get(leaf: AnyArray) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(get, tree)


def jit_step(function: Callable[..., PyTree], state: PyTree, *arguments: PyTree, mesh: Mesh) -> Any:
    """A step, ready to be lowered for its arguments: the state is given away, and what comes out is laid out as it went in.

    Args:
        function: from a state and other arguments to a state, or to a tuple that begins with one; all else
            that it returns goes to every device.
        state: an array or a `jax.ShapeDtypeStruct` in each leaf.
        arguments: the others.
        mesh: the devices.
    """
    out = jax.eval_shape(function, state, *arguments)
    laid_out = state_shardings(state, mesh)
    rest = jax.tree.map(lambda _: replicated(mesh), out[1:]) if isinstance(out, tuple) else None
    return jax.jit(function, donate_argnums=0, out_shardings=laid_out if rest is None else (laid_out, *rest))


def all_finite(tree: PyTree) -> bool:
    """Whether every number in a pytree of arrays is one; wherever they are, all processes hear the same."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return bool(_all_finite(leaves))


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.asarray([jnp.isfinite(leaf).all() for leaf in leaves]).all() if leaves else jnp.bool_(True)
