"""Registry of metrics: name, title, direction, range and chance level, declared at the function."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SINGLE_LABEL, MULTI_LABEL, ORDINAL = "single-label", "multi-label", "ordinal"
MASKS, SURFACES = "masks", "surfaces of masks"


@dataclasses.dataclass(frozen=True)
class Metric:
    """Description of a metric.

    Attributes:
        name: Name in settings and results; `NAME/CLASS` is the value for a single class.
        title: Display name.
        higher_is_better: Whether higher values are better.
        low: Lower bound; None where unbounded.
        high: Upper bound; None where unbounded.
        chance: Value of predictions independent of the image; None where it depends on the data.
        per_class: Whether it is also reported for each class.
        of_masks: Whether it scores masks instead of image labels.
        is_distance: Whether it is a length, in millimetres or pixels.
        is_default: Whether it is computed where no metrics are chosen.
    """

    name: str
    title: str
    higher_is_better: bool = True
    low: float | None = 0.0
    high: float | None = 1.0
    chance: float | None = None
    per_class: bool = False
    of_masks: bool = False
    is_distance: bool = False
    is_default: bool = True


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
    is_default: bool = True,
) -> Callable[[Callable[..., Iterable[Any]]], Callable[..., Iterable[Any]]]:
    """Declare a metric at the function that computes it.

    Args:
        name: See `Metric`, as are the others.
        title: See `Metric`.
        kinds: Kinds of predictions that it applies to: `SINGLE_LABEL`, `MULTI_LABEL`, `ORDINAL`, `MASKS` or
            `SURFACES`.
        higher_is_better: See `Metric`.
        low: See `Metric`.
        high: See `Metric`.
        chance: See `Metric`.
        per_class: See `Metric`.
        is_default: See `Metric`.

    Returns:
        A decorator for a function from predictions to the scores of the metric.

    Raises:
        TypeError: A metric of that name already exists.
    """
    kinds = frozenset(kinds)
    if name in METRICS:
        raise TypeError(f"two metrics are called {name!r}")
    METRICS[name] = Metric(
        name,
        title,
        higher_is_better,
        low,
        high,
        chance,
        per_class,
        of_masks=bool(kinds & {MASKS, SURFACES}),
        is_distance=SURFACES in kinds,
        is_default=is_default,
    )
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


def measures(*kinds: str, names: Iterable[str] = ()) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield the functions of metrics for some kinds of predictions, in order of declaration.

    Args:
        *kinds: Kinds of predictions.
        names: Metrics; empty for those that are computed by default.
    """
    chosen = set(names) or {name for name, each in METRICS.items() if each.is_default}
    yield from (function for name, of, function in _MEASURES if of & set(kinds) and name in chosen)


def names_of(*kinds: str, default: bool = False) -> tuple[str, ...]:
    """Return the names of the metrics for some kinds of predictions, in order of declaration.

    Args:
        *kinds: Kinds of predictions.
        default: Whether to leave out those that are not computed by default.
    """
    found = [name for name, of, _ in _MEASURES if of & set(kinds)]
    return tuple(name for name in found if METRICS[name].is_default or not default)


def remove(name: str) -> None:
    """Remove a metric and its functions."""
    del METRICS[name]
    _MEASURES[:] = [each for each in _MEASURES if each[0] != name]


def lookup(name: str) -> Metric:
    """Return the metric of a result.

    Args:
        name: `NAME`, or `NAME/CLASS`.

    Raises:
        KeyError: The metric does not exist.
    """
    return METRICS[name.partition("/")[0]]


def display_name(name: str) -> str:
    """Return a metric's display name, such as "AUC" or "AUC/monocyte"."""
    _, slash, label = name.partition("/")
    return lookup(name).title + slash + label


def lower_is_better(name: str) -> bool:
    """Return whether lower values of a metric are better."""
    return not lookup(name).higher_is_better
