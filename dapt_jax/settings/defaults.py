"""Conversion between user configs (`default`) and typed settings (`resolve`)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from dapt_jax.errors import UserError
from dapt_jax.fields import Constraint, SettingError, constraint_of, default_of, settings_of
from dapt_jax.records.renamed import upgrade
from dapt_jax.settings.names import is_like, no_setting, wanted
from dapt_jax.settings.schema import StudySettings, open_sections

OPEN = open_sections()


def default() -> config_dict.ConfigDict:
    """Return a config with all settings at their defaults.

    The config is locked except for corpus, corpora, tasks and custom_strategies, to which keys can be added.

        >>> config = default()
        >>> config.adapt.lr = 3e-4
        >>> config.tasks.types = {"development": {"kind": "phantoms", "name": "development"}}
        >>> resolve(config).adapt.lr
        0.0003
    """
    return to_configdict(StudySettings())


def resolve(config: config_dict.ConfigDict) -> StudySettings:
    """Return the typed settings of a config.

    Args:
        config: A modified config from `default`.

    Raises:
        UserError: A setting is unknown, missing, of the wrong type, out of range, or inconsistent with
            another.
    """
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(
            f"the config is {type(config).__name__}; expected what dapt_jax.settings.default() returns"
        )
    values, defaults = flat(config), flat(to_dict(StudySettings()))
    for name in values:
        if name not in defaults and name.partition(".")[0] not in OPEN:
            raise UserError(no_setting(name, defaults))
    for name, standard in defaults.items():
        if name not in values:
            raise UserError(
                f"the config lacks {name}; expected one that starts from dapt_jax.settings.default()"
            )
        if not is_like(values[name], standard):
            raise UserError(f"{name} is {values[name]!r}; expected {wanted(standard)}")
    return _build(StudySettings, config.to_dict(), "")


def from_json(values: Mapping[str, Any]) -> StudySettings:
    """Return the settings in a workdir's `config.json`.

    Settings that an earlier version lacked have their defaults, as have parameters that the chosen loss
    lacks, which earlier versions ignored.

    Raises:
        UserError: The values are not valid settings.
    """
    config = default()
    given = upgrade(values)
    with config.unlocked():
        config.update(config_dict.ConfigDict({name: given[name] for name in given if name not in OPEN}))
        for name in OPEN:
            if name in given:
                config[name] = config_dict.ConfigDict(given[name])
    standard = StudySettings()
    for ours, theirs in (
        (standard.adapt.loss, config.adapt.loss),
        (standard.transfer.head.loss, config.transfer.head.loss),
        (standard.transfer.finetune.loss, config.transfer.finetune.loss),
        (standard.transfer.segmentation.loss, config.transfer.segmentation.loss),
    ):
        used = dataclasses.replace(ours, name=theirs.name).values()
        theirs.update({name: value for name, value in to_dict(ours).items() if name not in ("name", *used)})
    return resolve(config)


def to_dict(settings: object) -> dict[str, Any]:
    """Return settings as nested dicts of plain values, in the form of a config."""
    return {name: _said(getattr(settings, name)) for name in settings_of(type(settings))}


def to_configdict(settings: StudySettings) -> config_dict.ConfigDict:
    """Return settings as a config, locked except for the open sections."""
    config = config_dict.ConfigDict(to_dict(settings))
    config.lock()
    for name in OPEN:
        config[name].unlock()
    return config


def to_text(settings: StudySettings) -> str:
    """Return settings as text, one line `NAME = VALUE` each."""
    return "".join(f"{name} = {value!r}\n" for name, value in flat(to_dict(settings)).items())


def flat(config: Mapping[str, Any] | config_dict.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted name, from a config or nested dicts."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        is_section = isinstance(value, config_dict.ConfigDict | dict)
        found.update(flat(value, f"{name}.") if is_section else {name: value})
    return found


def declared(
    cls: type = StudySettings, prefix: str = "", parent: Constraint | None = None
) -> dict[str, Constraint]:
    """Return the constraint of each setting by dotted name, without entries of open sections.

    In a section that does not affect results, no setting does.
    """
    found: dict[str, Constraint] = {}
    for name, field in settings_of(cls).items():
        constraint, value = constraint_of(field), default_of(field)
        if parent and not parent.affects_results:
            constraint = dataclasses.replace(constraint, affects_results=False)
        if dataclasses.is_dataclass(value) and settings_of(type(value)):
            found.update(declared(type(value), f"{prefix}{name}.", constraint))
        else:
            found[f"{prefix}{name}"] = constraint
    return found


def differences(one: StudySettings, other: StudySettings) -> Iterator[tuple[str, Any, Any]]:
    """Yield name and both values of each result-affecting setting that differs between two studies."""
    free = {name for name, constraint in declared().items() if not constraint.affects_results}
    ours, theirs = flat(to_dict(one)), flat(to_dict(other))
    for name in sorted({*ours, *theirs} - free):
        if ours.get(name) != theirs.get(name):
            yield name, ours.get(name), theirs.get(name)


def _said(value: object) -> Any:
    if hasattr(value, "to_config"):
        return value.to_config()
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {name: _said(each) for name, each in value.items()}
    return value


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Return an instance of a settings class, nested ones first; errors start with the dotted name."""
    found: dict[str, Any] = {}
    for name, field in settings_of(cls).items():
        value, standard, path = values[name], default_of(field), f"{where}{name}"
        if cls is StudySettings and name in OPEN:
            entry = OPEN[name]
            if name == "corpus":
                found[name] = entry.from_config(value, path)
            else:
                found[name] = {key: entry.from_config(each, f"{path}.{key}") for key, each in value.items()}
        elif dataclasses.is_dataclass(standard):
            found[name] = _build(type(standard), value, f"{path}.")
        elif isinstance(standard, tuple):
            found[name] = tuple(value)
        else:
            found[name] = float(value) if isinstance(standard, float) else value
    try:
        return cls(**found)
    except SettingError as error:
        raise (error.within(where.removesuffix(".")) if where else error) from error
