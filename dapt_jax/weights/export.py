"""Writes weights for other tools and for `locate.load`: flat paths as keys, layouts as here (HWIO, in x out)."""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from dapt_jax.errors import UserError
from dapt_jax.weights.paths import flatten

SUFFIXES = (".safetensors", ".npz")


def write(path: str | Path, params: dict[str, Any], stats: dict[str, Any]) -> None:
    """Writes parameters and batch-norm statistics to one file.

    Args:
        path: where to; its suffix decides the format, `.safetensors` or `.npz`.
        params: nested dict of arrays.
        stats: likewise; its leaves (`mean`, `var`) share no path with those of `params`.

    Raises:
        UserError: the suffix is neither of the two.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: weights are written as {' or '.join(SUFFIXES)}")
    arrays: dict[str, Any] = {
        key: np.ascontiguousarray(leaf) for key, leaf in (flatten(params) | flatten(stats)).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial{path.suffix}")
    if path.suffix == ".npz":
        np.savez(partial, **arrays)
    else:
        safetensors.numpy.save_file(arrays, partial)
    partial.replace(path)  # all of it or nothing, should the process be killed half-way
