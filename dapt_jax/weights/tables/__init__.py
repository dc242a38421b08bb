"""Names of the models' parameters in other libraries: one file per family, based on `scheme`.

A module of this folder with a dict `SCHEMES` (model to schemes) is registered automatically. A model without
such a module only has our own names.

A *scheme* names the parameters of one family of files. It maps a module of ours (`stage1/block1/conv1`) to
the name of its counterpart; the suffixes (`kernel` to `weight`) and layouts follow from the framework. Tables
are therefore computed from an encoder's own parameter paths and cannot omit one.
"""

import importlib
import pkgutil

from dapt_jax.weights.tables.prefixes import LAYOUTS
from dapt_jax.weights.tables.scheme import OWN, Entry, Scheme, table

__all__ = ["LAYOUTS", "OWN", "SCHEMES", "Entry", "Scheme", "schemes", "table"]

SCHEMES: dict[str, tuple[Scheme, ...]] = {}
"""Schemes of other libraries by model."""

for _name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    for _model, _schemes in getattr(importlib.import_module(f"{__name__}.{_name}"), "SCHEMES", {}).items():
        SCHEMES[_model] = (*SCHEMES.get(_model, ()), *_schemes)


def schemes(model: str) -> tuple[Scheme, ...]:
    """Return the schemes whose files fit a model of the registry; our own is first."""
    return (OWN, *SCHEMES.get(model, ()))
