"""The trainable parameters of a phase, and trees partitioned by them BEFORE the gradient.

A frozen leaf is never an argument of `value_and_grad`, so autodiff builds no backward pass for it, nor for
anything below the first trained leaf. This module knows paths, kinds and group names of parameters, not
models.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from dapt_jax.errors import UserError, nearest
from dapt_jax.parameters import BatchNormMode, Kind, LayerNormMode
from dapt_jax.training.patterns import expanded, matches, select
from dapt_jax.training.phases import ByGroup, Phase

Tree = dict[str, Any]
FROZEN = "frozen"

T = TypeVar("T")


def path_name(path: Sequence[Any]) -> str:
    """Return a jax key path of nested dicts as a slash-separated string."""
    return "/".join(str(key.key) for key in path)


def paths(tree: Tree) -> tuple[str, ...]:
    """Return the paths of all leaves of a nested dict, in tree order."""
    return tuple(path_name(path) for path, _ in jax.tree.leaves_with_path(tree))


def group_of(path: str, groups: Iterable[str]) -> str:
    """Return the layer group that a parameter path belongs to."""
    return next(group for group in groups if path.startswith(f"{group}/"))


@dataclasses.dataclass(frozen=True)
class TrainableSpec:
    """Trainable parameters of a phase, resolved against a model; static and hashable as a jit key.

    Attributes:
        trainable: Paths of the parameters that train.
        batch_norm: (group, mode) of every layer group whose batch norm runs on batch statistics, in order.
        boundary: Index of the first group that trains a parameter or whose batch norm runs on batch
            statistics; all groups before it are the prefix.
        lr_multipliers: (path, factor) of every parameter whose learning rate is not the phase's own, by path.
    """

    trainable: frozenset[str]
    batch_norm: tuple[tuple[str, BatchNormMode], ...]
    boundary: int
    lr_multipliers: tuple[tuple[str, float], ...] = ()

    @property
    def batch_norm_modes(self) -> dict[str, BatchNormMode]:
        """Mode of batch norm by group; groups that are not named are frozen."""
        return dict(self.batch_norm)


def resolve_trainable(phase: Phase, groups: Sequence[str], kinds: Mapping[str, Kind]) -> TrainableSpec:
    """Resolve a phase's patterns against a model.

    >>> from dapt_jax.models.classifier import Classifier
    >>> from dapt_jax.models.registry import build
    >>> model = Classifier(build("resnet18"), outputs=2)
    >>> spec = resolve_trainable(Phase("head", 1, trainable=("head",), lr=1e-3), model.groups, model.kinds)
    >>> sorted(spec.trainable)
    ['head/bias', 'head/kernel']

    Scale and bias of a norm are left out where the phase freezes that norm: `("*",)` means every parameter
    but those of frozen batch norm.

    Args:
        phase: The phase.
        groups: The model's layer groups in order, head last.
        kinds: Kind of every parameter and running statistic by path: `model.kinds`.

    Raises:
        UserError: A pattern matches no parameter or group, or only a frozen norm; a learning-rate pattern
            matches no trainable parameter; or nothing is trainable.
    """
    parameters = {path: kind for path, kind in kinds.items() if not kind.is_statistic}
    where = f"phase {phase.name!r}:"
    matched = {pattern: select(pattern, parameters, groups, where) for pattern in phase.trainable}
    wanted = {path for found in matched.values() for path in found}
    training = {group_of(path, groups) for path in wanted}
    batch_norm: dict[str, BatchNormMode] = _by_group(phase, "batch_norm", phase.batch_norm, groups, training)
    modes = {group: batch_norm[group] for group in groups if batch_norm.get(group) in ("stats", "train")}
    layer_norm: dict[str, LayerNormMode] = _by_group(phase, "layer_norm", phase.layer_norm, groups, training)

    def is_frozen(path: str) -> bool:
        group = group_of(path, groups)
        if kinds[path].is_batch_norm:
            return batch_norm.get(group) not in ("affine", "train")
        return kinds[path].is_layer_norm and layer_norm.get(group) == "frozen"

    frozen = {path for path in wanted if is_frozen(path)}
    for pattern, found in matched.items():
        _refuse_frozen_norms(phase, pattern, found, frozen, groups, kinds)
    trainable = frozenset(wanted - frozen)
    if not trainable:
        raise UserError(
            f"phase {phase.name!r} trains nothing: {', '.join(phase.trainable)} holds "
            f"{_whose_norm(frozen, kinds)}"
        )
    active = {group_of(path, groups) for path in trainable} | set(modes)
    boundary = next(index for index, group in enumerate(groups) if group in active)
    multipliers = _lr_multipliers(phase, groups, kinds, trainable)
    return TrainableSpec(trainable, tuple(modes.items()), boundary, multipliers)


def _by_group(
    phase: Phase, name: str, modes: T | ByGroup[T], groups: Sequence[str], training: Collection[str]
) -> dict[str, T]:
    """Return the norm mode by layer group: one mode for all trained groups, or modes by pattern."""
    if not isinstance(modes, tuple):
        return {group: modes for group in groups if group in training}
    by_group: dict[str, T] = {}
    for pattern, mode in modes:
        members = expanded(pattern, f"phase {phase.name!r}: {name} pattern {pattern!r}")
        named = [group for group in groups if any(matches(group, member) for member in members)]
        if not named:
            raise UserError(
                f"phase {phase.name!r}: {name} pattern {pattern!r} matches no layer group; "
                f"{nearest(pattern, groups)}"
            )
        by_group.update(dict.fromkeys(named, mode))
    return by_group


def _refuse_frozen_norms(
    phase: Phase,
    pattern: str,
    found: Sequence[str],
    frozen: Collection[str],
    groups: Sequence[str],
    kinds: Mapping[str, Kind],
) -> None:
    """Refuse a pattern that picks frozen norms, and nothing else, out of a layer group.

    `*/bias` in a network whose convolutions have no biases is such a pattern; the name of a group that
    consists of a norm is not.
    """
    members = [path for path, kind in kinds.items() if not kind.is_statistic]
    for group in groups:
        own = [path for path in found if path.startswith(f"{group}/")]
        if not own or not all(path in frozen for path in own):
            continue
        if len(own) < sum(path.startswith(f"{group}/") for path in members):
            raise UserError(
                f"phase {phase.name!r}: pattern {pattern!r} matches in {group!r} {_whose_norm(own, kinds)}"
            )


def _whose_norm(frozen: Iterable[str], kinds: Mapping[str, Kind]) -> str:
    """Return the end of an error line about parameters that all belong to frozen norms."""
    name = "batch norm" if any(kinds[path].is_batch_norm for path in frozen) else "layer norm"
    mode = "'affine' or 'train'" if name == "batch norm" else "'train'"
    return (
        f"only parameters of {name}, which do not train under this setting; "
        f"expected another pattern or {name.replace(' ', '_')}={mode}"
    )


def _lr_multipliers(
    phase: Phase, groups: Sequence[str], kinds: Mapping[str, Kind], trainable: Collection[str]
) -> tuple[tuple[str, float], ...]:
    """Return the factors of a phase's learning rate by parameter; a factor of 1 is left out."""
    factors: dict[str, float] = {}
    pool = {path: kinds[path] for path in sorted(trainable)}
    training = [group for group in groups if any(path.startswith(f"{group}/") for path in trainable)]
    for pattern, factor in phase.lr_multipliers:
        where = f"phase {phase.name!r}: lr_multipliers"
        found = select(pattern, pool, training, where, "parameter that trains")
        factors.update(dict.fromkeys(found, factor))
    return tuple(sorted((path, factor) for path, factor in factors.items() if factor != 1))


