"""Sections of settings as plain values and back: for configs, and for what a task changes."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import config_dict

from dapt_jax.errors import UserError
from dapt_jax.fields import SettingError, default_of, settings_of
from dapt_jax.settings.names import is_like, no_setting, wanted

Section = TypeVar("Section")


def to_dict(settings: object) -> dict[str, Any]:
    """Return settings as nested dicts of plain values, in the form of a config."""
    return {name: _said(getattr(settings, name)) for name in settings_of(type(settings))}


def flat(config: Mapping[str, Any] | config_dict.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted name, from a config or nested dicts."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        is_section = isinstance(value, config_dict.ConfigDict | dict)
        found.update(flat(value, f"{name}.") if is_section else {name: value})
    return found


def _said(value: object) -> Any:
    if hasattr(value, "to_config"):
        return value.to_config()
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {name: _said(each) for name, each in value.items()}
    return value


def build(
    cls: type[Section], values: Mapping[str, Any], where: str, given: Mapping[str, Any] | None = None
) -> Section:
    """Return an instance of a settings class, nested ones first; errors start with the dotted name.

    Args:
        cls: The class.
        values: Plain values of all its settings.
        where: Dotted name of the section with a dot behind it; empty for the whole.
        given: Fields that are typed already.
    """
    found: dict[str, Any] = dict(given or {})
    for name, field in settings_of(cls).items():
        if name in found:
            continue
        value, standard, path = values[name], default_of(field), f"{where}{name}"
        if dataclasses.is_dataclass(standard):
            found[name] = build(type(standard), value, f"{path}.")
        elif isinstance(standard, tuple):
            found[name] = tuple(value)
        else:
            found[name] = float(value) if isinstance(standard, float) else value
    try:
        return cls(**found)
    except SettingError as error:
        raise (error.within(where.removesuffix(".")) if where else error) from error


def changed(section: Section, changes: Mapping[str, Any], where: str) -> Section:
    """Return a section with some settings changed.

    Args:
        section: The section.
        changes: Nested dicts of plain values of the settings that change.
        where: Dotted name of the changes, for error lines.

    Raises:
        UserError: A setting is unknown, of the wrong type or out of range.
    """
    values = to_dict(section)
    known = flat(values)
    for name, value in flat(changes).items():
        if name not in known:
            raise UserError(f"{where}: {no_setting(name, known)}")
        if not is_like(value, known[name]):
            raise UserError(f"{where}.{name} is {value!r}; expected {wanted(known[name])}")
        *above, last = name.split(".")
        inner = values
        for part in above:
            inner = inner[part]
        inner[last] = value
    return build(type(section), values, f"{where}.")
