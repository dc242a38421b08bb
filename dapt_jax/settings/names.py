"""Error lines about unknown settings, renamed settings, and values of the wrong type."""

import difflib
from collections.abc import Iterable

from dapt_jax.errors import nearest
from dapt_jax.records.renamed import REMOVED, RENAMED, renamed

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "one or several values",
}


DESCRIPTIONS = ("corpus", "corpora", "tasks")
"""Sections that describe sets and tasks, whose keys depend on their kind."""


def wanted(standard: object) -> str:
    """Return the expected type of a setting, derived from its default."""
    return f"{_WORDS.get(type(standard), type(standard).__name__)}, such as {standard!r}"


def is_like(value: object, standard: object) -> bool:
    """Return whether a value has the type of a default; ints count as floats, lists as tuples."""
    if isinstance(standard, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(standard, bool)
    if isinstance(standard, float):
        return isinstance(value, int | float)
    return isinstance(value, tuple | list if isinstance(standard, tuple) else type(standard))


def no_setting(name: str, known: Iterable[str]) -> str:
    """Return the error line for a setting that does not exist.

    Args:
        name: Dotted name, or only its last part if the rest is unknown.
        known: Dotted names of the existing settings.
    """
    if now := former(name):
        return now
    known = list(known)
    pairs = [f"{old!r} is called {new!r}" for old, new in RENAMED.items() if name in old.split(".")]
    others = f" (and {len(pairs) - 3} more: see dapt_jax/records/renamed.py)" if len(pairs) > 3 else ""
    earlier = f"of an earlier version {', '.join(pairs[:3])} now{others}" if pairs else ""
    if earlier and name not in {each.rpartition(".")[2] for each in known}:
        return f"the config has no setting {name!r}; {earlier}"
    line = f"the config has no setting {name!r}; {hint(name, known)}"
    if name.partition(".")[0] in DESCRIPTIONS:
        line += "; a flag changes what the config file sets: other keys are added to the description there"
    return f"{line} ({earlier})" if earlier else line


def former(name: str) -> str:
    """Return the line for a former setting, with its current name or constant; empty for any other."""
    if name in REMOVED:
        return f"{name!r} is no setting any more; its value is {REMOVED[name]!r} always"
    now = renamed(name)
    return f"the setting {name!r} is called {now!r} now" if now else ""


def hint(name: str, known: Iterable[str]) -> str:
    """Return the end of such a line: settings with the same last part, or else a similar name."""
    names = list(known)
    leaf = name.lstrip("-").rpartition(".")[2]
    leaves = [each.rpartition(".")[2] for each in names]
    if leaf not in leaves:
        if (near := nearest(name, names)).startswith("did"):
            return near
        leaf = next(iter(difflib.get_close_matches(leaf, leaves, n=1)), "")
    namesakes = [each for each, last in zip(names, leaves, strict=True) if last == leaf]
    if not namesakes:
        return "python -m dapt_jax.main --help lists them all"
    return f"did you mean {' or '.join(map(repr, namesakes[:3]))}?"
