"""The scores by name: what each needs, which way is better, and one call that computes several."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dapt_jax.errors import UserError, nearest
from dapt_jax.transferability import dense, evidence, leep, neighbours, robustness, separation
from dapt_jax.transferability.inputs import Moments

NEEDS = ("nothing", "views", "labels", "source head", "masks")
"""What a score can need beside features: nothing, features of two views, class labels, the source classes' probabilities
(and labels), or masks with the feature maps of one or several levels."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What scores are computed from; a part that is not there is None.

    Attributes:
        features: pooled [n, d].
        labels: class numbers [n].
        views: features of two views or more, [v, n, d] or [v, n, h, w, d].
        source: probabilities of the source classes [n, z].
        maps: feature maps [n, h, w, d], coarse to fine.
        masks: classes [n, h, w] at each of these levels.
    """

    features: np.ndarray
    labels: np.ndarray | None = None
    views: np.ndarray | None = None
    source: np.ndarray | None = None
    maps: tuple[np.ndarray, ...] | None = None
    masks: tuple[np.ndarray, ...] | None = None

    @functools.cached_property
    def moments(self) -> Moments:
        """Shared by all scores of labels."""
        return Moments.of(self.features, np.asarray(self.labels))

    def has(self, need: str) -> bool:
        """Whether what a score needs is there."""
        if need == "masks":
            return self.maps is not None and self.masks is not None
        if need == "source head":
            return self.source is not None and self.labels is not None
        return need == "nothing" or getattr(self, need) is not None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One score.

    Attributes:
        needs: one of `NEEDS`.
        higher_is_better: which way a checkpoint is better.
        compute: from a sample to a number.
    """

    needs: str
    higher_is_better: bool
    compute: Callable[..., float]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A score, or NaN and why."""

    value: float
    reason: str = ""


def _labelled(function: Callable[..., float]) -> Entry:
    return Entry(
        "labels", True, lambda sample: function(sample.features, sample.moments.labels, moments=sample.moments)
    )


SCORES: dict[str, Entry] = {
    "robustness": Entry("views", False, lambda sample, **how: robustness.robustness(sample.views, **how)),
    "alignment": Entry(
        "views", False, lambda sample: robustness.alignment(np.stack([robustness.pool(v) for v in _views(sample)]))
    ),
    "uniformity": Entry("nothing", False, lambda sample: robustness.uniformity(sample.features)),
    "leep": Entry("source head", True, lambda sample: leep.leep(sample.source, sample.moments.labels)),
    "nce": Entry("source head", True, lambda sample: leep.nce(sample.source, sample.moments.labels)),
    "nleep": _labelled(leep.nleep),
    "logme": _labelled(evidence.logme),
    "h_score": _labelled(evidence.h_score),
    "regularised_h_score": _labelled(evidence.regularised_h_score),
    "transrate": _labelled(separation.transrate),
    "gbc": _labelled(separation.gbc),
    "sfda": _labelled(separation.sfda),
    "parc": _labelled(neighbours.parc),
    "knn": _labelled(neighbours.knn),
    "linear_probe": _labelled(neighbours.linear_probe),
    "pixel_gbc": Entry("masks", True, lambda sample: dense.pixel_gbc(_last(sample.maps), _last(sample.masks))),
    "ccfv": Entry("masks", True, lambda sample: dense.ccfv(sample.maps or (), sample.masks or ())),
}


def _views(sample: Sample) -> np.ndarray:
    assert sample.views is not None
    return sample.views


def _last(levels: tuple[np.ndarray, ...] | None) -> np.ndarray:
    assert levels
    return levels[-1]


def entry(name: str) -> Entry:
    """The score of that name.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name not in SCORES:
        raise UserError(f"unknown transferability score {name!r}; {nearest(name, SCORES)}")
    return SCORES[name]


def evaluate(names: Iterable[str], sample: Sample, **settings: Mapping[str, Any]) -> dict[str, Outcome]:
    """Several scores of one checkpoint; what cannot be computed is NaN with the reason, so that no training run ends here.

    Args:
        names: of scores.
        sample: what there is.
        **settings: by name of a score, arguments of its function.

    Raises:
        UserError: no score of that name.
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
