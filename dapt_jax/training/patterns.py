"""Patterns over parameters: which leaves of a network a phase trains.

A pattern is `GLOB` or `GLOB:KIND`. The glob matches a parameter's path or a leading part of it, and may hold
ranges of numbers: `block9..12/attention/project` stands for four layer groups. The kind picks among what the
glob matches: `*:bias`, `stage6*:depthwise_kernel`, `block9..12:norm`.
"""

import fnmatch
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from dapt_jax.errors import UserError, nearest
from dapt_jax.models.encoder import Encoder
from dapt_jax.models.lora import LoraSettings
from dapt_jax.models.row_changes import RowSettings
from dapt_jax.parameters import Kind
from dapt_jax.training.phases import Phase
from dapt_jax.weights.paths import flatten

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1000
"""Most members of the ranges of a pattern; no network has as many layer groups."""

LORA = "lora"
"""Kind of pattern that picks kernels for low-rank adaptation instead of training."""

ROWS = "rows"
"""Kind of pattern that picks kernels of dense layers of which some rows train."""

KINDS: dict[str, frozenset[Kind]] = {
    "kernel": frozenset(kind for kind in Kind if kind.is_kernel),
    **{
        kind.value: frozenset({kind})
        for kind in Kind
        if not (kind.is_statistic or kind.is_lora or kind.is_rows)
    },
    "bias": frozenset({Kind.BIAS, Kind.BATCH_NORM_BIAS, Kind.LAYER_NORM_BIAS}),
    "norm": frozenset(kind for kind in Kind if kind.is_batch_norm or kind.is_layer_norm),
    LORA: frozenset(kind for kind in Kind if kind.is_lora),
    ROWS: frozenset(kind for kind in Kind if kind.is_rows),
}
"""Kinds of parameters by their name in patterns; `bias` includes those of norms, as BitFit does."""


