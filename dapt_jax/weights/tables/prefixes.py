"""Prefixes that training scripts add to a wrapped model's keys, and the choice among several encoders."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from dapt_jax.errors import UserError, nearest
from dapt_jax.weights.tables.scheme import Entry

LAYOUTS = {
    "module.": "DataParallel, as SwAV, DeepCluster and SeLa save",
    "module.encoder_q.": "MoCo's query encoder",
    "module.encoder_k.": "MoCo's key encoder",
    "module.encoder.": "PyContrast's encoder",
    "encoder_q.": "MoCo's query encoder",
    "student.": "a student's encoder",
    "student.backbone.": "a student's encoder",
    "teacher.": "a teacher's encoder",
    "teacher.backbone.": "a teacher's encoder",
    "model.": "Lightning",
    "backbone.": "a backbone within a model",
    "encoder.": "an encoder within a model, as segmentation networks save",
}
"""Key prefixes by the training code that writes them."""
Role = Literal["averaged", "query", "key", "trained", ""]
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("teacher", "target", "ema", "momentum", "averaged", "avg", "swa", "shadow"), "averaged"),
    **dict.fromkeys(("query", "q"), "query"),
    **dict.fromkeys(("key", "k"), "key"),
    **dict.fromkeys(("student", "online"), "trained"),
}
_LONGEST = 500
"""Maximum length of a key; longer ones belong to no parameter."""


class Choice(NamedTuple):
    """Choice among the encoders of a file.

    Attributes:
        prefix: Prefix of all its keys.
        why: Reason in words if there were several encoders; empty if there was one.
    """

    prefix: str
    why: str = ""


def hits(entries: Mapping[str, Entry], separator: str, keys: Iterable[str]) -> dict[str, int]:
    """Count how many keys of a table a file has after each prefix, in the file's order of prefixes.

    Args:
        entries: A table of names; see `scheme.table`.
        separator: Separator of the parts of a key.
        keys: The names in the file.
    """
    wanted = Counter(entry.key for entry in entries.values())
    found: dict[str, int] = {}
    for key in keys:
        if len(key) > _LONGEST:
            continue
        starts = [0, *(match.end() for match in re.finditer(re.escape(separator), key))]
        for start in starts:
            if key[start:] in wanted:
                found[key[:start]] = found.get(key[:start], 0) + wanted[key[start:]]
    return found


def role(prefix: str) -> Role:
    """Return the role of an encoder in its training, according to the words of its prefix."""
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", prefix).lower())
    found = [_ROLES[word] for word in words if word in _ROLES]
    return next((each for each in ("averaged", "query", "key", "trained") if each in found), "")


def choose(candidates: Sequence[str]) -> Choice | None:
    """Decide between encoders that fit equally well.

    The averaged copy is selected (teacher, target, EMA, momentum encoder), because methods with such a copy
    evaluate it. MoCo is the exception, with its own names: of `encoder_q` and `encoder_k`, the query encoder
    is selected, as by its authors (arXiv 1911.05722). The order of the candidates does not matter.

    Args:
        candidates: Prefixes, each once.

    Returns:
        The choice, or None if no rule decides.
    """
    if len(candidates) == 1:
        return Choice(candidates[0])
    roles = {prefix: role(prefix) for prefix in candidates}
    averaged = [prefix for prefix in candidates if roles[prefix] == "averaged"]
    if len(averaged) == 1:
        return Choice(averaged[0], "the averaged copy")
    queries = [prefix for prefix in candidates if roles[prefix] != "key"]
    if not averaged and len(queries) == 1:
        return Choice(queries[0], "the query encoder, which MoCo's authors evaluate")
    return None


def named(given: str, found: Mapping[str, int]) -> list[str]:
    """Return the prefixes that a user's `prefix=` matches, those with most of the encoder.

    A prefix matches if it is equal, or if it contains the given parts in their order: `student.backbone` also
    matches `student.module.backbone.`.

    Args:
        given: Text from the user, with or without a separator at its end.
        found: Number of the encoder's keys after each prefix of the file; see `hits`.
    """
    parts = _parts(given)
    same = [prefix for prefix in found if _parts(prefix) == parts]
    meant = same or [prefix for prefix in found if parts and _is_within(parts, _parts(prefix))]
    most = max((found[prefix] for prefix in meant), default=0)
    return [prefix for prefix in meant if found[prefix] == most]


def undecided(origin: str, candidates: Iterable[str]) -> UserError:
    """Return the error for a file in which no rule decides between several encoders."""
    listed = sorted(shown(prefix) for prefix in candidates)
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return UserError(
        f"{origin}: {len(listed)} encoders that fit, behind {', '.join(map(repr, listed[:4]))}{more}, and "
        f"nothing that tells which is meant; expected one of them, such as #prefix={listed[0]} behind the "
        "file's name"
    )


def not_there(origin: str, given: str, found: Iterable[str]) -> UserError:
    """Return the error for a `prefix=` without an encoder in the file."""
    known = [shown(prefix) for prefix in found]
    hint = nearest(given, known) if known else "no part of this model is in the file"
    return UserError(f"{origin}: no encoder behind #prefix={given}; {hint}")


def shown(prefix: str) -> str:
    """Return a prefix as a user writes it."""
    return prefix.rstrip("./")


def _parts(prefix: str) -> list[str]:
    return [part for part in re.split(r"[./]", prefix) if part]


def _is_within(parts: list[str], whole: list[str]) -> bool:
    """Return whether a list contains parts in their order, possibly with others between them."""
    rest = iter(whole)
    return all(part in rest for part in parts)
