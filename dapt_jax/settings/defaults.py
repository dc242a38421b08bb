"""Conversion between user configs (`default`) and typed settings (`resolve`)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from dapt_jax.errors import UserError
from dapt_jax.fields import Constraint, constraint_of, default_of, holds_names, settings_of
from dapt_jax.records.renamed import upgrade
from dapt_jax.settings.names import is_like, no_setting, wanted
from dapt_jax.settings.schema import StudySettings, open_sections
from dapt_jax.settings.sections import build, flat, to_dict

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
    return build(StudySettings, config.to_dict(), "", _entries(config.to_dict()))


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


def several_names(cls: type = StudySettings, prefix: str = "") -> set[str]:
    """Return the dotted names of the settings that hold several names each, without entries of open sections."""
    found: set[str] = set()
    for name, field in settings_of(cls).items():
        value = default_of(field)
        if dataclasses.is_dataclass(value) and settings_of(type(value)):
            found |= several_names(type(value), f"{prefix}{name}.")
        elif holds_names(field):
            found.add(f"{prefix}{name}")
    return found


def differences(one: StudySettings, other: StudySettings) -> Iterator[tuple[str, Any, Any]]:
    """Yield name and both values of each result-affecting setting that differs between two studies."""
    free = {name for name, constraint in declared().items() if not constraint.affects_results}
    ours, theirs = flat(to_dict(one)), flat(to_dict(other))
    for name in sorted({*ours, *theirs} - free):
        if ours.get(name) != theirs.get(name):
            yield name, ours.get(name), theirs.get(name)


def _entries(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the open sections of a config, with typed entries."""
    found: dict[str, Any] = {}
    for name, entry in OPEN.items():
        if name == "corpus":
            found[name] = entry.from_config(values[name], name)
        else:
            found[name] = {
                key: entry.from_config(each, f"{name}.{key}") for key, each in values[name].items()
            }
    return found
