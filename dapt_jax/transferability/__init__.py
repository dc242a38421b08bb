"""Transferability scores, which predict downstream performance, and checkpoint selection.

A file that is put here and holds a function under `registry.score` is a score.
"""

import importlib
import pkgutil

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")

from dapt_jax.transferability.registry import SCORES, Sample, ScoreEntry, evaluate, score  # noqa: E402

__all__ = ["SCORES", "Sample", "ScoreEntry", "evaluate", "score"]
