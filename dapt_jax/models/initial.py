"""Initial values of parameters and statistics, by their kind."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dapt_jax.parameters import Kind

Tree = dict[str, Any]

_CONSTANTS = {
    Kind.BIAS: 0.0,
    Kind.BATCH_NORM_SCALE: 1.0,
    Kind.BATCH_NORM_BIAS: 0.0,
    Kind.LAYER_NORM_SCALE: 1.0,
    Kind.LAYER_NORM_BIAS: 0.0,
    Kind.LAYER_SCALE: 1e-6,
    Kind.LORA_UP: 0.0,
    Kind.ROWS_KERNEL: 0.0,
    Kind.ROWS_BIAS: 0.0,
    Kind.RUNNING_MEAN: 0.0,
    Kind.RUNNING_VARIANCE: 1.0,
}


def init_params(tree: Tree, kinds: Mapping[str, Kind], seed: int) -> Tree:
    """Return initial values for a nested dict of shapes, each a function of (seed, path) alone.

    They are drawn with NumPy, so that they agree on every backend, and need no compilation for values that
    pretrained weights replace anyway. Kernels are normal, with variance 2 / fan-out for convolutions (He et
    al., arXiv 1502.01852) and 1 / fan-in for dense layers. Layer scale is 1e-6 (Liu et al., arXiv
    2201.03545). Tokens, positions and relative position biases are normal with standard deviation 0.02
    (Dosovitskiy et al., arXiv 2010.11929). Scales and running variances are one; biases and running means
    zero.

    Args:
        tree: Nested dict of `jax.ShapeDtypeStruct`.
        kinds: Kind of every leaf by slash-separated path.
        seed: Any non-negative integer.
    """

    def one(key_path: Sequence[jax.tree_util.DictKey], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        path = "/".join(str(key.key) for key in key_path)
        kind = kinds[path]
        if kind in _CONSTANTS:
            return np.full(leaf.shape, _CONSTANTS[kind], leaf.dtype)
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        deviation = np.sqrt(_variance(kind, leaf.shape))
        return (rng.standard_normal(leaf.shape, np.float32) * deviation).astype(leaf.dtype)

    return jax.tree.map_with_path(one, tree)


def _variance(kind: Kind, shape: tuple[int, ...]) -> float:
    if kind in (Kind.CONV_KERNEL, Kind.GROUPED_KERNEL):
        height, width, _, outputs = shape
        return 2.0 / (height * width * outputs)
    if kind is Kind.DEPTHWISE_KERNEL:
        return 2.0 / (shape[0] * shape[1])
    if kind in (Kind.DENSE_KERNEL, Kind.LORA_DOWN):
        return 1.0 / float(np.prod(shape[:-1]))
    return 0.02**2
