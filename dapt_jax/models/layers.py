"""The layers that the encoders are built of, as nnx modules over the operations of `dapt_jax.ops`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax import ops
from dapt_jax.models.encoder import NormMode

Padding = str | Sequence[tuple[int, int]]


class Conv(nnx.Module):
    """A 2-D convolution; `kernel` is (height, width, in / groups, out)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        padding: Padding = "SAME",
        groups: int = 1,
        bias: bool = False,
    ):
        self.kernel = nnx.Param(jnp.zeros((size, size, inputs // groups, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.stride, self.padding, self.groups = stride, padding, groups

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        kernel = self.kernel[...].astype(x.dtype)
        y = ops.conv(x, kernel, stride=self.stride, padding=self.padding, groups=self.groups)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class BatchNorm(nnx.Module):
    """Batch normalisation (Ioffe & Szegedy, arXiv 1502.03167); statistics in float32, over the global batch.

    Under jit the batch axis is the global one whatever its sharding, so statistics do not depend on the device count.
    """

    def __init__(self, features: int, *, eps: float = 1e-5, momentum: float = 0.9):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.eps, self.momentum = eps, momentum

    def __call__(self, x: Float[Array, "b h w c"], norm: NormMode) -> Float[Array, "b h w c"]:
        if norm == "frozen":
            factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.eps)
            shift = self.bias[...] - self.mean[...] * factor
            return x * factor.astype(x.dtype) + shift.astype(x.dtype)
        y, mean, var = ops.batch_norm(x, self.scale[...], self.bias[...], self.eps)
        count = x.size // x.shape[-1]
        # The stored variance is the unbiased one, as in the frameworks that the weights come from.
        unbiased = var * (count / max(count - 1, 1))
        self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
        self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * unbiased
        return y
