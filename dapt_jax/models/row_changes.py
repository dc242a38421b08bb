"""Training of some outputs of a dense layer alone (APLA, arXiv 2503.11335), merged into its kernel exactly.

APLA trains a random subset of the rows of a weight (out, in), which are columns of a kernel (in, out) here,
with their biases. Beside the kernel lie their changes, `rows/kernel` and `rows/bias`, which start at zero; so
there is no gradient, moment or checkpoint of the outputs that stay.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax import ops
from dapt_jax.fields import check_fields, setting
from dapt_jax.models.initial import Tree
from dapt_jax.models.parameters import RowsBias, RowsKernel

NAME = "rows"
"""Name of the changes beside their kernel."""

Outputs = tuple[int, ...]
"""Numbers of the outputs that train, ascending."""


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """Rows of kernels that train: the section `adapt.rows`.

    >>> RowSettings(number=2).drawn("block1/attention/project/kernel", 8)
    (0, 2)

    Attributes:
        number: Number of rows of every kernel.
        seed: Seed of their choice, the same for all seeds of a study.
    """

    number: int = setting(8, at_least=1, doc="Rows of a dense layer's weight (out, in) that apla trains.")
    seed: int = setting(0, at_least=0, doc="Seed of the choice of rows, one for all seeds of a study.")

    def __post_init__(self) -> None:
        check_fields(self)

    def drawn(self, path: str, outputs: int) -> Outputs:
        """Return the outputs of a kernel that train, a function of seed and path alone.

        Args:
            path: Path of the kernel.
            outputs: Its outputs, more than `number`.
        """
        rng = np.random.default_rng([self.seed, zlib.crc32(path.encode())])
        return tuple(sorted(rng.choice(outputs, self.number, replace=False).tolist()))


DEFAULT_ROWS = RowSettings()


class RowChanges(nnx.Module):
    """Changes of some outputs of one dense layer."""

    def __init__(self, inputs: int, outputs: Outputs, *, bias: bool):
        """Make the changes.

        Args:
            inputs: Inputs of the layer.
            outputs: Its outputs that train.
            bias: Whether the layer has a bias.
        """
        self.kernel = RowsKernel(jnp.zeros((inputs, len(outputs))))
        self.bias = RowsBias(jnp.zeros(len(outputs))) if bias else None
        self.outputs = outputs

    def product(self, x: Float[Array, "*b c"], kernel: Float[Array, "c d"]) -> Float[Array, "*b d"]:
        """Return the product with the changed kernel."""
        return _product(x, kernel, self.kernel[...], self.outputs)

    def changed_bias(self, bias: Float[Array, " d"]) -> Float[Array, " d"]:
        """Return the changed bias."""
        return bias if self.bias is None else bias.at[jnp.asarray(self.outputs)].add(self.bias[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: jax.Array, kernel: jax.Array, change: jax.Array, outputs: Outputs) -> jax.Array:
    """Return `x` times a kernel (in, out) of which some outputs are changed by `change` (in, r).

    The gradient of `change` is computed from these outputs alone, which autodiff would gather from that of the
    whole kernel.
    """
    return _forward(x, kernel, change, outputs)[0]


def _forward(
    x: jax.Array, kernel: jax.Array, change: jax.Array, outputs: Outputs
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    full = kernel.at[:, jnp.asarray(outputs)].add(change).astype(x.dtype)
    return x @ full, (x, full)


def _backward(
    outputs: Outputs, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, full = kept
    gradient = ops.materialised(gradient)
    flat = x.reshape(-1, x.shape[-1])

    def of_kernel(part: jax.Array) -> jax.Array:
        return (flat.T @ part.reshape(-1, part.shape[-1])).astype(jnp.float32)

    return gradient @ full.T, of_kernel(gradient), of_kernel(gradient[..., jnp.asarray(outputs)])


_product.defvjp(_forward, _backward)


def with_rows(build: Callable[[], nnx.Module], rows: Iterable[tuple[str, Outputs]]) -> nnx.Module:
    """Return a layer group's module with changes of some outputs beside some of its kernels.

    Args:
        build: Function that returns the module.
        rows: Path of each kernel inside the module, such as `attention/project/kernel`, and its outputs.
    """
    module = build()
    for path, outputs in rows:
        layer: Any = module
        for part in path.split("/")[:-1]:
            layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
        layer.rows = nnx.data(RowChanges(layer.kernel.shape[0], outputs, bias=layer.bias is not None))
    return module


def merged(params: Tree, rows: Mapping[str, Outputs], above: str = "") -> Tree:
    """Return parameters with every change added to its kernel and bias, and without the changes.

    >>> layer = {"kernel": np.ones((1, 3)), "rows": {"kernel": np.full((1, 1), 2.0)}}
    >>> merged({"dense": layer}, {"dense/kernel": (1,)})["dense"]["kernel"].tolist()
    [[1.0, 3.0, 1.0]]

    Args:
        params: Nested dict of parameters.
        rows: Outputs by path of their kernel.
        above: Start of the paths in `params`.
    """
    plain = {
        key: merged(value, rows, f"{above}{key}/") if isinstance(value, dict) else value
        for key, value in params.items()
        if key != NAME
    }
    for leaf, change in params.get(NAME, {}).items():
        whole = np.array(params[leaf])
        whole[..., list(rows[f"{above}kernel"])] += np.asarray(change)
        plain[leaf] = whole
    return plain
