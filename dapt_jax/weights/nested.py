"""Search for arrays in a checkpoint's nested dicts, from any training script, named by their paths.

A chain of dicts of which each is the only one with arrays (`{'model': {'state_dict': ...}}`) is followed to
its end, and the names in the last dict are the keys. If several dicts contain arrays side by side (`student`
and `teacher`, `state_dict` and `state_dict_ema`), their names are prefixes of the keys; `encoders`, not the
reader, selects among them. Everything that belongs to the training and not to a network (optimisers, losses,
callbacks, hyper-parameters) is left out.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from dapt_jax.errors import UserError
from dapt_jax.weights.records import Module, NumpyArray, Refused, TensorRecord
from dapt_jax.weights.restricted import Content
from dapt_jax.weights.source import Stored, Weights

_BESIDE = frozenset((
    "optimizer", "optimizers", "optimiser", "optimisers", "optim", "scheduler", "schedulers", "scaler",
    "scalers", "loss", "losses", "criterion", "callbacks", "loops", "hyper", "hparams", "hparam",
    "args", "cfg", "config", "meta", "rng", "hub", "metrics", "trainer",
))  # fmt: skip
"""Words in the names of dicts that contain no network."""
_DEPTH = 16
Tree = dict[str, Any]
"""Arrays, and dicts of them, by name."""


def weights(
    content: Content, path: Path, stored: Callable[[TensorRecord | NumpyArray], Stored], what: str
) -> Weights:
    """Return the arrays of a pickle.

    Args:
        content: Contents of the pickle.
        path: The file.
        stored: Function from the record of an array to the array.
        what: Name of the file's kind in an error.

    Raises:
        UserError: There are no arrays; the line says what the file contains instead.
    """
    tree = _tree(content.value, _DEPTH, set())
    if not tree:
        raise _without(content, path, what)
    inside, tree = _descend(tree)
    if averaged := _swapped(tree, content.value, inside):
        return _mmengine(averaged, tree, path, inside, stored, content)
    found: dict[str, Stored] = {}
    containers = []
    for name, node in tree.items():
        if not isinstance(node, dict):
            found[_once(name, found, path)] = stored(node)
            continue
        chain, node = _descend(node)
        containers.append(".".join((name, *chain)))
        for key, record in _leaves(node, f"{containers[-1]}."):
            found[_once(key, found, path)] = stored(record)
    return Weights(found, _origin(path, inside), path=path, containers=containers, unread=content.unread)


def _once(key: str, found: dict[str, Stored], path: Path) -> str:
    if key in found:
        raise UserError(f"{path}: {key[:80]!r} is there twice")
    return key


def _origin(path: Path, inside: tuple[str, ...]) -> str:
    return " ".join([str(path), *(f"[{key[:80]!r}]" for key in inside)])


def _tree(node: object, depth: int, seen: set[int]) -> Tree:
    """Return the dicts with arrays at any depth; a repeated dict is only used at its first place."""
    if isinstance(node, Module):
        return {key: each for key, each in _parts(node, "", seen) if _is_array(each)}
    if not isinstance(node, dict) or not depth or id(node) in seen:
        return {}
    seen.add(id(node))
    found: Tree = {}
    for key, value in node.items():
        if not isinstance(key, str):
            continue
        if _is_array(value):
            found[key] = value
        elif inner := _tree(value, depth - 1, seen):
            found[key] = inner
    return found


def _is_array(value: object) -> bool:
    return isinstance(value, TensorRecord) or (isinstance(value, NumpyArray) and value.dtype is not None)


def _parts(module: Module, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a completely pickled network, named as in its state dict.

    A module that is used twice is read once.
    """
    seen.add(id(module))
    for key, part in module.items():
        if not isinstance(part, Module):
            yield f"{path}{key}", part
        elif id(part) not in seen:
            yield from _parts(part, f"{path}{key}.", seen)


def _descend(tree: Tree) -> tuple[tuple[str, ...], Tree]:
    """Follow dicts of which each alone contains a network; return their names and the last dict."""
    inside: list[str] = []
    while True:
        dicts = {key: value for key, value in tree.items() if isinstance(value, dict)}
        arrays = {key: value for key, value in tree.items() if key not in dicts}
        if networks := {key: value for key, value in dicts.items() if not _is_beside(key)}:
            # A scalar that a script records (an accuracy, a temperature) is not a network either.
            arrays = {key: value for key, value in arrays.items() if value.shape}
            dicts = networks
        elif arrays:
            dicts = {}
        if arrays or len(dicts) != 1:
            return tuple(inside), arrays | dicts
        ((key, tree),) = dicts.items()
        inside.append(key)


def _is_beside(name: str) -> bool:
    return name == "opt" or not _BESIDE.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _leaves(tree: Tree, path: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _swapped(tree: Tree, content: object, inside: tuple[str, ...]) -> str:
    """Return the name of the averaged copy if mmengine swapped it with the trained weights.

    mmengine saves the averaged copy as `state_dict`, and the trained weights under the other name.

    See `before_save_checkpoint` in mmengine/hooks/ema_hook.py (open-mmlab/mmengine, Apache-2.0).
    """
    meta = content.get("meta") if isinstance(content, dict) else None
    is_signed = isinstance(meta, dict) and "mmengine_version" in meta
    is_mmengine = not inside and isinstance(content, dict) and ("message_hub" in content or is_signed)
    both = all(isinstance(tree.get(name), dict) for name in ("state_dict", "ema_state_dict"))
    return "state_dict" if is_mmengine and both else ""


def _mmengine(
    averaged: str,
    tree: Tree,
    path: Path,
    inside: tuple[str, ...],
    stored: Callable[[TensorRecord | NumpyArray], Stored],
    content: Content,
) -> Weights:
    made = {
        name: Weights(
            {key: stored(record) for key, record in _leaves(node, "")},
            _origin(path, (*inside, name)),
            path=path,
            unread=content.unread,
        )
        for name, node in tree.items()
        if isinstance(node, dict)
    }
    main = made[averaged]
    main.alternatives = dict(made)
    main.note = "the averaged copy, which mmengine saves there"
    return main


def _without(content: Content, path: Path, what: str) -> UserError:
    if content.unread:
        return asks_for(path, content.unread[0])
    value = content.value
    found = (
        ", ".join(repr(key)[:60] for key in list(value)[:6])
        if isinstance(value, dict)
        else type(value).__name__
    )
    return UserError(f"{path}: no named {what} in it; it holds {found or 'nothing'}")


def asks_for(path: Path, what: str) -> UserError:
    """Return the error for a pickle without arrays, or one that needs code that no weights need."""
    return UserError(
        f"{path}: the file asks for {what}; only arrays, OrderedDict and plain containers are read "
        "(save the model's state_dict() instead)"
    )


class refusals:  # noqa: N801  reads as a statement
    """Conversion of any exception while reading a pickle to one clear line."""

    def __init__(self, path: Path, what: str):
        self.path, self.what = path, what

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Refused):
            raise asks_for(self.path, " ".join(str(error).split())[:200]) from None
        if isinstance(error, OSError):
            raise UserError(f"{self.path}: {error.strerror or error}") from None
        if isinstance(error, Exception) and not isinstance(error, UserError):
            # A damaged pickle raises nearly any exception, from EOFError to UnicodeDecodeError.
            told = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            raise UserError(f"{self.path}: damaged or cut short, or not a {self.what} ({told})") from None
