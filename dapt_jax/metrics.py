"""Scores of predicted probabilities; undefined ones are NaN, and which classes they cover is said."""

import dataclasses

import numpy as np
from jaxtyping import Float, Shaped
from sklearn import metrics as sk


@dataclasses.dataclass(frozen=True)
class Score:
    """One number about one set of predictions.

    Attributes:
        metric: its name.
        value: NaN where it is undefined.
        n: examples that it covers.
        classes: names of the classes that it covers.
    """

    metric: str
    value: float
    n: int
    classes: tuple[str, ...]


def classification(
    labels: Shaped[np.ndarray, "n ..."], probabilities: Float[np.ndarray, "n classes"], classes: tuple[str, ...]
) -> list[Score]:
    """Macro one-versus-rest AUC, AUC per class, balanced accuracy, accuracy and calibration error.

    Args:
        labels: class numbers [n], or 0/1 with NaN for missing [n, classes] for multi-label tasks.
        probabilities: one row per example.
        classes: names of the columns.

    Returns:
        `auc` (mean over the classes that have both positives and negatives, which it names), `auc/<class>`,
        `balanced_accuracy` (mean recall over the classes present), `accuracy`, `ece` (15 bins of equal width over the
        probability of the predicted class: Guo et al., arXiv 1706.04599). Multi-label tasks have the AUCs alone.
    """
    multi_label = labels.ndim == 2
    targets = labels if multi_label else np.eye(len(classes))[labels]
    scores, defined = [], []
    for column, name in enumerate(classes):
        known = ~np.isnan(targets[:, column])
        truth = targets[known, column]
        both = 0 < truth.sum() < len(truth)
        value = float(sk.roc_auc_score(truth, probabilities[known, column])) if both else float("nan")
        if both:
            defined.append((name, value))
        scores.append(Score(f"auc/{name}", value, int(known.sum()), (name,)))
    names = tuple(name for name, _ in defined)
    mean = float(np.mean([value for _, value in defined])) if defined else float("nan")
    scores.insert(0, Score("auc", mean, len(labels), names))
    if multi_label:
        return scores
    predicted = probabilities.argmax(1)
    present = np.unique(labels)
    recall = float(np.mean([(predicted[labels == each] == each).mean() for each in present]))
    scores.append(Score("balanced_accuracy", recall, len(labels), tuple(classes[each] for each in present)))
    scores.append(Score("accuracy", float((predicted == labels).mean()), len(labels), classes))
    scores.append(Score("ece", calibration_error(labels, probabilities), len(labels), classes))
    return scores


def calibration_error(
    labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"], bins: int = 15
) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over bins, weighted by their size."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    size = np.bincount(bin_of, minlength=bins)
    gap = np.bincount(bin_of, confidence - correct, minlength=bins)
    return float(np.abs(gap).sum() / size.sum())
