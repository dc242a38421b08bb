"""Type checks for values read from a workdir's files.

An error line names the file, the key and the value.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dapt_jax.errors import UserError

_LARGEST = 2**62


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of value.

    Attributes:
        words: Description of the type, as the end of an error line.
        allows: Predicate for values of the type.
    """

    words: str
    allows: Callable[[Any], bool]

    @property
    def or_null(self) -> "Kind":
        """The same type, or null."""
        return Kind(f"{self.words} or null", lambda value: value is None or self.allows(value))


def list_of(kind: Kind) -> Kind:
    """Return the type of lists with members of one type."""
    return Kind(
        f"a list, each member {kind.words}",
        lambda value: isinstance(value, list) and all(map(kind.allows, value)),
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST


def _is_number(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value) and abs(value) < 1e100)


def _is_text(value: object) -> bool:
    """Return whether a value is text that UTF-8 can encode: lone surrogates cannot be."""
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


TEXT = Kind("text", _is_text)
TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("a whole number", _is_whole)
COUNT = Kind("a whole number from 0", lambda value: _is_whole(value) and value >= 0)
NUMBER = Kind("a number", _is_number)
AMOUNT = Kind("a number from 0", lambda value: _is_number(value) and value >= 0)
MEASURED = Kind("a number", lambda value: _is_number(value) or isinstance(value, float))
"""A number that may have come out as NaN or infinity."""
OBJECT = Kind("a JSON object", lambda value: isinstance(value, dict))
ANY = Kind("anything", lambda value: True)


def either(*kinds: Kind) -> Kind:
    """Return the union of several types."""
    return Kind(
        " or ".join(kind.words for kind in kinds), lambda value: any(kind.allows(value) for kind in kinds)
    )


def check(
    where: str, values: Mapping[str, Any], kinds: Mapping[str, Kind], required: Iterable[str] = ()
) -> None:
    """Refuse missing keys and values of the wrong type.

    Args:
        where: File, and the line number if it has several.
        values: Values by key; keys without a type may have any value.
        kinds: Types by key.
        required: Required keys.

    Raises:
        UserError: A key is missing or its value has the wrong type; names the first such key.
    """
    for key in required:
        if key not in values:
            raise UserError(f"{where}: no key {key!r}")
    for key, kind in kinds.items():
        if key in values and not kind.allows(values[key]):
            raise UserError(f"{where}: {key} is {shortened(values[key])}; expected {kind.words}")


def shortened(value: object, most: int = 60) -> str:
    """Return a value as shown in an error line: on one line, truncated if long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def read_object(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises:
        UserError: The file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
