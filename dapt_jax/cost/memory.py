"""Memory in bytes: residuals of a training step, and peak use of a device or process."""

import functools
import math
import resource
import sys
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jaxtyping import Array, PyTree

from dapt_jax.cost.flops import CHECKPOINT


def tree_bytes(tree: object) -> int:
    """Return the total bytes of the arrays (or `jax.ShapeDtypeStruct`) in a pytree."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def residual_bytes(fn: Callable[..., Any], params: PyTree[Array | jax.ShapeDtypeStruct], *args: Any) -> int:
    """Return the bytes that `jax.vjp(fn, params)` stores for the backward pass.

    Nothing is run or compiled. Each distinct residual counts once; the parameters themselves do not count.
    Inputs in `args` that the backward pass reads (the images under a first trained convolution) do count. A
    compiler may fuse or recompute residuals, so a measured peak can be lower.

    Args:
        fn: Differentiable function `fn(params, *args)`.
        params: Pytree to differentiate with respect to: arrays or `jax.ShapeDtypeStruct`.
        *args: Other arguments, which are constant for the differentiation.

    Returns:
        Bytes over all devices.
    """
    kept, inputs = _residuals(fn, params, *args)
    return kept + inputs


def train_peak_bytes(
    fn: Callable[..., Any],
    params: PyTree[Array | jax.ShapeDtypeStruct],
    *args: Any,
    optimizer_state: object = (),
) -> int:
    """Estimate the peak memory of one training step without compiling it.

    The sum of parameters, their gradients, optimizer state, other inputs and residuals: all of them are live
    when the backward pass begins to write its last gradients, and none of them can be freed earlier. Of parts
    under `jax.checkpoint` the residuals are computed again one part at a time: the largest part's are added.

    Args:
        fn: Differentiable function `fn(params, *args)` that returns the loss.
        params: Trainable parameters only; pass frozen ones in `args`.
        *args: Frozen parameters, statistics, images, labels.
        optimizer_state: Pytree of the optimizer's state, e.g. `jax.eval_shape(optimizer.init, params)`.

    Returns:
        Bytes over all devices.
    """
    kept, _ = _residuals(fn, params, *args)
    again = _recomputed(jax.make_jaxpr(fn)(params, *args).jaxpr)
    return 2 * tree_bytes(params) + tree_bytes(optimizer_state) + tree_bytes(args) + kept + again


@functools.cache
def saves_recomputed() -> bool:
    """Return whether programs compiled for this device need less memory where `jax.checkpoint` says so.

    XLA:CPU of jaxlib 0.10.2 takes its barriers out and keeps what was to be computed again; that of 0.12.0 does not.
    A small program is compiled twice to find out.
    """

    def layer(kernel: Array, x: Array) -> Array:
        return jnp.tanh(jnp.sin(x @ kernel))

    def temporaries(layer: Callable[[Array, Array], Array]) -> int:
        def loss(kernels: list[Array], x: Array) -> Array:
            for kernel in kernels:
                x = layer(kernel, x)
            return x.sum()

        shapes = [jax.ShapeDtypeStruct((8, 8), np.float32)] * 8, jax.ShapeDtypeStruct((1024, 8), np.float32)
        found = jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis()
        return getattr(found, "temp_size_in_bytes", 0)

    return temporaries(jax.checkpoint(layer)) < 0.9 * temporaries(layer)


def memory_stats(device: jax.Device) -> dict[str, Any]:
    """Return the memory statistics of a JAX device; empty where it reports none, as CPUs do."""
    try:
        return device.memory_stats() or {}
    except Exception:  # a plugin without these figures may raise anything
        return {}


def device_peak_bytes() -> tuple[int, str]:
    """Return the peak bytes in use so far on the fullest local device, and the name of the source.

    Returns:
        `(bytes, "device memory_stats")` where devices report it; on others, CPU among them, the process's
        peak resident size, as `(bytes, "process peak resident size")`.
    """
    peaks = [memory_stats(device).get("peak_bytes_in_use") for device in jax.local_devices()]
    reported = [int(peak) for peak in peaks if peak is not None]
    if reported:
        return max(reported), "device memory_stats"
    # Linux reports kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process peak resident size"


def _residuals(
    fn: Callable[..., Any],
    params: PyTree[Array | jax.ShapeDtypeStruct],
    *args: Any,
) -> tuple[int, int]:
    """Return the bytes of residuals that the forward pass computes, and of those that are in `args`."""

    def backward_state(params: PyTree[Array], args: tuple[Any, ...]) -> list[Any]:
        _, backward = jax.vjp(lambda trained: fn(trained, *args), params)
        return jax.tree.leaves(backward)

    jaxpr = jax.make_jaxpr(backward_state)(params, args).jaxpr
    own = set(jaxpr.invars[: len(jax.tree.leaves(params))])
    inputs = set(jaxpr.invars) - own
    residuals = {var for var in jaxpr.outvars if not isinstance(var, jex.Literal)} - own
    given = sum(_bytes(var.aval) for var in residuals & inputs)
    return sum(_bytes(var.aval) for var in residuals) - given, given


def _recomputed(jaxpr: jex.Jaxpr) -> int:
    """Return the bytes of residuals of the largest part under `jax.checkpoint`; 0 without any."""
    largest = 0
    for equation in jaxpr.eqns:
        within = _residuals_of_part if equation.primitive.name in CHECKPOINT else _recomputed
        largest = max(largest, *map(within, jex.jaxprs_in_params(equation.params)), 0)
    return largest


def _residuals_of_part(part: jex.Jaxpr) -> int:
    """Return the bytes that a part's forward pass computes for its backward pass, without its inputs."""
    inputs = (cast(jax.core.ShapedArray, var.aval) for var in part.invars)
    shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in inputs]
    trained = {
        place: shape for place, shape in enumerate(shapes) if jax.dtypes.issubdtype(shape.dtype, np.floating)
    }
    rest = {place: shape for place, shape in enumerate(shapes) if place not in trained}
    run = jex.jaxpr_as_fun(jex.ClosedJaxpr(part, ()))

    def outputs(trained: dict[int, Array], rest: dict[int, Array]) -> list[Array]:
        return run(*(value for _, value in sorted({**trained, **rest}.items())))

    return _residuals(outputs, trained, rest)[0]


def _bytes(leaf: object) -> int:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return math.prod(leaf.shape) * leaf.dtype.itemsize
    return np.asarray(leaf).nbytes
