"""Metrics of masks over the pixels of all images: rates, MCC, and areas under curves of probabilities."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from dapt_jax.metrics.registry import MASKS, metric
from dapt_jax.metrics.score import Score

_HALF = int(np.float16(0.5).view(np.uint16))
BINS = 2 * _HALF + 1
"""Number of classes of probabilities that `bins` tells apart."""


def bins(probabilities: Float[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
    """Return the class of each probability, higher for higher ones: float16 of it or of its complement.

    >>> bins(np.array([0.0, 0.5, 1.0])).tolist()
    [0, 14336, 28672]
    """
    p = np.clip(np.asarray(probabilities, np.float32), 0, 1)
    near = np.minimum(p, 1 - p).astype(np.float16).view(np.uint16).astype(np.int32)
    return np.where(p <= 0.5, near, 2 * _HALF - near)


def counted(
    truth: Bool[np.ndarray, "*n"], probabilities: Float[np.ndarray, "*n"]
) -> Int[np.ndarray, "2 classes"]:
    """Return the number of pixels outside and inside of a region by class of their probability."""
    places = bins(probabilities).ravel() + BINS * truth.ravel().astype(np.int32)
    return np.bincount(places, minlength=2 * BINS).reshape(2, BINS)


def auc(counts: Int[np.ndarray, "2 classes"]) -> float:
    """Return the area under the ROC curve; NaN without pixels of both kinds."""
    outside, inside = counts.astype(float)
    pairs = outside.sum() * inside.sum()
    below = np.cumsum(outside) - outside
    return float(np.sum(inside * (below + outside / 2)) / pairs) if pairs else float("nan")


def average_precision(counts: Int[np.ndarray, "2 classes"]) -> float:
    """Return the mean of precision over recall, as a sum of steps; NaN without pixels inside."""
    outside, inside = (np.cumsum(each[::-1].astype(float)) for each in counts)
    if not inside[-1]:
        return float("nan")
    precision = np.divide(inside, inside + outside, out=np.zeros(len(inside)), where=inside + outside > 0)
    return float(np.sum(np.diff(inside, prepend=0) * precision) / inside[-1])


Rate = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.full(np.shape(over), np.nan), where=under > 0)


def _sensitivity(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> np.ndarray:
    return _ratio(tp, tp + fn)


def _specificity(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> np.ndarray:
    return _ratio(tn, tn + fp)


def _precision(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> np.ndarray:
    return _ratio(tp, tp + fp)


def _balanced(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> np.ndarray:
    return (_sensitivity(tp, fp, fn, tn) + _specificity(tp, fp, fn, tn)) / 2


def _mcc(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> np.ndarray:
    root = np.sqrt(tp + fp) * np.sqrt(tp + fn) * np.sqrt(tn + fp) * np.sqrt(tn + fn)
    return _ratio(tp * tn - fp * fn, root)


def _declare(name: str, title: str, rate: Rate, **bounds: Any) -> None:
    @metric(name, title=title, kinds=(MASKS,), per_class=True, is_default=False, **bounds)
    def _pooled(images: Any) -> Iterable[Score]:
        return images.pooled(
            name,
            lambda both, truth, found, pixels: rate(
                both, found - both, truth - both, pixels - truth - found + both
            ),
        )


_declare("sensitivity_pooled", "sensitivity", _sensitivity)
_declare("specificity_pooled", "specificity", _specificity)
_declare("precision_pooled", "precision", _precision)
_declare("balanced_accuracy_pooled", "balanced accuracy", _balanced, chance=0.5)
_declare("mcc_pooled", "MCC", _mcc, low=-1.0, chance=0.0)


@metric("auc_pooled", title="AUC of pixels", kinds=(MASKS,), chance=0.5, per_class=True, is_default=False)
def _aucs(images: Any) -> Iterable[Score]:
    return images.ranked("auc_pooled", auc)


@metric("ap_pooled", title="AP of pixels", kinds=(MASKS,), per_class=True, is_default=False)
def _average_precisions(images: Any) -> Iterable[Score]:
    return images.ranked("ap_pooled", average_precision)
