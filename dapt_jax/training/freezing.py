"""Which parameters a phase trains: masks as sets of paths, and trees partitioned by them BEFORE the gradient.

A frozen leaf never meets `value_and_grad`: autodiff then builds no backward pass for it, nor for anything below the
first trained leaf. Knows parameter paths and group names, not models; a path component that starts with `norm` marks
the parameters of a normalisation layer.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dapt_jax.errors import UserError, nearest
from dapt_jax.training.phases import Norm, Phase

Tree = dict[str, Any]
FROZEN = "frozen"


def path_name(path: Sequence[Any]) -> str:
    """A jax key path of nested dicts as a slash-separated string."""
    return "/".join(str(key.key) for key in path)


def paths(tree: Tree) -> tuple[str, ...]:
    """The paths of all leaves of a nested dict, in tree order."""
    return tuple(path_name(path) for path, _ in jax.tree.leaves_with_path(tree))


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern speaks of a path: as a glob over the whole path, or over a leading part of it."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern.rstrip('/')}/*")


def is_norm(path: str) -> bool:
    """Whether a path belongs to a normalisation layer."""
    return any(part.startswith("norm") for part in path.split("/")[:-1])


def group_of(path: str, groups: Iterable[str]) -> str:
    """The layer group that a parameter path belongs to."""
    return next(group for group in groups if path.startswith(f"{group}/"))


@dataclasses.dataclass(frozen=True)
class TrainableSpec:
    """What a phase trains, resolved against a model: static and hashable, so one mask means one executable.

    Attributes:
        trainable: paths of the parameters that train.
        norms: batch-norm mode of every encoder group that is not frozen.
        boundary: index of the first group that trains something or whose norm is not frozen; all before is the prefix.
        rates: path and factor of every parameter whose learning rate is not the phase's own, by path.
    """

    trainable: frozenset[str]
    norms: tuple[tuple[str, Norm], ...]
    boundary: int
    rates: tuple[tuple[str, float], ...] = ()

    @property
    def norm_modes(self) -> dict[str, Norm]:
        """Batch-norm mode by group; groups not named are frozen."""
        return dict(self.norms)


def resolve_trainable(phase: Phase, groups: Sequence[str], parameter_paths: Sequence[str]) -> TrainableSpec:
    """Resolves a phase's patterns against a model.

    Args:
        phase: the phase.
        groups: the model's layer groups in order, head last.
        parameter_paths: the paths of all its parameters.

    Raises:
        UserError: a pattern matches no parameter or no group, one of a rate none that trains, or nothing is left to train.
    """
    wanted: set[str] = set()
    for pattern in phase.trainable:
        found = [path for path in parameter_paths if matches(path, pattern)]
        if not found:
            hint = _near(pattern, groups, parameter_paths)
            raise UserError(f"phase {phase.name!r}: pattern {pattern!r} matches no parameter; {hint}")
        wanted.update(found)
    modes: dict[str, Norm]
    if isinstance(phase.norm, str):
        training = {group_of(path, groups) for path in wanted}
        modes = {group: phase.norm for group in groups if group in training and phase.norm != "frozen"}
    else:
        modes = {}
        for pattern, mode in phase.norm:
            named = [group for group in groups if matches(group, pattern)]
            if not named:
                hint = nearest(pattern, groups)
                raise UserError(f"phase {phase.name!r}: norm pattern {pattern!r} matches no layer group; {hint}")
            modes.update(dict.fromkeys(named, mode))
        modes = {group: mode for group, mode in modes.items() if mode != "frozen"}
    trainable = frozenset(path for path in wanted if not is_norm(path) or modes.get(group_of(path, groups)) == "train")
    if not trainable:
        raise UserError(
            f"phase {phase.name!r} trains nothing: {', '.join(phase.trainable)} holds batch norm only "
            "and norm is not 'train'; expected another pattern or norm='train'"
        )
    active = {group_of(path, groups) for path in trainable} | set(modes)
    boundary = next(index for index, group in enumerate(groups) if group in active)
    ordered = tuple((group, modes[group]) for group in groups if group in modes)
    return TrainableSpec(trainable, ordered, boundary, _rates(phase, groups, trainable))


def _rates(phase: Phase, groups: Sequence[str], trainable: Iterable[str]) -> tuple[tuple[str, float], ...]:
    """The factors of a phase by parameter; a factor of 1 is as good as none."""
    factors: dict[str, float] = {}
    for pattern, factor in phase.rates:
        found = [path for path in trainable if matches(path, pattern)]
        if not found:
            training = [group for group in groups if any(path.startswith(f"{group}/") for path in trainable)]
            hint = _near(pattern, training, sorted(trainable))
            raise UserError(f"phase {phase.name!r}: rates pattern {pattern!r} matches no parameter that trains; {hint}")
        factors.update(dict.fromkeys(found, factor))
    return tuple(sorted((path, factor) for path, factor in factors.items() if factor != 1))


def _near(pattern: str, groups: Sequence[str], parameter_paths: Iterable[str]) -> str:
    """The stages, groups and paths that a pattern that matches nothing may have meant."""
    stages = dict.fromkeys(group.split("/")[0] for group in groups)
    return nearest(pattern, dict.fromkeys([*stages, *groups, *parameter_paths]))


def partition(tree: Tree, trainable: Iterable[str]) -> tuple[Tree, Tree]:
    """Splits a nested dict in two of the same keys: the leaves that train, and the rest; None where a leaf is not.

    None is an empty pytree to jax: `value_and_grad` over the first tree sees the trained leaves alone.
    """
    chosen = frozenset(trainable)
    train = jax.tree.map_with_path(lambda path, leaf: leaf if path_name(path) in chosen else None, tree)
    rest = jax.tree.map_with_path(lambda path, leaf: None if path_name(path) in chosen else leaf, tree)
    return train, rest


def combine(train: Tree, rest: Tree) -> Tree:
    """The inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, train, rest, is_leaf=lambda leaf: leaf is None)


def prune(tree: Tree) -> Tree:
    """A nested dict without its None leaves and without dicts left empty."""
    kept: Tree = {}
    for key, value in tree.items():
        inner = prune(value) if isinstance(value, dict) else value
        if inner is not None and not (isinstance(inner, dict) and not inner):
            kept[key] = inner
    return kept


def overlay(tree: Tree, part: Tree) -> Tree:
    """A nested dict with the leaves of `part` in place of its own; `part` may hold some of the keys only."""
    return {
        key: overlay(value, part[key]) if isinstance(value, dict) and key in part else part.get(key, value)
        for key, value in tree.items()
    }


def count(tree: Tree, chosen: Iterable[str] | None = None) -> int:
    """Number of values in a nested dict of arrays or shapes, of all leaves or of the chosen paths."""
    wanted = None if chosen is None else frozenset(chosen)
    return sum(
        int(np.prod(leaf.shape))
        for path, leaf in jax.tree.leaves_with_path(tree)
        if wanted is None or path_name(path) in wanted
    )


def count_by_group(tree: Tree, groups: Sequence[str], chosen: Iterable[str]) -> Mapping[str, tuple[int, int]]:
    """Per layer group: (values that train, values in all)."""
    wanted = frozenset(chosen)
    counts = dict.fromkeys(groups, (0, 0))
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = path_name(path)
        group, size = group_of(name, groups), int(np.prod(leaf.shape))
        train, total = counts[group]
        counts[group] = (train + size * (name in wanted), total + size)
    return counts
