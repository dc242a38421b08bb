"""Reads pickles of nested dicts of NumPy arrays: haiku's parameters and state, BYOL's checkpoints among them.

BYOL (arXiv 2006.07733) keeps a named tuple of online and target parameters and states and the optimiser's; the online
encoder is the one that its authors evaluate. Keys are joined by slashes: `res_net50/~/initial_conv/w`.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dapt_jax.errors import UserError
from dapt_jax.weights import restricted
from dapt_jax.weights.records import NumpyArray
from dapt_jax.weights.source import Stored, Weights
from dapt_jax.weights.torch_pickle import refusals

_DEPTH = 64


def read(path: Path) -> Weights:
    """Reads the arrays of a pickle by path.

    Args:
        path: a pickle of nested dicts, of `(params, state)`, or of BYOL's experiment.

    Raises:
        UserError: the file is damaged or cut short, asks for code, or holds no named arrays.
    """
    with refusals(path, "pickle of arrays"):
        with path.open("rb") as opened:
            file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        content = restricted.load(file)[0]
        trees, inside = _trees(content)
        found: dict[str, Stored] = {}
        for key, array in (pair for tree in trees for pair in _leaves(tree, "", _DEPTH)):
            if key in found:
                raise UserError(f"{path}: {key[:80]!r} is there twice")
            found[key] = Stored(array.shape, array.dtype, array.build)
    if not found:
        raise UserError(f"{path}: a pickle without named arrays; expected nested dicts of NumPy arrays")
    return Weights(found, f"{path}{inside}")


def _trees(content: Any) -> tuple[list[Any], str]:
    """The dicts that hold the encoder, and what reports call them."""
    state = content.get("experiment_state") if isinstance(content, dict) else None
    if isinstance(state, dict) and "online_params" in state:
        return [state["online_params"], state.get("online_state")], " ['experiment_state'] online_params, online_state"
    if isinstance(content, dict) and isinstance(content.get("params"), dict):
        names = [name for name in ("params", "state", "batch_stats") if isinstance(content.get(name), dict)]
        return [content[name] for name in names], f" {names}"
    if isinstance(content, tuple | list):
        return [each for each in content if isinstance(each, dict)], ""
    return [content], ""


def _leaves(tree: Any, path: str, depth: int) -> Iterator[tuple[str, NumpyArray]]:
    if isinstance(tree, NumpyArray):
        yield path, tree
    elif isinstance(tree, dict):
        if not depth:
            raise UserError(f"{path[:80]!r}: dicts within dicts, {_DEPTH} deep; expected parameters")
        for key, value in tree.items():
            if isinstance(key, str):
                yield from _leaves(value, f"{path}/{key}" if path else key, depth - 1)
