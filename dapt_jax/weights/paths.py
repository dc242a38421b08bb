"""Conversion between nested dicts and flat `stage1/block1/conv1/kernel` paths."""

from collections.abc import Mapping
from typing import Any

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves by slash-separated path, in the order of the tree."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{path}": leaf for path, leaf in flatten(value).items()})
        else:
            flat[str(key)] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Return the nested dict of flat paths, the inverse of `flatten`."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
