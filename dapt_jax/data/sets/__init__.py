"""Readers of public data sets, a small file each; `SETS` has them by the kind that a config names.

A file that is put here is a reader: docs/data_sets.md shows one.
"""

import importlib
import pkgutil

from dapt_jax.data.sets.registry import SETS, Entry, listing

__all__ = ["SETS", "Entry", "listing"]

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
