"""Schemes: what the modules of a family are called in a family of files, and the table that follows from it."""

import dataclasses
import re
from collections.abc import Callable
from typing import Literal

import numpy as np

from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import Encoder
from dapt_jax.weights.paths import flatten

Framework = Literal["torch", "keras", "dapt_jax"]
_ENDINGS: dict[Framework, dict[str, str]] = {
    "torch": {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"},
    "keras": {"kernel": "kernel", "scale": "gamma", "bias": "bias", "mean": "moving_mean", "var": "moving_variance"},
    "dapt_jax": {ending: ending for ending in ("kernel", "scale", "bias", "mean", "var")},
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The names of one family of weight files.

    Attributes:
        name: as reports call it.
        framework: decides endings, separators and layouts.
        module: (encoder, group, module within the group) to the module's name there; None for the ones without.
        head: name of the dense layer there.
    """

    name: str
    framework: Framework
    module: Callable[[Encoder, str, str], str]
    head: str

    @property
    def separator(self) -> str:
        """What stands between the parts of a key."""
        return "." if self.framework == "torch" else "/"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one of our arrays comes from.

    Attributes:
        key: its name there, without any prefix.
        framework: decides the layout.
    """

    key: str
    framework: Framework

    def convert(self, array: np.ndarray) -> np.ndarray:
        """The array in our layout: (h, w, in, out) and (in, out); torch has the outputs first."""
        if self.framework != "torch":
            return array
        if array.ndim == 4:
            return array.transpose(2, 3, 1, 0)
        return array.T if array.ndim == 2 else array


def table(scheme: Scheme, classifier: Classifier) -> dict[str, Entry]:
    """Our path to its source, for every parameter and statistic of a classifier, head included."""
    params, stats = classifier.abstract()
    return {path: _entry(scheme, classifier.encoder, path) for path in flatten(params) | flatten(stats)}


def _entry(scheme: Scheme, encoder: Encoder, path: str) -> Entry:
    module, _, leaf = path.rpartition("/")
    ending = _ENDINGS[scheme.framework][leaf]
    if module == HEAD:
        name = scheme.head
    else:
        group, _, part = module.rpartition("/")
        name = scheme.module(encoder, group, part)
        if scheme.framework == "keras" and part.startswith("norm") and leaf == "bias":
            ending = "beta"
    return Entry(f"{name}{scheme.separator}{ending}", scheme.framework)


def numbers(group: str) -> tuple[int, int]:
    """(3, 2) of `stage3/block2`."""
    stage, block = re.findall(r"\d+", group)
    return int(stage), int(block)


def _own(encoder: Encoder, group: str, part: str) -> str:
    return f"{group}/{part}"


OWN = Scheme("dapt_jax", "dapt_jax", _own, HEAD)
