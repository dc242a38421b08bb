"""Layers of encoders and decoders, as nnx modules over the operations of `dapt_jax.ops`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax import ops
from dapt_jax.models.lora import LowRankUpdate
from dapt_jax.models.parameters import (
    BatchNormBias,
    BatchNormScale,
    Bias,
    ConvKernel,
    DenseKernel,
    DepthwiseKernel,
    GroupedKernel,
    LayerNormBias,
    LayerNormScale,
    RunningMean,
    RunningVariance,
)
from dapt_jax.models.row_changes import RowChanges
from dapt_jax.parameters import BatchNormMode

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
        kind = (
            ConvKernel if groups == 1 else DepthwiseKernel if groups == inputs == outputs else GroupedKernel
        )
        self.kernel = kind(jnp.zeros((size, size, inputs // groups, outputs)))
        self.bias = Bias(jnp.zeros(outputs)) if bias else None
        self.stride, self.padding, self.groups = stride, padding, groups
        self.lora: LowRankUpdate | None = None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        kernel = self.kernel[...].astype(x.dtype)
        y = ops.conv(x, kernel, stride=self.stride, padding=self.padding, groups=self.groups)
        if self.lora is not None:
            y += self.lora.conv(x, stride=self.stride, padding=self.padding)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Dense(nnx.Module):
    """A dense layer over the last axis; `kernel` is (in, out)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True):
        self.kernel = DenseKernel(jnp.zeros((inputs, outputs)))
        self.bias = Bias(jnp.zeros(outputs)) if bias else None
        self.lora: LowRankUpdate | None = None
        self.rows: RowChanges | None = None

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        kernel = self.kernel[...]
        y = ops.product(x, kernel.astype(x.dtype)) if self.rows is None else self.rows.product(x, kernel)
        if self.lora is not None:
            y += self.lora.dense(x)
        if self.bias is None:
            return y
        bias = self.bias[...] if self.rows is None else self.rows.changed_bias(self.bias[...])
        return y + bias.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation of the last axis (Ba et al., arXiv 1607.06450), computed in float32."""

    def __init__(self, features: int, *, eps: float = 1e-6):
        self.scale = LayerNormScale(jnp.ones(features))
        self.bias = LayerNormBias(jnp.zeros(features))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        var = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(var + self.eps) * self.scale[...] + self.bias[...]).astype(x.dtype)


def average_pool(x: Float[Array, "b h w c"], *, ceil: bool = False) -> Float[Array, "b h2 w2 c"]:
    """Average 2x2 windows; an odd last row or column is dropped, or (`ceil`) averaged alone."""
    batch, *sides, features = x.shape
    if ceil:
        # The average of a row and its copy is the row.
        x = jnp.pad(x, ((0, 0), *((0, side % 2) for side in sides), (0, 0)), mode="edge")
    high, wide = (side // 2 for side in x.shape[1:3])
    windows = x[:, : 2 * high, : 2 * wide].reshape(batch, high, 2, wide, 2, features)
    return windows.mean((2, 4), dtype=jnp.float32).astype(x.dtype)


def gelu(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Apply the exact Gaussian error linear unit (Hendrycks & Gimpel, arXiv 1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


def dropout(x: Float[Array, "*b"], rate: float, key: jax.Array | None) -> Float[Array, "*b"]:
    """Zero elements with probability `rate`, scale the rest by 1 / (1 - rate); the identity without a key."""
    return x if key is None or not rate else _keep(x, rate, key, x.shape)


def drop_path(branch: Float[Array, "b ..."], rate: float, key: jax.Array | None) -> Float[Array, "b ..."]:
    """Apply stochastic depth (Huang et al., arXiv 1603.09382): drop whole residual branches per image."""
    shape = (branch.shape[0], *(1,) * (branch.ndim - 1))
    return branch if key is None or not rate else _keep(branch, rate, key, shape)


def _keep(x: jax.Array, rate: float, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def split(key: jax.Array | None, count: int) -> Sequence[jax.Array | None]:
    """Return keys for `count` random layers; without a key, `count` times None."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))


def linear_rates(last: float, count: int) -> list[float]:
    """Return the stochastic-depth rates of `count` blocks, linear from 0 to `last`."""
    return [last * number / max(count - 1, 1) for number in range(count)]


class BatchNorm(nnx.Module):
    """Batch normalisation (Ioffe & Szegedy, arXiv 1502.03167); statistics in float32, over the global batch.

    Under jit the batch axis is the global one whatever its sharding, so statistics do not depend on the
    number of devices; under `ops.batch_norm_groups` each group of examples has separate statistics.
    """

    def __init__(self, features: int, *, eps: float = 1e-5, momentum: float = 0.9):
        self.scale = BatchNormScale(jnp.ones(features))
        self.bias = BatchNormBias(jnp.zeros(features))
        self.mean = RunningMean(jnp.zeros(features))
        self.var = RunningVariance(jnp.ones(features))
        self.eps, self.momentum = eps, momentum

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h w c"]:
        if mode == "frozen":
            factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.eps)
            shift = self.bias[...] - self.mean[...] * factor
            return x * factor.astype(x.dtype) + shift.astype(x.dtype)
        y, mean, var = ops.batch_norm(x, self.scale[...], self.bias[...], self.eps)
        self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
        self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * var
        return y


class ConvNormRelu(nnx.Module):
    """A convolution padded to preserve the side (divided by the stride), batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1):
        pad = (size - 1) // 2
        self.conv = Conv(inputs, outputs, size, stride=stride, padding=((pad, pad), (pad, pad)))
        self.norm = BatchNorm(outputs)

    def __call__(self, x: Float[Array, "b h w c"], mode: BatchNormMode) -> Float[Array, "b h2 w2 d"]:
        return jax.nn.relu(self.norm(self.conv(x), mode))
