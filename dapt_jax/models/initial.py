"""Initial values of parameters."""

import zlib
from typing import Any

import jax
import numpy as np

Tree = dict[str, Any]


def init_params(tree: Tree, seed: int) -> Tree:
    """Initial values for a nested dict of shapes, each from (seed, path) alone.

    Drawn with numpy: the same on every backend, and no compilation for values that pretrained weights replace anyway.
    A leaf's name decides: `kernel` is normal with variance 2 / fan-out for convolutions (He et al., arXiv 1502.01852) and
    1 / fan-in for dense layers; `scale` and `var` are one; `bias` and `mean` are zero; `gamma`, the scale of a residual
    branch, is 1e-6 (Liu et al., arXiv 2201.03545); tokens, positions and attention's biases are normal with deviation
    0.02 (Dosovitskiy et al., arXiv 2010.11929). A module whose name starts with `depthwise` has one input per output.

    Args:
        tree: nested dict of `jax.ShapeDtypeStruct`.
        seed: any non-negative integer.
    """

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [key.key for key in path]
        if names[-1] in ("scale", "var"):
            return np.ones(leaf.shape, leaf.dtype)
        if names[-1] in ("bias", "mean"):
            return np.zeros(leaf.shape, leaf.dtype)
        if names[-1] == "gamma":
            return np.full(leaf.shape, 1e-6, leaf.dtype)
        rng = np.random.default_rng([seed, zlib.crc32("/".join(map(str, names)).encode())])
        if names[-1] != "kernel":
            variance = 0.02**2
        elif len(leaf.shape) == 4:
            height, width, _, out = leaf.shape
            variance = 2.0 / (height * width * (1 if names[-2].startswith("depthwise") else out))
        else:
            variance = 1.0 / leaf.shape[0]
        return (rng.standard_normal(leaf.shape, np.float32) * np.sqrt(variance)).astype(leaf.dtype)

    return jax.tree.map_with_path(one, tree)
