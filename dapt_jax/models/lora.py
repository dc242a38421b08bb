"""Low-rank updates of kernels (LoRA, Hu et al., arXiv 2106.09685), merged into the kernels exactly.

Beside a kernel W lie two factors, `lora/down` A and `lora/up` B, and the layer computes W x + alpha / rank *
B (A x). The update is added to the output rather than to the kernel, so that the kernel's own gradient is
never computed. Of a k x k convolution A is a k x k convolution with `rank` channels, and B a 1 x 1 one.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax import ops
from dapt_jax.fields import check_fields, setting
from dapt_jax.models.initial import Tree
from dapt_jax.models.parameters import LoraDown, LoraUp

NAME = "lora"
"""Name of an update beside its kernel."""


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Size of low-rank updates: the section `adapt.lora`.

    >>> LoraSettings(rank=4, alpha=8).scale
    2.0

    Attributes:
        rank: Rank of every update.
        alpha: Numerator of the factor alpha / rank of every update.
    """

    rank: int = setting(8, at_least=1, doc="Rank of the low-rank updates.")
    alpha: float = setting(16.0, above=0, doc="Numerator of the updates' factor, alpha / rank.")

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def scale(self) -> float:
        """Factor of every update."""
        return self.alpha / self.rank


class LowRankUpdate(nnx.Module):
    """The update of one kernel."""

    def __init__(self, shape: Sequence[int], settings: LoraSettings):
        """Make the factors.

        Args:
            shape: Shape of the kernel, (..., in, out).
            settings: Rank and factor.
        """
        self.down = LoraDown(jnp.zeros((*shape[:-1], settings.rank)))
        self.up = LoraUp(jnp.zeros((settings.rank, shape[-1])))
        self.scale = settings.scale

    def dense(
        self, x: Float[Array, "*b c"], kernel: Float[Array, "c d"] | None = None
    ) -> Float[Array, "*b d"]:
        """Return the summand of a dense layer's output; with the layer's kernel, the sum with its product."""
        low, up = ops.product(x, self.down[...].astype(x.dtype)), self._scaled_up(x.dtype)
        return ops.product(low, up) if kernel is None else ops.sum_of_products(x, kernel, low, up)

    def conv(self, x: Float[Array, "b h w c"], *, stride: int, padding: Any) -> Float[Array, "b h2 w2 d"]:
        """Return the summand of a convolution's output."""
        low = ops.conv(x, self.down[...].astype(x.dtype), stride=stride, padding=padding)
        return ops.product(low, self._scaled_up(x.dtype))

    def _scaled_up(self, dtype: jnp.dtype) -> Float[Array, "r d"]:
        return self.scale * self.up[...].astype(dtype)


def with_updates(
    build: Callable[[], nnx.Module], kernels: Iterable[str], settings: LoraSettings
) -> nnx.Module:
    """Return a layer group's module with a low-rank update beside some of its kernels.

    Args:
        build: Function that returns the module.
        kernels: Paths of kernels inside the module, such as `attention/qkv/kernel`.
        settings: Rank and factor.
    """
    module = build()
    for path in kernels:
        layer: Any = module
        for part in path.split("/")[:-1]:
            layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
        layer.lora = nnx.data(LowRankUpdate(layer.kernel.shape, settings))
    return module


def merged(params: Tree, settings: LoraSettings) -> Tree:
    """Return parameters with every low-rank update added to its kernel, and without the factors.

    The sum is computed in float64 and rounded once. Parameters without updates are returned as they are.

    >>> layer = {"kernel": np.ones((2, 2)), "lora": {"down": np.ones((2, 1)), "up": np.ones((1, 2))}}
    >>> merged({"dense": layer}, LoraSettings(rank=1, alpha=0.5))["dense"]["kernel"].tolist()
    [[1.5, 1.5], [1.5, 1.5]]

    Args:
        params: Nested dict of parameters.
        settings: Rank and factor of the updates.
    """
    plain = {
        key: merged(value, settings) if isinstance(value, dict) else value
        for key, value in params.items()
        if key != NAME
    }
    if NAME in params:
        kernel = np.asarray(params["kernel"])
        down, up = (np.asarray(params[NAME][name], np.float64) for name in ("down", "up"))
        plain["kernel"] = (kernel + settings.scale * (down @ up)).astype(kernel.dtype)
    return plain
