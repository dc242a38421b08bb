"""Convolution, pooling and batch norm: `lax` on GPU and TPU, and formulations that XLA:CPU runs fast on CPU.

Both compute the same to rounding. The choice is made while a function is traced: see `formulation`.
"""

from dapt_jax.ops.choice import formulation
from dapt_jax.ops.convolution import conv
from dapt_jax.ops.normalisation import batch_norm, batch_norm_groups
from dapt_jax.ops.pooling import max_pool

__all__ = ["batch_norm", "batch_norm_groups", "conv", "formulation", "max_pool"]
