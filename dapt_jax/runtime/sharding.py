"""Device mesh: batches are sharded over all devices, model state over `fsdp`; the rest is replicated."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dapt_jax.errors import UserError

PyTree = Any
"""Arrays, or abstract arrays, in nested containers."""

AnyArray = jax.Array | np.ndarray
DATA, FSDP = "data", "fsdp"
"""Axes of the mesh: replicas of the model's state, and the devices over which each replica is sharded."""

MIN_SHARD_SIZE = 2**14
"""Minimum number of elements of a sharded state array: a collective costs some microseconds, however little
it moves."""


def make_mesh(devices: Sequence[jax.Device] | None = None, fsdp: int = 1) -> Mesh:
    """Return a mesh of `data` x `fsdp` devices.

    Args:
        devices: Devices in mesh order; by default all devices of all processes.
        fsdp: Number of devices over which each replica of the model's state is sharded (fully sharded data
            parallel, Rajbhandari et al., arXiv 1910.02054, and Zhao et al., arXiv 2304.11277); 0 for all.

    Raises:
        UserError: The number of devices is not a multiple of `fsdp`.
    """
    # The devices of each process are adjacent, in the order of processes: `local_slice` relies on it.
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
    # The compiler chooses the layout between inputs and outputs; newer JAX would otherwise type every array
    # by its sharding.
    return Mesh(np.asarray(found).reshape(-1, fsdp), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def check_batch(batch_size: int, parts: int, devices: int | None = None) -> None:
    """Check that a batch divides among the devices, and on each device into parts.

    Args:
        batch_size: Batch size of a step, over all devices.
        parts: Number of parts that each device splits its slice into: see `training.steps`.
        devices: Number of devices; by default all of them.

    Raises:
        UserError: The batch does not divide.
    """
    devices = jax.device_count() if devices is None else devices
    if parts < 1:
        raise UserError(f"grad_accum_steps is {parts}; expected 1 or more")
    if batch_size % (devices * parts):
        unit = devices * parts
        lower = batch_size // unit * unit or unit
        cut = f" and there into {parts} parts" if parts > 1 else ""
        raise UserError(f"batch_size {batch_size} does not divide among {devices} devices{cut}; {lower} does")


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding that splits an axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, (DATA, FSDP)))


def fsdp_axis(shape: Sequence[int], fsdp: int) -> int | None:
    """Return the axis along which a state array is sharded, or None.

    It is the longest axis whose length is a multiple of `fsdp`; small arrays are not sharded.
    """
    fitting = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not fitting or np.prod(shape) < MIN_SHARD_SIZE:
        return None
    return max(fitting, key=lambda axis: shape[axis])


def state_shardings(state: PyTree, mesh: Mesh) -> PyTree:
    """Return the shardings of a state.

    Large leaves are split over `fsdp` along the longest axis that is a multiple of it; others are replicated.

    Args:
        state: Pytree of arrays or their shapes: parameters and the optimizer state of each.
        mesh: The device mesh.

    Returns:
        Pytree of shardings with the same structure.
    """

    def of(leaf: AnyArray) -> NamedSharding:
        axis = fsdp_axis(np.shape(leaf), mesh.shape[FSDP])
        return replicated(mesh) if axis is None else NamedSharding(mesh, PartitionSpec(*[None] * axis, FSDP))

    return jax.tree.map(of, state)


def device_put_global(tree: PyTree, shardings: PyTree) -> PyTree:
    """Put the leaves of a pytree, identical on every process, on devices with the given shardings."""

    def put(value: AnyArray, sharding: NamedSharding) -> jax.Array:
        is_spread = isinstance(value, jax.Array) and not value.is_fully_addressable
        if is_spread or sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        array = np.asarray(value)
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    return jax.tree.map(put, tree, shardings)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Replicate every leaf on every device."""
    return device_put_global(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def shard_state(state: PyTree, mesh: Mesh) -> PyTree:
    """Put a state on devices with the shardings of `state_shardings`."""
    return device_put_global(state, state_shardings(state, mesh))


def shard_batch(batch: PyTree, mesh: Mesh, axis: int = 0) -> PyTree:
    """Put a batch, a pytree, on the mesh: this process's rows of each array, split along `axis`.

    Arrays without such an axis are replicated.
    """

    def put(value: AnyArray) -> jax.Array:
        array = np.asarray(value)
        sharding = batch_sharding(mesh, axis) if array.ndim > axis else replicated(mesh)
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(put, batch)


def local_slice(size: int, mesh: Mesh) -> slice:
    """Return the slice of a batch of `size` rows that this process reads: the rows of its local devices."""
    processes = sorted({device.process_index for device in mesh.devices.flat})
    if len(processes) == 1:
        return slice(0, size)
    position = processes.index(jax.process_index())
    return slice(position * size // len(processes), (position + 1) * size // len(processes))


def local_mesh() -> Mesh:
    """Return a mesh of the local devices of this process."""
    return make_mesh(jax.local_devices())


def gather_to_host(tree: PyTree) -> PyTree:
    """Return every leaf in full as a NumPy array; all processes have to call it if leaves are sharded."""

    def get(leaf: AnyArray) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(get, tree)


def jit_step(function: Callable[..., PyTree], state: PyTree, *arguments: PyTree, mesh: Mesh) -> Any:
    """Return a jitted step, ready to be lowered for its arguments.

    The step donates its state, and returns it with the same sharding.

    Args:
        function: Function from a state and other arguments to a state, or to a tuple that begins with one;
            all its other results are replicated.
        state: Pytree of arrays or `jax.ShapeDtypeStruct`.
        arguments: The other arguments.
        mesh: The device mesh.
    """
    out = jax.eval_shape(function, state, *arguments)
    laid_out = state_shardings(state, mesh)
    rest = jax.tree.map(lambda _: replicated(mesh), out[1:]) if isinstance(out, tuple) else None
    return jax.jit(function, donate_argnums=0, out_shardings=laid_out if rest is None else (laid_out, *rest))


def all_finite(tree: PyTree) -> bool:
    """Return whether every number in a pytree of arrays is finite; the result agrees on all processes."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        # The host reads a CPU's buffers as they are; a program of many leaves takes seconds to compile.
        return all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)
    return bool(_all_finite(leaves))


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.asarray([jnp.isfinite(leaf).all() for leaf in leaves]).all() if leaves else jnp.bool_(True)
