"""Typed settings of a study, and the config that users edit.

Example:
    >>> from dapt_jax.settings import default, resolve
    >>> config = default()
    >>> config.seeds = (0,)
    >>> resolve(config).seeds
    (0,)
"""

from dapt_jax.records.renamed import REMOVED, RENAMED
from dapt_jax.settings.defaults import default, flat, from_json, resolve, to_configdict, to_dict, to_text
from dapt_jax.settings.schema import MODES, StudySettings
from dapt_jax.settings.sources import CorpusSettings, Source, StrategySpec, TaskSettings

__all__ = [
    "MODES",
    "REMOVED",
    "RENAMED",
    "CorpusSettings",
    "Source",
    "StrategySpec",
    "StudySettings",
    "TaskSettings",
    "default",
    "flat",
    "from_json",
    "resolve",
    "to_configdict",
    "to_dict",
    "to_text",
]
