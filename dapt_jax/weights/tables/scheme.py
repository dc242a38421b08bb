"""Schemes: names of a family's modules in a family of files, and the table that follows from them."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import Encoder
from dapt_jax.parameters import Kind
from dapt_jax.weights.paths import flatten

Framework = Literal["torch", "keras", "dapt_jax"]


class Fit(NamedTuple):
    """Conversion of an array in both directions, beyond the framework's axis order."""

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


_ENDINGS: dict[Framework, dict[str, str]] = {
    "torch": {
        "kernel": "weight",
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    },
    "keras": {
        "kernel": "kernel",
        "scale": "gamma",
        "bias": "bias",
        "mean": "moving_mean",
        "var": "moving_variance",
    },
    "dapt_jax": {},
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The names of one family of weight files.

    Attributes:
        name: Name in reports.
        framework: Framework, which determines suffixes, separators and layouts.
        module: Function from (encoder, group, module in the group) to the module's name in the file; "" for
            arrays at the top level.
        head: Name of the dense layer in the file.
        leaves: Names in the file of arrays that no framework names (tokens, positions), by our name; arrays
            not listed have the same name.
        fits: Conversions from their arrays to ours, by our name, beyond the framework's axis order.
        separators: Separators before the suffix of a module, by its last name, if different from the default.
        equivalent: Function from our arrays by path to arrays of the same function that the files can hold.
    """

    name: str
    framework: Framework
    module: Callable[[Encoder, str, str], str]
    head: str
    leaves: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fits: Mapping[str, Fit] = dataclasses.field(default_factory=dict)
    separators: Mapping[str, str] = dataclasses.field(default_factory=dict)
    equivalent: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda arrays: arrays

    @property
    def separator(self) -> str:
        """Separator of the parts of a key."""
        return "." if self.framework == "torch" else "/"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Source of one of our arrays.

    Attributes:
        key: Name in the file, without any prefix.
        framework: Framework, which determines the layout.
        fit: Conversion between their array and ours, beyond the framework's axis order.
    """

    key: str
    framework: Framework
    fit: Fit | None = None

    def convert(self, array: np.ndarray) -> np.ndarray:
        """Return the array in our layout: (h, w, in, out) and (in, out); torch has the outputs first."""
        if self.fit is not None:
            return self.fit.load(array)
        if self.framework != "torch":
            return array
        if array.ndim == 4:
            return array.transpose(2, 3, 1, 0)
        return array.T if array.ndim == 2 else array

    def restore(self, array: np.ndarray) -> np.ndarray:
        """Return the array in the file's layout, the inverse of `convert`."""
        if self.fit is not None:
            return self.fit.save(array)
        if self.framework != "torch":
            return array
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else self.convert(array)


def table(scheme: Scheme, classifier: Classifier) -> dict[str, Entry]:
    """Return the source of every parameter and statistic of a classifier with its head, by our path."""
    params, batch_stats = classifier.abstract()
    return {
        path: _entry(scheme, classifier.encoder, path, classifier.kinds[path])
        for path in flatten(params) | flatten(batch_stats)
    }


def _entry(scheme: Scheme, encoder: Encoder, path: str, kind: Kind) -> Entry:
    module, _, leaf = path.rpartition("/")
    ending = {**_ENDINGS[scheme.framework], **scheme.leaves}.get(leaf, leaf)
    fit = scheme.fits.get(leaf)
    if module == HEAD:
        name = scheme.head
    else:
        group = encoder.group_of(path)
        name = scheme.module(encoder, group, module.removeprefix(group).removeprefix("/"))
        if scheme.framework == "keras" and kind in (Kind.BATCH_NORM_BIAS, Kind.LAYER_NORM_BIAS):
            ending = "beta"
        if scheme.framework == "keras" and kind is Kind.DEPTHWISE_KERNEL:
            ending, fit = scheme.leaves.get("depthwise", ending), _SWAPPED
    separator = scheme.separators.get(module.rpartition("/")[2], scheme.separator)
    return Entry(f"{name}{separator}{ending}" if name else ending, scheme.framework, fit)


def _swap_last(kernel: np.ndarray) -> np.ndarray:
    """Exchange the last two axes: Keras has (h, w, in, 1) for our (h, w, 1, out)."""
    return kernel.swapaxes(-1, -2)


_SWAPPED = Fit(_swap_last, _swap_last)


def numbers(group: str) -> tuple[int, int]:
    """Return (3, 2) for `stage3/block2`."""
    stage, block = re.findall(r"\d+", group)
    return int(stage), int(block)


def _own(encoder: Encoder, group: str, part: str) -> str:
    return f"{group}/{part}" if part else group


OWN = Scheme("dapt_jax", "dapt_jax", _own, HEAD)
