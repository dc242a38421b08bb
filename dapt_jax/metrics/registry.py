"""Metrics declare themselves: name, title, direction, range and chance level beside the function that computes them."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SINGLE_LABEL, MULTI_LABEL, ORDINAL = "single-label", "multi-label", "ordinal"
MASKS, SURFACES = "masks", "surfaces of masks"


@dataclasses.dataclass(frozen=True)
class Metric:
    """What is to be known of a metric beside how it is computed.

    Attributes:
        name: Its name in settings and results; `NAME/CLASS` is its value for one class alone.
        title: Its name as one would write it.
        higher_is_better: Which way predictions are better.
        low: Least value; None where there is no bound.
        high: Greatest value; None where there is no bound.
        chance: Value of predictions that do not depend on the image; None where it depends on the data.
        per_class: Whether it comes for each class as well.
        of_masks: Whether it is of masks, not of images.
    """

    name: str
    title: str
    higher_is_better: bool = True
    low: float | None = 0.0
    high: float | None = 1.0
    chance: float | None = None
    per_class: bool = False
    of_masks: bool = False


METRICS: dict[str, Metric] = {}
"""Every metric by its name."""

_MEASURES: list[tuple[str, frozenset[str], Callable[..., Iterable[Any]]]] = []


def metric(
    name: str,
    *,
    title: str,
    kinds: Iterable[str],
    higher_is_better: bool = True,
    low: float | None = 0.0,
    high: float | None = 1.0,
    chance: float | None = None,
    per_class: bool = False,
) -> Callable[[Callable[..., Iterable[Any]]], Callable[..., Iterable[Any]]]:
    """Declare a metric, at the function that computes it.

    Args:
        name: See `Metric`, as are the others.
        title: See `Metric`.
        kinds: The kinds of predictions that have it: `SINGLE_LABEL`, `MULTI_LABEL`, `ORDINAL`, `MASKS` or
            `SURFACES`.
        higher_is_better: See `Metric`.
        low: See `Metric`.
        high: See `Metric`.
        chance: See `Metric`.
        per_class: See `Metric`.

    Returns:
        A decorator for a function from predictions to the scores of the metric.

    Raises:
        TypeError: A metric of that name has been declared.
    """
    kinds = frozenset(kinds)
    if name in METRICS:
        raise TypeError(f"two metrics are called {name!r}")
    of_masks = bool(kinds & {MASKS, SURFACES})
    METRICS[name] = Metric(name, title, higher_is_better, low, high, chance, per_class, of_masks)
    return measure(name, kinds)


def measure(
    name: str, kinds: Iterable[str]
) -> Callable[[Callable[..., Iterable[Any]]], Callable[..., Iterable[Any]]]:
    """Add the function that computes a declared metric for further kinds of predictions."""
    kinds = frozenset(kinds)

    def register(function: Callable[..., Iterable[Any]]) -> Callable[..., Iterable[Any]]:
        _MEASURES.append((name, kinds, function))
        return function

    return register


def measures(*kinds: str) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield the functions of all metrics that some kinds of predictions have, in the order of their declaration."""
    yield from (function for _, of, function in _MEASURES if of & set(kinds))


def remove(name: str) -> None:
    """Forget a metric and its functions."""
    del METRICS[name]
    _MEASURES[:] = [each for each in _MEASURES if each[0] != name]


def lookup(name: str) -> Metric:
    """Return the metric of a result.

    Args:
        name: `NAME`, or `NAME/CLASS`.

    Raises:
        KeyError: There is no such metric.
    """
    return METRICS[name.partition("/")[0]]


def display_name(name: str) -> str:
    """Return a metric's name as one would write it, such as "AUC" or "AUC/monocyte"."""
    _, slash, label = name.partition("/")
    return lookup(name).title + slash + label


def lower_is_better(name: str) -> bool:
    """Return whether a small value of a metric is a good one."""
    return not lookup(name).higher_is_better
