"""The scores by name: what each needs, which way is better, and one call that computes several.

A score registers beside its definition; the file is found by being in this folder:

    >>> @score("mean_norm", needs="nothing", higher_is_better=False, title="mean norm")
    ... def mean_norm(features):
    ...     return float(np.linalg.norm(features, axis=1).mean())
    >>> evaluate(["mean_norm"], Sample(np.array([[3.0, 4.0]])))
    {'mean_norm': Outcome(value=5.0, reason='')}
    >>> del SCORES["mean_norm"]
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from dapt_jax.errors import UserError, nearest
from dapt_jax.transferability.inputs import FeatureStatistics

F = TypeVar("F", bound=Callable[..., float])

NEEDS = ("nothing", "views", "labels", "source head", "masks")
"""What a score can need beside features: nothing, features of two views, class labels, the source classes'
probabilities (and labels), or masks with the feature maps of one or several levels."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Inputs of scores; missing parts are None.

    Attributes:
        features: Pooled features [n, d].
        labels: Class numbers [n].
        views: Features of two views or more, [v, n, d] or [v, n, h, w, d].
        source: Probabilities of the source classes [n, z].
        maps: Feature maps [n, h, w, d], coarse to fine.
        masks: Classes [n, h, w] at each of these levels.
    """

    features: np.ndarray
    labels: np.ndarray | None = None
    views: np.ndarray | None = None
    source: np.ndarray | None = None
    maps: tuple[np.ndarray, ...] | None = None
    masks: tuple[np.ndarray, ...] | None = None

    @functools.cached_property
    def statistics(self) -> FeatureStatistics:
        """Statistics of features and labels, shared by all scores of labels."""
        return FeatureStatistics.of(self.features, np.asarray(self.labels))

    def has(self, need: str) -> bool:
        """Return whether the inputs of a score are available."""
        if need == "masks":
            return self.maps is not None and self.masks is not None
        if need == "source head":
            return self.source is not None and self.labels is not None
        return need == "nothing" or getattr(self, need) is not None


_ARGUMENTS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "nothing": lambda sample: (sample.features,),
    "views": lambda sample: (sample.views,),
    "labels": lambda sample: (sample.features, sample.statistics.labels),
    "source head": lambda sample: (sample.source, sample.statistics.labels),
    "masks": lambda sample: (sample.maps, sample.masks),
}
"""What a score's function is called with, by what it needs."""


@dataclasses.dataclass(frozen=True)
class ScoreEntry:
    """One score.

    Attributes:
        title: Its name in the literature.
        needs: Required input, one of `NEEDS`.
        higher_is_better: Whether higher values indicate a better checkpoint.
        compute: Function from a sample and settings of the score to a number.
    """

    title: str
    needs: str
    higher_is_better: bool
    compute: Callable[..., float]

    @property
    def reads_labels(self) -> bool:
        """Whether it reads labels or masks of the images that it scores."""
        return self.needs in ("labels", "source head", "masks")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A score, or NaN with the reason."""

    value: float
    reason: str = ""


SCORES: dict[str, ScoreEntry] = {}
"""The scores by their names in the settings."""


def score(
    name: str,
    *,
    needs: str,
    higher_is_better: bool,
    title: str,
    arguments: Callable[[Sample], tuple[Any, ...]] | None = None,
) -> Callable[[F], F]:
    """Register a score, at the function that computes it.

    Args:
        name: Its name in the settings.
        needs: Required input, one of `NEEDS`, which says what the function is called with: features; views;
            features and labels (and, by name, their shared `statistics`); source probabilities and labels; or
            maps and masks.
        higher_is_better: Whether higher values indicate a better checkpoint.
        title: Its name in the literature.
        arguments: What the function is called with, where it is something else.

    Returns:
        A decorator that leaves the function as it is.

    Raises:
        TypeError: A score of that name is registered, or `needs` is unknown.
    """
    if name in SCORES:
        raise TypeError(f"two scores are called {name!r}")
    if needs not in NEEDS:
        raise TypeError(f"score {name!r} needs {needs!r}; {nearest(needs, NEEDS)}")

    def register(function: F) -> F:
        def compute(sample: Sample, **settings: Any) -> float:
            if needs == "labels":
                settings = {"statistics": sample.statistics, **settings}
            return function(*(arguments or _ARGUMENTS[needs])(sample), **settings)

        SCORES[name] = ScoreEntry(title, needs, higher_is_better, compute)
        return function

    return register


def entry(name: str) -> ScoreEntry:
    """Return the score of that name.

    Raises:
        UserError: The score does not exist; names the nearest.
    """
    if name not in SCORES:
        raise UserError(f"unknown transferability score {name!r}; {nearest(name, SCORES)}")
    return SCORES[name]


def evaluate(names: Iterable[str], sample: Sample, **settings: Mapping[str, Any]) -> dict[str, Outcome]:
    """Return several scores of one checkpoint.

    What cannot be computed is NaN with the reason, so that no training run ends here.

    Args:
        names: Names of scores.
        sample: Available inputs.
        **settings: Arguments of a score's function, by name of the score.

    Raises:
        UserError: There is no score of that name.
    """
    found = {}
    for name in names:
        wanted = entry(name)
        if not sample.has(wanted.needs):
            found[name] = Outcome(math.nan, f"needs {wanted.needs}, which this sample does not have")
            continue
        try:
            value = wanted.compute(sample, **settings.get(name, {}))
        except UserError as error:
            found[name] = Outcome(math.nan, str(error))
            continue
        found[name] = Outcome(value, "" if math.isfinite(value) else "undefined for these features")
    return found
