"""Reading of pickled nested dicts of NumPy arrays: haiku parameters and state, and BYOL checkpoints.

BYOL (arXiv 2006.07733) stores a named tuple of the online and target parameters and states and the optimiser
state; its authors evaluate the online encoder, and `prefix=target` selects the other. Of `params` and
`ema_params`, the averaged ones are used. Keys are joined by slashes: `res_net50/~/initial_conv/w`.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dapt_jax.errors import UserError
from dapt_jax.weights import restricted
from dapt_jax.weights.nested import asks_for, refusals
from dapt_jax.weights.records import NumpyArray
from dapt_jax.weights.source import Stored, Weights

_DEPTH = 64


def read(path: Path) -> Weights:
    """Read the arrays of a pickle by path.

    Args:
        path: A pickle of nested dicts, of `(params, state)`, or of a BYOL experiment.

    Raises:
        UserError: The file is damaged or truncated, needs code, or contains no named arrays.
    """
    with refusals(path, "pickle of arrays"):
        with path.open("rb") as opened:
            file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        content = restricted.load(file)
        encoders, note = _encoders(content.value)
        made = [
            _arrays(path, each, note if number == 0 else "", content.unread)
            for number, each in enumerate(encoders)
        ]
    if not len(made[0]):
        if content.unread:
            raise asks_for(path, content.unread[0])
        raise UserError(f"{path}: a pickle without named arrays; expected nested dicts of NumPy arrays")
    if len(made) > 1:
        made[0].alternatives = {each.name: weights for each, weights in zip(encoders, made, strict=True)}
    return made[0]


class _Encoder(NamedTuple):
    """One encoder of a pickle: its dicts, its name in reports, and the name that selects it."""

    trees: list[Any]
    inside: str
    name: str


def _encoders(content: object) -> tuple[list[_Encoder], str]:
    """Return the encoders of a pickle, the default first, and the reason for this default."""
    state = content.get("experiment_state") if isinstance(content, dict) else None
    if isinstance(state, dict) and "online_params" in state:
        sides = [side for side in ("online", "target") if state.get(f"{side}_params")]
        made = [
            _Encoder(
                [state[f"{side}_params"], state.get(f"{side}_state")],
                f" ['experiment_state'] {side}_params, {side}_state",
                side,
            )
            for side in sides or ["online"]
        ]
        return made, "the online encoder, which BYOL's authors evaluate"
    if isinstance(content, dict) and isinstance(content.get("params"), dict):
        beside = [name for name in ("state", "batch_stats") if isinstance(content.get(name), dict)]
        made = []
        for start in ("ema_", ""):
            if isinstance(content.get(f"{start}params"), dict):
                own = [
                    f"{start}{name}" if isinstance(content.get(f"{start}{name}"), dict) else name
                    for name in beside
                ]
                names = [f"{start}params", *own]
                made.append(_Encoder([content[name] for name in names], f" {names}", names[0]))
        return made, "the averaged copy" if len(made) > 1 else ""
    if isinstance(content, tuple | list):
        return [_Encoder([each for each in content if isinstance(each, dict)], "", "")], ""
    return [_Encoder([content], "", "")], ""


def _arrays(path: Path, encoder: _Encoder, note: str, unread: tuple[str, ...]) -> Weights:
    found: dict[str, Stored] = {}
    for key, array in (pair for tree in encoder.trees for pair in _leaves(tree, "", _DEPTH)):
        if key in found:
            raise UserError(f"{path}: {key[:80]!r} is there twice")
        assert array.dtype is not None
        found[key] = Stored(array.shape, array.dtype, array.build)
    return Weights(found, f"{path}{encoder.inside}", path=path, note=note, unread=unread)


def _leaves(tree: object, path: str, depth: int) -> Iterator[tuple[str, NumpyArray]]:
    if isinstance(tree, NumpyArray):
        if tree.dtype is not None:
            yield path, tree
    elif isinstance(tree, dict):
        if not depth:
            raise UserError(f"{path[:80]!r}: dicts within dicts, {_DEPTH} deep; expected parameters")
        for key, value in tree.items():
            if isinstance(key, str):
                yield from _leaves(value, f"{path}/{key}" if path else key, depth - 1)
