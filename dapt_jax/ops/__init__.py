"""Convolution, products with kernels, pooling, norms, activations, attention: of `lax` on GPU and TPU, other ones in XLA:CPU.

Both compute the same up to rounding. The choice is made at trace time: see `formulation`.
"""

from collections.abc import Hashable

from dapt_jax.ops import choice, normalisation
from dapt_jax.ops.activation import gelu
from dapt_jax.ops.attention import attention
from dapt_jax.ops.choice import formulation
from dapt_jax.ops.convolution import conv
from dapt_jax.ops.normalisation import batch_norm, batch_norm_groups, layer_norm
from dapt_jax.ops.pooling import max_pool
from dapt_jax.ops.product import materialised, product, sum_of_products

__all__ = [
    "attention",
    "batch_norm",
    "batch_norm_groups",
    "choices",
    "conv",
    "formulation",
    "gelu",
    "layer_norm",
    "materialised",
    "max_pool",
    "product",
    "sum_of_products",
]


def choices() -> Hashable:
    """Return everything that the operations read at trace time besides their arguments, as a key."""
    return choice.current(), normalisation.current_groups()
