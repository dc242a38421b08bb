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


def split(batch: dict[str, np.ndarray], mesh: Mesh, axis: int = 0) -> dict[str, Any]:
    """Puts a batch on the mesh: this host's rows of each array, split along `axis`; numbers go to every device."""
    spread = NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
    whole = NamedSharding(mesh, PartitionSpec())
    return {
        name: jax.make_array_from_process_local_data(spread if np.ndim(value) > axis else whole, np.asarray(value))
        for name, value in batch.items()
    }
