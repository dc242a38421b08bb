"""Readers of public data sets, in one small file each; `SETS` maps the kind in a config to its entry.

Every file in this folder is a reader: docs/data_sets.md shows an example.
"""

import importlib
import pkgutil

from dapt_jax.data.sets.registry import SETS, Entry, listing

__all__ = ["SETS", "Entry", "listing"]

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
