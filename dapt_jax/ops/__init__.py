"""Convolution, products with kernels, pooling and batch norm: `lax` on GPU and TPU, and formulations that are fast in XLA:CPU.

Both compute the same up to rounding. The choice is made at trace time: see `formulation`.
"""

from collections.abc import Hashable

from dapt_jax.ops import choice, normalisation
from dapt_jax.ops.choice import formulation
from dapt_jax.ops.convolution import conv
from dapt_jax.ops.normalisation import batch_norm, batch_norm_groups
from dapt_jax.ops.pooling import max_pool
from dapt_jax.ops.product import materialised, product

__all__ = [
    "batch_norm",
    "batch_norm_groups",
    "choices",
    "conv",
    "formulation",
    "materialised",
    "max_pool",
    "product",
]


def choices() -> Hashable:
    """Return everything that the operations read at trace time besides their arguments, as a key."""
    return choice.current(), normalisation.current_groups()
