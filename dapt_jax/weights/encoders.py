"""Selection among several encoders in one file (student and teacher, online and target, siamese branches).

The choice depends on the names, the shapes and, if these are not decisive, the values in the file; never on
the iteration order of a set or the order of the file.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dapt_jax.errors import UserError
from dapt_jax.weights.source import Weights
from dapt_jax.weights.tables import prefixes
from dapt_jax.weights.tables.prefixes import Choice
from dapt_jax.weights.tables.scheme import Entry, Scheme


@dataclasses.dataclass(frozen=True)
class Found:
    """Encoders found in a file under the names of one scheme.

    Attributes:
        scheme: The naming scheme.
        entries: The encoder's table under these names.
        candidates: Arrays and prefix of every encoder with the maximum number of arrays, by the name that
            selects it.
        hits: Number of the encoder's arrays in each of them.
        given: The user's selection, or None.
        origin: Origin of the file, for errors.
    """

    scheme: Scheme
    entries: Mapping[str, Entry]
    candidates: Mapping[str, tuple[Weights, str]]
    hits: int
    given: str | None
    origin: str


def find(weights: Weights, given: str | None, scheme: Scheme, entries: Mapping[str, Entry]) -> Found:
    """Search for the encoders of a file.

    Args:
        weights: The file.
        given: The user's `prefix=`; None for none.
        scheme: The names to search for.
        entries: The encoder's table under them, without a head.
    """
    places = _places(weights, scheme, entries, with_alternatives=given is not None)
    count = {name: hits for name, (_, _, hits) in places.items()}
    if given is None:
        most = max(count.values(), default=0)
        names = [name for name, hits in count.items() if hits == most]
    else:
        names = prefixes.named(given, count)
        most = count[names[0]] if names else 0
        # The same location has two names: an encoder that is loaded by default is also an alternative.
        names = list({(id(places[name][0]), places[name][1]): name for name in names}.values())
    return Found(scheme, entries, {name: places[name][:2] for name in names}, most, given, weights.origin)


def not_there(
    weights: Weights, given: str, schemes: Sequence[tuple[Scheme, Mapping[str, Entry]]]
) -> UserError:
    """Return the error for a `prefix=` without an encoder in the file; it names the existing ones."""
    best: dict[str, int] = {}
    for scheme, entries in schemes:
        places = _places(weights, scheme, entries, with_alternatives=True)
        found = {name: hits for name, (_, _, hits) in places.items()}
        best = max(best, found, key=lambda each: max(each.values(), default=0))
    return prefixes.not_there(
        weights.origin, given, [name for name in best if best[name] == max(best.values())]
    )


def _places(
    weights: Weights, scheme: Scheme, entries: Mapping[str, Entry], *, with_alternatives: bool
) -> dict[str, tuple[Weights, str, int]]:
    sources = {"": weights, **(weights.alternatives if with_alternatives else {})}
    found = {}
    for name, source in sources.items():
        start = f"{name}{scheme.separator}" if name else ""
        for prefix, hits in prefixes.hits(entries, scheme.separator, source).items():
            found[f"{start}{prefix}"] = source, prefix, hits
    return found


def decide(found: Found, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Weights, Choice]:
    """Return the arrays of the encoder to load, the prefix of its keys, and the reason for the choice.

    Args:
        found: See `find`; it contains at least one candidate.
        shapes: Shapes of the encoder's arrays in our layout, by path.

    Raises:
        UserError: There are several encoders, and no rule decides between them.
    """
    candidates = dict(found.candidates)
    if len(candidates) > 1:
        fitting = {name: _fitting(place, found.entries, shapes) for name, place in candidates.items()}
        most = max(fitting.values())
        candidates = {name: place for name, place in candidates.items() if fitting[name] == most}
    name, why = _choice(found, candidates)
    source, prefix = candidates[name]
    container = next((each for each in source.containers if prefix.startswith(f"{each}.")), None)
    if container is not None:
        source, prefix = source.inside(container), prefix.removeprefix(f"{container}.")
    return source.only(lambda key: not key.endswith("num_batches_tracked")), Choice(prefix, why)


def _choice(found: Found, candidates: Mapping[str, tuple[Weights, str]]) -> tuple[str, str]:
    """Return the name of the chosen candidate, and the reason in words."""
    names = sorted(candidates)
    chosen = prefixes.choose(names)
    if chosen is None and _are_alike(found.entries, candidates):
        chosen = Choice(min(names, key=lambda name: (len(name), name)), "all of them hold the same numbers")
    if chosen is None:
        raise prefixes.undecided(found.origin, names)
    name = chosen.prefix
    if found.given is not None:
        return name, f"as #prefix={found.given} says"
    source = candidates[name][0]
    own = [each for each, weights in source.alternatives.items() if weights is source]
    others = [prefixes.shown(each) for each in names if each != name]
    others += [each for each in source.alternatives if each not in own]
    if not others:
        return name, ""
    ways = ", ".join(f"#prefix={each}" for each in others[:3])
    why = "; ".join(filter(None, (chosen.why, source.note)))
    at = prefixes.shown(f"{own[0]}{found.scheme.separator}{name}" if own else name) or "the top"
    taken = f"of {len(others) + 1} encoders in the file the one at {at!r}"
    return name, f"{taken} ({why}; {ways} for another)"


def _fitting(
    place: tuple[Weights, str], entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """Return the number of the encoder's arrays that a candidate has in the right shape."""
    source, prefix = place
    keys = {path: prefix + entry.key for path, entry in entries.items()}
    return sum(
        key in source and _shape(entries[path], source.like(key)) == shapes[path]
        for path, key in keys.items()
    )


def _shape(entry: Entry, like: np.ndarray) -> tuple[int, ...] | None:
    try:
        return entry.convert(like).shape
    except (ValueError, IndexError):  # its rank differs from the one that its name implies
        return None


def _are_alike(entries: Mapping[str, Entry], candidates: Mapping[str, tuple[Weights, str]]) -> bool:
    """Return whether all candidates hold equal values, such as a network that is saved twice."""
    (first, start), *others = candidates.values()
    for entry in entries.values():
        if start + entry.key not in first:
            continue
        array = first[start + entry.key]
        for source, prefix in others:
            key = prefix + entry.key
            if key not in source or not np.array_equal(source[key], array):
                return False
    return True
