"""Families of encoders, a file each; a module that is put here registers its architectures because it is here."""

import importlib
import pkgutil

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
