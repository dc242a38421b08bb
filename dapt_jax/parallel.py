"""The device mesh: batches are split over its `data` axis, everything else is on every device."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dapt_jax.errors import UserError


def data_mesh(batch_size: int) -> Mesh:
    """One axis `data` over all devices.

    Raises:
        UserError: a batch does not divide among the devices.
    """
    devices = np.asarray(jax.devices())
    if batch_size % len(devices):
        lower = batch_size // len(devices) * len(devices) or len(devices)
        raise UserError(f"batch_size {batch_size} does not divide among {len(devices)} devices; {lower} does")
    # The compiler lays out what is between inputs and outputs; newer JAX would have every array typed by its sharding.
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts every leaf on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split(batch: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Puts a batch, a pytree, on the mesh: this host's rows of each array, split along `axis`.

    Arrays without such an axis go to every device.
    """
    spread = NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
    whole = NamedSharding(mesh, PartitionSpec())

    def put(value: Any) -> jax.Array:
        array = np.asarray(value)
        return jax.make_array_from_process_local_data(spread if array.ndim > axis else whole, array)

    return jax.tree.map(put, batch)