def matches(path: str, pattern: str) -> bool:
    """Return whether a glob pattern matches a path or one of its leading parts."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern.rstrip('/')}/*")


def near(pattern: str, groups: Sequence[str], paths: Collection[str]) -> str:
    """Return the groups and paths nearest to a pattern that matches nothing, as the end of an error line."""
    stages = dict.fromkeys(group.split("/")[0] for group in groups)
    return nearest(pattern, dict.fromkeys([*stages, *groups, *paths]))


def select(
    pattern: str, kinds: Mapping[str, Kind], groups: Sequence[str], where: str, what: str = "parameter"
) -> list[str]:
    """Return the paths that a pattern matches, in the order of `kinds`.

    The leaves of low-rank updates are matched by patterns that end with `:lora` alone, and changes of rows by
    those that end with `:rows`, so that `*` means the parameters of the network itself.

    >>> kinds = {"block1/mlp/kernel": Kind.DENSE_KERNEL, "block2/mlp/bias": Kind.BIAS}
    >>> select("block1..2:bias", kinds, ("block1", "block2"), "phase 'p':")
    ['block2/mlp/bias']

    Args:
        pattern: `GLOB` or `GLOB:KIND`.
        kinds: Kind of every parameter to choose from, by path.
        groups: Layer groups, for error lines.
        where: Start of error lines, such as "phase 'head':".
        what: What the paths are, in error lines.

    Raises:
        UserError: The kind or the range is invalid, or nothing matches; names the nearest.
    """
    told = f"{where} pattern {pattern!r}"
    glob, colon, name = pattern.partition(":")
    if colon and name not in KINDS:
        raise UserError(f"{told}: unknown kind of parameter {name!r}; {nearest(name, KINDS)}")
    pool = {
        path: kind
        for path, kind in kinds.items()
        if (kind.is_lora, kind.is_rows) == (name == LORA, name == ROWS)
    }
    by_glob: dict[str, None] = {}
    for member in expanded(glob, told):
        found = [path for path in pool if matches(path, member)]
        if not found:
            of = f" ({member!r})" if member != glob else ""
            holding = [group for group in groups if any(matches(path, group) for path in pool)]
            raise UserError(f"{told}{of} matches no {what}; {near(member, holding, pool)}")
        by_glob.update(dict.fromkeys(found))
    chosen = [path for path in by_glob if not colon or pool[path] in KINDS[name]]
    if not chosen:
        known = [
            each
            for each, members in KINDS.items()
            if members & {pool[path] for path in by_glob} and each not in (LORA, ROWS)
        ]
        raise UserError(f"{told} matches no {what} of the kind {name!r}; {nearest(name, known)}")
    return chosen


def expanded(glob: str, told: str) -> list[str]:
    """Return a glob once per member of its ranges; `told` starts the error line of an invalid one."""
    globs = [glob]
    while found := _RANGE.search(globs[0]):
        first, last = int(found[1]), int(found[2])
        if not 0 <= last - first < _MOST or len(globs) * (last - first + 1) > _MOST:
            raise UserError(f"{told}: the range {found[0]} is not one; expected FIRST..LAST, such as 9..12")
        globs = [
            _RANGE.sub(str(number), each, count=1) for each in globs for number in range(first, last + 1)
        ]
    return globs


def with_lora(encoder: Encoder, phases: Sequence[Phase], settings: LoraSettings) -> Encoder:
    """Return an encoder with the low-rank updates that the patterns of phases name; itself if none does.

    Args:
        encoder: The encoder.
        phases: Phases of a run.
        settings: Rank and factor of the updates.

    Raises:
        UserError: A pattern matches no kernel, only kernels of depthwise or grouped convolutions, or
            only kernels whose rank is not above that of the update.
    """
    kernels = {path: kind for path, kind in encoder.kinds.items() if kind.is_kernel}
    shapes = {path: leaf.shape for path, leaf in flatten(encoder.abstract()[0]).items()}
    chosen: dict[str, None] = {}
    for where, pattern, glob in _of_kind(phases, LORA):
        found = [
            path
            for path in select(glob, kernels, encoder.groups, where, "kernel")
            if not kernels[path].is_grouped
        ]
        if not found:
            raise UserError(
                f"{where} pattern {pattern!r} matches only kernels of depthwise or grouped convolutions, "
                f"which low-rank updates are not for; expected {glob + ':kernel'!r}, which trains them"
            )
        lowered = [path for path in found if _rank(shapes[path]) > settings.rank]
        chosen.update(dict.fromkeys(lowered))
        if not lowered:
            most = max(_rank(shapes[path]) for path in found)
            expected = f"1 to {most - 1}, or the kernels themselves" if most > 1 else "the kernels themselves"
            raise UserError(
                f"{where} pattern {pattern!r}: adapt.lora.rank is {settings.rank}, and no kernel there "
                f"has a rank above {most}; expected {expected}"
            )
    return _with_lora(encoder, tuple(chosen), settings) if chosen else encoder


def _of_kind(phases: Sequence[Phase], kind: str) -> Iterator[tuple[str, str, str]]:
    """Yield each pattern `GLOB:KIND` of phases: the start of its error lines, the pattern, and its glob."""
    for phase in phases:
        for pattern in phase.trainable:
            glob, _, name = pattern.partition(":")
            if name == kind:
                yield f"phase {phase.name!r}:", pattern, glob


@functools.cache
def _with_lora(encoder: Encoder, kernels: tuple[str, ...], settings: LoraSettings) -> Encoder:
    """Return the same object for equal arguments, so that seeds share compiled steps and cached prefixes."""
    return encoder.with_lora(kernels, settings)


def with_rows(encoder: Encoder, phases: Sequence[Phase], settings: RowSettings) -> Encoder:
    """Return an encoder with changes of some rows of the weights that patterns name; itself if none does.

    Args:
        encoder: The encoder.
        phases: Phases of a run.
        settings: Number and seed of the rows.

    Raises:
        UserError: A pattern matches no kernel of a dense layer, or one that has not more rows.
    """
    kernels = {path: kind for path, kind in encoder.kinds.items() if kind is Kind.DENSE_KERNEL}
    shapes = {path: leaf.shape for path, leaf in flatten(encoder.abstract()[0]).items()}
    chosen: dict[str, tuple[int, ...]] = {}
    for where, pattern, glob in _of_kind(phases, ROWS):
        for path in select(glob, kernels, encoder.groups, where, "kernel of a dense layer"):
            outputs = shapes[path][-1]
            if settings.number >= outputs:
                raise UserError(
                    f"{where} pattern {pattern!r}: adapt.rows.number is {settings.number}, and {path} has "
                    f"{outputs} rows; expected 1 to {outputs - 1}, or {glob!r}, which trains all"
                )
            chosen[path] = settings.drawn(path, outputs)
    return _with_rows(encoder, tuple(chosen.items())) if chosen else encoder


@functools.cache
def _with_rows(encoder: Encoder, outputs: tuple[tuple[str, tuple[int, ...]], ...]) -> Encoder:
    """Return the same object for equal arguments: see `_with_lora`."""
    return encoder.with_rows(dict(outputs))


def _rank(shape: Sequence[int]) -> int:
    """Return the largest rank of a kernel as a matrix (window x in, out)."""
    return min(math.prod(shape[:-1]), shape[-1])