def partition(tree: Tree, trainable: Iterable[str]) -> tuple[Tree, Tree]:
    """Split a nested dict into trainable and frozen leaves with the same keys; None elsewhere.

    None is an empty pytree in JAX, so `value_and_grad` over the first tree sees only the trained leaves.
    """
    chosen = frozenset(trainable)
    train = jax.tree.map_with_path(lambda path, leaf: leaf if path_name(path) in chosen else None, tree)
    rest = jax.tree.map_with_path(lambda path, leaf: None if path_name(path) in chosen else leaf, tree)
    return train, rest


def combine(train: Tree, rest: Tree) -> Tree:
    """Invert `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, train, rest, is_leaf=lambda leaf: leaf is None)


def prune(tree: Tree) -> Tree:
    """Return a nested dict without None leaves and without dicts that become empty."""
    kept: Tree = {}
    for key, value in tree.items():
        inner = prune(value) if isinstance(value, dict) else value
        if inner is not None and not (isinstance(inner, dict) and not inner):
            kept[key] = inner
    return kept


def overlay(tree: Tree, part: Tree) -> Tree:
    """Return a nested dict with the leaves in `part`, which may be partial, replaced."""
    return {
        key: overlay(value, part[key]) if isinstance(value, dict) and key in part else part.get(key, value)
        for key, value in tree.items()
    }


def count(tree: Tree, chosen: Iterable[str] | None = None) -> int:
    """Count the values in a nested dict of arrays or shapes, of all leaves or of the chosen paths."""
    wanted = None if chosen is None else frozenset(chosen)
    return sum(
        int(np.prod(leaf.shape))
        for path, leaf in jax.tree.leaves_with_path(tree)
        if wanted is None or path_name(path) in wanted
    )


def count_by_group(tree: Tree, groups: Sequence[str], chosen: Iterable[str]) -> Mapping[str, tuple[int, int]]:
    """Count, per layer group, (values that train, values in all)."""
    wanted = frozenset(chosen)
    counts = dict.fromkeys(groups, (0, 0))
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = path_name(path)
        group, size = group_of(name, groups), int(np.prod(leaf.shape))
        train, total = counts[group]
        counts[group] = (train + size * (name in wanted), total + size)
    return counts
