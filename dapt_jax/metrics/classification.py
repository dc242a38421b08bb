"""Scores of predicted probabilities of classes."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from sklearn import metrics as sk

from dapt_jax.metrics.score import Score

THRESHOLD = 0.5


def classification(
    labels: Shaped[np.ndarray, "n ..."],
    probabilities: Float[np.ndarray, "n classes"],
    classes: tuple[str, ...],
    ordinal: bool = False,
    seen: Bool[np.ndarray, " classes"] | None = None,
) -> list[Score]:
    """Ranking, decision and calibration scores.

    Args:
        labels: class numbers [n], or 0/1 with NaN for missing [n, classes] for multi-label tasks.
        probabilities: one row per example.
        classes: names of the columns.
        ordinal: whether the class numbers are an order.
        seen: which classes the predictions were trained on; None for all. Scores of single classes, and their means, leave
            out a class that a head never saw: what it says of it is chance.

    Returns:
        First `auc`, one class against the rest, its mean over the classes that have both positives and negatives, which
        it names, and `auc/<class>`; then `ap`, average precision, over the classes that have positives, and `ap/<class>`.

        Of tasks with one class per image, by the class of the highest probability: `balanced_accuracy` (mean recall over
        the classes present), `accuracy`, `f1` (mean over the classes that are present or predicted), `mcc` (Matthews'
        correlation, of several classes as in Gorodkin, 2004; 0 where truth or prediction is one class alone), `kappa`
        (Cohen, 1960) and, of ordinal tasks, `kappa_quadratic` (weighted by the squared distance of the classes; Cohen,
        1968), both undefined where truth and prediction are the same one class; `ece` (15 bins of equal width over
        the probability of the predicted class: Guo et al., arXiv 1706.04599).

        Of multi-label tasks, a class being predicted above a probability of 0.5: `f1` (mean over the classes that are
        present or predicted) and `accuracy` (mean over the classes that have labels; MedMNIST's, arXiv 2110.14795).

        Classes that are not named in a score do not count in it; a score that covers none is NaN.
    """
    multi_label = labels.ndim == 2
    targets = labels if multi_label else np.eye(len(classes))[labels]
    known = np.ones(len(classes), bool) if seen is None else seen
    scores = [
        *_by_class("auc", targets, probabilities, classes, _auc, known),
        *_by_class("ap", targets, probabilities, classes, _average_precision, known),
    ]
    if multi_label:
        predicted = probabilities > THRESHOLD
        for metric, measure in (("f1", _f1), ("accuracy", _accuracy)):
            scores.append(next(_by_class(metric, targets, predicted, classes, measure, known)))
        return scores
    return scores + list(_of_decisions(labels, probabilities, classes, ordinal, known))


def _by_class(
    metric: str,
    targets: Shaped[np.ndarray, "n classes"],
    predictions: Shaped[np.ndarray, "n classes"],
    classes: tuple[str, ...],
    measure: Callable[[np.ndarray, np.ndarray], float],
    seen: Bool[np.ndarray, " classes"],
) -> Iterator[Score]:
    """The mean over classes that were seen, then each class: of the rows whose label is known."""
    known = ~np.isnan(targets)
    values = np.array(
        [
            measure(targets[rows, column], predictions[rows, column]) if rows.any() else np.nan
            for column, rows in enumerate(known.T)
        ]
    )
    values[~seen] = np.nan
    defined = np.isfinite(values)
    mean = float(values[defined].mean()) if defined.any() else float("nan")
    covered = tuple(name for name, is_defined in zip(classes, defined, strict=True) if is_defined)
    yield Score(metric, mean, int(known.any(1).sum()), covered)
    for name, value, rows in zip(classes, values, known.T, strict=True):
        yield Score(f"{metric}/{name}", float(value), int(rows.sum()), (name,))


def _auc(truth: Shaped[np.ndarray, " n"], probability: Float[np.ndarray, " n"]) -> float:
    return float(sk.roc_auc_score(truth, probability)) if 0 < truth.sum() < len(truth) else float("nan")


def _average_precision(truth: Shaped[np.ndarray, " n"], probability: Float[np.ndarray, " n"]) -> float:
    return float(sk.average_precision_score(truth, probability)) if truth.any() else float("nan")


def _f1(truth: Shaped[np.ndarray, " n"], predicted: Bool[np.ndarray, " n"]) -> float:
    both, either = (truth * predicted).sum(), truth.sum() + predicted.sum()
    return float(2 * both / either) if either else float("nan")


def _accuracy(truth: Shaped[np.ndarray, " n"], predicted: Bool[np.ndarray, " n"]) -> float:
    return float((truth == predicted).mean())


def _of_decisions(
    labels: Shaped[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
    classes: tuple[str, ...],
    ordinal: bool,
    seen: Bool[np.ndarray, " classes"],
) -> Iterator[Score]:
    n, predicted = len(labels), probabilities.argmax(1)
    present = [each for each in np.unique(labels) if seen[each]]
    recall = float(np.mean([(predicted[labels == each] == each).mean() for each in present])) if present else np.nan
    yield Score("balanced_accuracy", recall, n, tuple(classes[each] for each in present))
    yield Score("accuracy", float((predicted == labels).mean()), n, classes)
    chosen = np.eye(len(classes), dtype=bool)
    yield next(_by_class("f1", chosen[labels].astype(float), chosen[predicted], classes, _f1, seen))
    yield Score("mcc", float(sk.matthews_corrcoef(labels, predicted)), n, classes)
    yield Score("kappa", kappa(labels, predicted, len(classes)), n, classes)
    if ordinal:
        yield Score("kappa_quadratic", kappa(labels, predicted, len(classes), "quadratic"), n, classes)
    yield Score("ece", calibration_error(labels, probabilities), n, classes)


def kappa(
    labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], classes: int, weights: str | None = None
) -> float:
    """Cohen's kappa; NaN where both are the same one class, so that no disagreement could be expected by chance.

    Args:
        labels: class numbers.
        predicted: class numbers.
        classes: how many there are. Absent ones count for the distance between the others.
        weights: `quadratic` for the squared distance; None for agreement or not.
    """
    if len(np.union1d(labels, predicted)) < 2:
        return float("nan")
    return float(sk.cohen_kappa_score(labels, predicted, labels=np.arange(classes), weights=weights))


def calibration_error(
    labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"], bins: int = 15
) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over bins, weighted by their size."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    size = np.bincount(bin_of, minlength=bins)
    gap = np.bincount(bin_of, confidence - correct, minlength=bins)
    return float(np.abs(gap).sum() / size.sum())
