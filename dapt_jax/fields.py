"""Fields of settings dataclasses, declared once: default, range, choices, help, effect on results.

A settings class is a frozen dataclass whose fields are made by `setting` and whose `__post_init__` calls
`check_fields`:

    >>> @dataclasses.dataclass(frozen=True)
    ... class Plateau:
    ...     factor: float = setting(0.5, above=0, doc="What the learning rate is multiplied by.")
    ...     patience: int = setting(5, at_least=0, doc="Epochs without improvement before that.")
    ...     def __post_init__(self) -> None:
    ...         check_fields(self)
    >>> Plateau(patience=-1)
    Traceback (most recent call last):
    ...
    dapt_jax.fields.SettingError: patience is -1; expected 0 or more
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dapt_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_KEY = "setting"


class SettingError(UserError):
    """A setting has an invalid value.

    Attributes:
        name: Name of the setting, relative to the object that was checked.
        value: Invalid value.
        expected: Description of the valid values, as the end of an error line.
        unknown: Whether the value is a name that does not exist; the line then says "unknown NAME".
    """

    def __init__(self, name: str, value: object, expected: str, unknown: bool = False):
        self.name, self.value, self.expected, self.unknown = name, value, expected, unknown
        line = (
            f"unknown {name} {value!r}; {expected}"
            if unknown
            else f"{name} is {value!r}; expected {expected}"
        )
        super().__init__(line)

    def within(self, section: str) -> "SettingError":
        """Return the same error with the setting's name in a section of the settings."""
        return SettingError(f"{section}.{self.name}", self.value, self.expected, self.unknown)


@dataclasses.dataclass(frozen=True)
class Constraint:
    """Valid values of a field, and its meaning.

    Attributes:
        doc: Help text: one full phrase, with the unit where there is one.
        at_least: Smallest value.
        above: Exclusive lower bound.
        at_most: Largest value.
        below: Exclusive upper bound.
        choices: Valid values; empty where any value is valid.
        affects_results: Whether a study's results depend on it beyond rounding; a setting that does not
            affect them may differ between two starts of one study.
    """

    doc: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    affects_results: bool = True

    @property
    def range(self) -> str:
        """Text of the range, such as "0 to less than 1"; empty where it is unbounded."""
        low = None if self.at_least is None else f"{self.at_least:g}"
        high = f"{self.at_most:g}" if self.at_most is not None else None
        high = f"less than {self.below:g}" if self.below is not None else high
        if self.above is not None:
            return f"more than {self.above:g}" + (
                f" and {'at most ' if self.below is None else ''}{high}" if high else ""
            )
        if low and high:
            return f"{low} to {high}"
        return f"{low} or more" if low else high or ""

    def allows(self, value: float) -> bool:
        """Return whether a number is within the range; NaN never is."""
        return bool(
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def setting(
    default: Any = dataclasses.MISSING,
    *,
    doc: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    affects_results: bool = True,
    default_factory: Any = dataclasses.MISSING,
) -> Any:
    """Return a dataclass field that declares everything about a setting; see `Constraint`.

    Args:
        default: Default value; a field without one is required.
        doc: Help text.
        at_least: Smallest value.
        above: Exclusive lower bound.
        at_most: Largest value.
        below: Exclusive upper bound.
        choices: Valid values.
        affects_results: Whether results depend on it.
        default_factory: Function that returns a mutable default.
    """
    constraint = Constraint(doc, at_least, above, at_most, below, tuple(choices), affects_results)
    return dataclasses.field(default=default, default_factory=default_factory, metadata={_KEY: constraint})


def constraint_of(field: "dataclasses.Field[Any]") -> Constraint:
    """Return the constraint of a field; an empty one for a field that was not made by `setting`."""
    return field.metadata.get(_KEY, Constraint())


def check_fields(instance: "DataclassInstance") -> None:
    """Refuse a dataclass instance with a field outside its range or choices.

    Raises:
        SettingError: A field is invalid; names the first such field, its value, and the valid values.
    """
    for field in dataclasses.fields(instance):
        constraint, value = constraint_of(field), getattr(instance, field.name)
        if _is_of(field, "int") and not isinstance(value, numbers.Integral):
            raise SettingError(field.name, value, "a whole number")
        if holds_names(field) and isinstance(value, str):
            raise SettingError(field.name, value, f"several names, such as ({value!r},)")
        if holds_names(field) and isinstance(value, tuple | list):
            for each in value:
                if not isinstance(each, str):
                    raise SettingError(field.name, value, f"names as text, such as ({str(each)!r},)")
        if constraint.choices and value not in constraint.choices:
            raise SettingError(field.name, value, nearest(str(value), constraint.choices), unknown=True)
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, float) and not math.isfinite(each):  # records that hold it cannot be read
                expected = ", ".join(filter(None, (constraint.range, "a finite number")))
                raise SettingError(field.name, value, expected)
        if isinstance(value, int | float) and not isinstance(value, bool) and not constraint.allows(value):
            raise SettingError(field.name, value, constraint.range)


def holds_names(field: "dataclasses.Field[Any]") -> bool:
    """Return whether a field holds several names."""
    return _is_of(field, "tuple[str, ...]")


def _is_of(field: "dataclasses.Field[Any]", annotation: str) -> bool:
    """Return whether a field has an annotation, which may be the type or its text."""
    given = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
    return annotation in (given, str(field.type))


def settings_of(cls: type) -> dict[str, "dataclasses.Field[Any]"]:
    """Return the fields of a dataclass that were made by `setting`, by name."""
    return {field.name: field for field in dataclasses.fields(cls) if _KEY in field.metadata}


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """Return the default of a field, which must have one."""
    factory = field.default_factory
    return field.default if isinstance(factory, dataclasses._MISSING_TYPE) else factory()


def with_default(cls: type, name: str, default: Any) -> Any:
    """Return a copy of another class's field with a different default.

    Args:
        cls: The other class, such as a base class.
        name: Name of its field.
        default: Default value.
    """
    return dataclasses.field(default=default, metadata=settings_of(cls)[name].metadata)


def section(cls: Any, doc: str = "", affects_results: bool = True) -> Any:
    """Return a field that holds a nested settings class, by default an instance with all defaults.

    Args:
        cls: Nested class, or a function that returns an instance at its defaults.
        doc: Help text of the section.
        affects_results: Whether results depend on any of its settings.
    """
    return setting(default_factory=cls, doc=doc, affects_results=affects_results)
