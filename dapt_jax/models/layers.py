"""Layers of encoders and decoders, as nnx modules over the operations of `dapt_jax.ops`."""

import dataclasses
from collections.abc import Callable, Sequence

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

_IMAGES_OF_PART = 32
"""Images among which stochastic depth on a subset draws, where they divide the batch."""


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
        if self.rows is not None:
            y = self.rows.product(x, kernel)
            y = y if self.lora is None else y + self.lora.dense(x)
        elif self.lora is not None:
            y = self.lora.dense(x, kernel.astype(x.dtype))
        else:
            y = ops.product(x, kernel.astype(x.dtype))
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
        return ops.layer_norm(x, self.scale[...], self.bias[...], self.eps)


def average_pool(x: Float[Array, "b h w c"], *, ceil: bool = False) -> Float[Array, "b h2 w2 c"]:
    """Average 2x2 windows; an odd last row or column is dropped, or (`ceil`) averaged alone."""
    batch, *sides, features = x.shape
    if ceil:
        # The average of a row and its copy is the row.
        x = jnp.pad(x, ((0, 0), *((0, side % 2) for side in sides), (0, 0)), mode="edge")
    high, wide = (side // 2 for side in x.shape[1:3])
    windows = x[:, : 2 * high, : 2 * wide].reshape(batch, high, 2, wide, 2, features)
    return windows.mean((2, 4), dtype=jnp.float32).astype(x.dtype)


def dropout(x: Float[Array, "*b"], rate: float, key: jax.Array | None) -> Float[Array, "*b"]:
    """Zero elements with probability `rate`, scale the rest by 1 / (1 - rate); the identity without a key."""
    return x if key is None or not rate else _keep(x, rate, key, x.shape)


@dataclasses.dataclass(frozen=True)
class StochasticDepth:
    """Stochastic depth of a residual branch: while training, images skip it at random.

    Attributes:
        rate: Share of the images that skip the branch.
        on_subset: Whether the branch is computed only for the images that do not skip it, as DINOv2 does (Oquab et
            al., arXiv 2304.07193, section 5), instead of being computed for all and dropped for each image
            independently (Huang et al., arXiv 1603.09382).
    """

    rate: float = 0.0
    on_subset: bool = False

    def add(
        self,
        x: Float[Array, "b ..."],
        branch: Callable[[jax.Array], jax.Array],
        key: jax.Array | None,
        skip: Float[Array, "b ..."] | None = None,
    ) -> Float[Array, "b ..."]:
        """Return `skip + branch(x)`, the branch scaled so that its expectation is that of every image taking it.

        Args:
            x: Input of the branch.
            branch: Function of a batch of inputs.
            key: PRNG key; None for every image taking the branch, as at test time.
            skip: What the branch is added to; None for `x`.
        """
        skip = x if skip is None else skip
        if key is None or not self.rate:
            return skip + branch(x)
        if not self.on_subset:
            y = branch(x)
            return skip + _keep(y, self.rate, key, (y.shape[0], *(1,) * (y.ndim - 1)))
        parts, size, kept = subset_of_batch(x.shape[0], self.rate)
        if kept == size:
            return skip + branch(x)
        keys = jax.random.split(key, parts)
        rows = jax.vmap(lambda each: jax.random.permutation(each, size)[:kept])(keys)
        y = branch(_merged(jax.vmap(_take)(_parted(x, parts), rows))) * (size / kept)
        return _merged(jax.vmap(_add)(_parted(skip, parts), rows, _parted(y, parts)))


def subset_of_batch(batch: int, rate: float) -> tuple[int, int, int]:
    """Return the parts of a batch that stochastic depth draws from, the images of a part, and those that are computed.

    Parts are of a fixed size, so that results do not depend on the number of devices, and no image moves between
    devices that hold whole parts.

    >>> subset_of_batch(128, 0.1), subset_of_batch(24, 0.1), subset_of_batch(2, 0.9)
    ((4, 32, 29), (1, 24, 22), (1, 2, 1))
    """
    parts = batch // _IMAGES_OF_PART if batch % _IMAGES_OF_PART == 0 else 1
    size = batch // parts
    return parts, size, max(round(size * (1 - rate)), 1)


def _parted(x: jax.Array, parts: int) -> jax.Array:
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])


def _merged(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    return x.at[rows].get(unique_indices=True, mode="promise_in_bounds")


def _add(x: jax.Array, rows: jax.Array, y: jax.Array) -> jax.Array:
    return x.at[rows].add(y.astype(x.dtype), unique_indices=True, mode="promise_in_bounds")


def _keep(x: jax.Array, rate: float, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def split(key: jax.Array | None, count: int) -> Sequence[jax.Array | None]:
    """Return keys for `count` random layers; without a key, `count` times None."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))


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
