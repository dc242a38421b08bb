"""Activations in 8 bits, with a scale for each image and channel."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

INT8 = "int8"
"""Dtype of cached activations that are `Quantised`."""

LARGEST = 127

EXACT = ("pixels",)
"""Names of cached leaves that keep their dtype: pixels that a masked autoencoder predicts. The loss divides those
of a flat patch by their small deviation, and with it their rounding."""


class Quantised(NamedTuple):
    """Activations as whole steps of a scale, which is the largest magnitude of a channel divided by 127.

    The scale is that of one image and channel, over all positions, so that an image is stored without
    knowing others. A value is off by at most half a step.

    Attributes:
        values: int8 [..., positions, c], with one or more axes of positions.
        scale: float32 [..., c].
    """

    values: Any
    scale: Any


def is_quantised(leaf: jax.ShapeDtypeStruct) -> bool:
    """Return whether activations of these shapes of one image have channels with several positions.

    Pooled features and masks have none, and stay as they are.
    """
    return len(leaf.shape) > 1 and jnp.issubdtype(leaf.dtype, jnp.floating)


def spec(leaf: jax.ShapeDtypeStruct) -> Any:
    """Return the shapes of one image's activations in 8 bits."""
    if not is_quantised(leaf):
        return leaf
    return Quantised(
        jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(INT8)), jax.ShapeDtypeStruct(leaf.shape[-1:], jnp.float32)
    )


def quantise(x: np.ndarray, leading: int) -> Quantised:
    """Return activations in 8 bits; what is not finite comes back as NaN.

    >>> found = quantise(np.array([[[1.0, -8.0], [-0.5, 127.0]]]), leading=1)
    >>> found.values.tolist(), found.scale.round(4).tolist()
    ([[[127, -8], [-64, 127]]], [[0.0079, 1.0]])

    Args:
        x: Activations [..., positions, c].
        leading: Number of first axes that are no positions, such as that of the images.
    """
    wide = np.asarray(x, np.float32)
    positions = tuple(range(leading, wide.ndim - 1))
    scale = np.abs(wide).max(positions, keepdims=True) / np.float32(LARGEST)
    is_finite = np.isfinite(scale)
    steps = np.where(is_finite, wide, 0) / np.where(is_finite & (scale > 0), scale, 1)
    values = np.clip(np.rint(steps), -LARGEST, LARGEST).astype(np.int8)
    return Quantised(values, np.where(is_finite, scale, np.nan).astype(np.float32).squeeze(positions))


def dequantised(tree: PyTree[Array | np.ndarray], dtype: DTypeLike) -> PyTree[Array]:
    """Return cached activations, `Quantised` or not, in the dtype in which they are used.

    Args:
        tree: Pytree of arrays, some of which may be `Quantised`.
        dtype: The dtype.
    """

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Quantised):
            return leaf.astype(dtype)
        axes = tuple(range(leaf.scale.ndim - 1, leaf.values.ndim - 1))
        scale = jnp.expand_dims(leaf.scale, axes)
        return (leaf.values.astype(jnp.float32) * scale).astype(dtype)

    return jax.tree.map(convert, tree, is_leaf=lambda leaf: isinstance(leaf, Quantised))


def in_float32(tree: PyTree[Array | np.ndarray]) -> PyTree[Array | np.ndarray]:
    """Return a pytree with float32 in the place of `Quantised`; other arrays are unchanged."""
    return jax.tree.map(
        lambda leaf: dequantised(leaf, jnp.float32) if isinstance(leaf, Quantised) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Quantised),
    )


@dataclasses.dataclass
class RoundingError:
    """Error of stored activations against those that were computed, added up over a fill.

    Attributes:
        squared: Sum of the squared errors.
        total: Sum of the squared values.
    """

    squared: float = 0.0
    total: float = 0.0

    def add(self, computed: np.ndarray, stored: np.ndarray | Quantised) -> None:
        """Add some activations."""
        exact = np.asarray(computed, np.float32)
        back = np.asarray(dequantised(stored, np.float32))
        self.squared += float(np.square(back - exact, dtype=np.float64).sum())
        self.total += float(np.square(exact, dtype=np.float64).sum())

    @property
    def relative(self) -> float:
        """Root mean square of the errors, as a share of that of the values; 0 before anything is added."""
        return (self.squared / self.total) ** 0.5 if self.total else 0.0
