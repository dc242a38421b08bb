"""Resizing of feature maps without matrix products, which would count as the network's arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def nearest(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b h2 w2 c"]:
    """Repeat every pixel `factor` times along both axes."""
    return jnp.repeat(jnp.repeat(x, factor, 1), factor, 2)


def bilinear(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """Interpolate linearly between pixel centres, with edges repeated and no smoothing when it shrinks.

    Equal to PyTorch's `interpolate(mode="bilinear", align_corners=False)`.

    Args:
        x: Maps (b, h, w, c).
        size: Height and width of the result.
    """
    return _linear(_linear(x, 1, size[0]), 2, size[1])


def _linear(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Interpolate linearly along one axis."""
    old = x.shape[axis]
    if size == old:
        return x
    if size % old:
        centres = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(centres).astype(int)
        high = np.minimum(low + 1, old - 1)
        return _between(jnp.take(x, low, axis), jnp.take(x, high, axis), centres - low, axis)
    # For an integer factor, the values between two neighbours are slices of the map, whose gradient is again
    # slices, where that of `take` is a scatter.
    factor = size // old
    edges = [(1, 1) if number == axis else (0, 0) for number in range(x.ndim)]
    padded = jnp.pad(x, edges, mode="edge")
    phases = []
    for phase in range(factor):
        offset = (phase + 0.5) / factor - 0.5
        start = 0 if offset < 0 else 1
        below, above = (
            jax.lax.slice_in_dim(padded, first, first + old, axis=axis) for first in (start, start + 1)
        )
        phases.append(_between(below, above, offset % 1.0, axis))
    stacked = jnp.stack(phases, axis + 1)
    return stacked.reshape(*x.shape[:axis], size, *x.shape[axis + 1 :])


def _between(low: jax.Array, high: jax.Array, share: np.ndarray | float, axis: int) -> jax.Array:
    shape = [1] * low.ndim
    shape[axis] = -1
    weight = jnp.asarray(np.reshape(share, shape), low.dtype)
    return low * (1 - weight) + high * weight
