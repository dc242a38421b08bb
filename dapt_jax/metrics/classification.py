"""Metrics of predicted class probabilities."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from types import ModuleType

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from dapt_jax.errors import UserError
from dapt_jax.metrics.registry import MULTI_LABEL, ORDINAL, SINGLE_LABEL, measure, measures, metric
from dapt_jax.metrics.score import Score

THRESHOLD = 0.5


@functools.cache
def _sklearn() -> ModuleType:
    """Return scikit-learn's metrics: a second to import, which settings, reports and plans do not need."""
    from sklearn import metrics

    return metrics


def classification(
    labels: Shaped[np.ndarray, "n ..."],
    probabilities: Float[np.ndarray, "n classes"],
    classes: tuple[str, ...],
    ordinal: bool = False,
    seen: Bool[np.ndarray, " classes"] | None = None,
    subset: tuple[str, ...] = (),
) -> list[Score]:
    """Return all registered ranking, decision and calibration scores that apply to predictions.

    Args:
        labels: Class numbers [n], or 0/1 with NaN for missing [n, classes] for multi-label tasks.
        probabilities: Predicted probabilities, one row per example.
        classes: Names of the columns.
        ordinal: Whether the classes are ordinal.
        seen: Classes in the training data of the head; None for all. Scores of single classes, and their
            means, exclude a class without training data: its predictions are chance.
        subset: Classes over which `auc_subset`, their mean AUC, is taken too; empty for none.

    Returns:
        First `auc`, one class against the rest, its mean over the classes that have both positives and
        negatives, which it names, and `auc/<class>`; then `ap`, average precision, over the classes that have
        positives, and `ap/<class>`.

        Of tasks with one class per image, by the class of the highest probability: `balanced_accuracy` (mean
        recall over the classes present), `accuracy`, `f1` (mean over the classes that are present or
        predicted), `mcc` (Matthews' correlation, of several classes as in Gorodkin, 2004; 0 where truth or
        prediction is one class alone), `kappa` (Cohen, 1960) and, of ordinal tasks, `kappa_quadratic`
        (weighted by the squared distance of the classes; Cohen, 1968), both undefined where truth and
        prediction are the same one class; `ece` (15 bins of equal width over the probability of the predicted
        class: Guo et al., arXiv 1706.04599).

        Of multi-label tasks, a class being predicted above a probability of 0.5: `f1` (mean over the classes
        that are present or predicted) and `accuracy` (mean over the classes that have labels; MedMNIST's,
        arXiv 2110.14795).

        A score covers only the classes that it names; a score that covers none is NaN.

    Raises:
        UserError: Labels and probabilities do not fit each other or the classes, or a probability is not finite.
    """
    if labels.ndim == 2:
        kinds: tuple[str, ...] = (MULTI_LABEL,)
    else:
        kinds = (SINGLE_LABEL, ORDINAL) if ordinal else (SINGLE_LABEL,)
    predictions = Predictions(
        labels, probabilities, classes, np.ones(len(classes), bool) if seen is None else seen, subset
    )
    return [score for function in measures(*kinds) for score in function(predictions)]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Input of the classification metrics.

    Attributes:
        labels: Class numbers [n], or 0/1 with NaN for missing [n, classes].
        probabilities: Predicted probabilities, one row per example.
        classes: Names of the columns.
        seen: Classes in the training data of the head.
        subset: Classes of `auc_subset`.
    """

    labels: Shaped[np.ndarray, "n ..."]
    probabilities: Float[np.ndarray, "n classes"]
    classes: tuple[str, ...]
    seen: Bool[np.ndarray, " classes"]
    subset: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expected = len(self.labels), len(self.classes)
        if self.probabilities.shape != expected or self.labels.shape not in (expected[:1], expected):
            raise UserError(
                f"labels are {self.labels.shape} and probabilities {self.probabilities.shape} of {len(self.classes)} "
                "classes; expected one row for each example and one probability for each class"
            )
        if self.labels.ndim == 2:
            is_label = np.isnan(self.labels) | (self.labels == 0) | (self.labels == 1)
            known = "0, 1 or NaN for each class"
        else:
            is_label = (self.labels >= 0) & (self.labels < len(self.classes))
            known = f"class numbers from 0 to {len(self.classes) - 1}"
        if not is_label.all():
            raise UserError(f"a label is {self.labels[~is_label][0]}; expected {known}")
        bad = ~np.isfinite(self.probabilities).all(1)
        if bad.any():
            raise UserError(
                f"probabilities of row {bad.argmax()} are not finite ({bad.sum()} of {len(bad)} rows); expected "
                "numbers from 0 to 1, of finite features and a head that has not diverged"
            )

    @property
    def targets(self) -> Shaped[np.ndarray, "n classes"]:
        """Target of each probability: 0 or 1, NaN where it is unknown."""
        return self.labels if self.labels.ndim == 2 else np.eye(len(self.classes))[self.labels]

    @property
    def predicted(self) -> Int[np.ndarray, " n"]:
        """Class of the highest probability."""
        return self.probabilities.argmax(1)

    @property
    def decisions(self) -> Bool[np.ndarray, "n classes"]:
        """Whether each class is predicted: by a threshold if multi-label, else by the highest probability."""
        if self.labels.ndim == 2:
            return self.probabilities > THRESHOLD
        return np.eye(len(self.classes), dtype=bool)[self.predicted]

    def whole(self, name: str, value: float, classes: tuple[str, ...] | None = None) -> list[Score]:
        """Return one score over all rows, and over all classes unless some are named."""
        return [Score(name, value, len(self.labels), self.classes if classes is None else classes)]

    def by_class(
        self,
        name: str,
        columns: Shaped[np.ndarray, "n classes"],
        function: Callable[[np.ndarray, np.ndarray], float],
    ) -> list[Score]:
        """Return the mean score over classes with training data, then the score of each class.

        Rows with an unknown label are ignored.

        Args:
            name: Name of the metric.
            columns: Probabilities or binary predictions.
            function: Function from the targets and the column of a class to its value; NaN if undefined.
        """
        targets = self.targets
        known = ~np.isnan(targets)
        values = np.array(
            [
                function(targets[rows, column], columns[rows, column]) if rows.any() else np.nan
                for column, rows in enumerate(known.T)
            ]
        )
        values[~self.seen] = np.nan
        defined = np.isfinite(values)
        mean = float(values[defined].mean()) if defined.any() else float("nan")
        covered = tuple(each for each, is_defined in zip(self.classes, defined, strict=True) if is_defined)
        of_classes = [
            Score(f"{name}/{each}", float(value), int(rows.sum()), (each,))
            for each, value, rows in zip(self.classes, values, known.T, strict=True)
        ]
        return [Score(name, mean, int(known.any(1).sum()), covered), *of_classes]


@metric("auc", title="AUC", kinds=(SINGLE_LABEL, MULTI_LABEL), chance=0.5, per_class=True)
def _aucs(found: Predictions) -> Iterable[Score]:
    return found.by_class("auc", found.probabilities, _auc)


@metric("auc_subset", title="AUC (chosen classes)", kinds=(SINGLE_LABEL, MULTI_LABEL), chance=0.5)
def _auc_of_subset(found: Predictions) -> Iterable[Score]:
    """The mean over `subset` of what `auc` reports of each class; nothing where no classes are chosen."""
    if not found.subset:
        return []
    of_class = {score.metric.partition("/")[2]: score for score in _aucs(found)}
    chosen = [of_class[name] for name in found.subset if np.isfinite(of_class[name].value)]
    mean = float(np.mean([score.value for score in chosen])) if chosen else float("nan")
    covered = tuple(score.classes[0] for score in chosen)
    return found.whole("auc_subset", mean, covered)


@metric("auc_epochs", title="AUC, mean over the head's epochs", kinds=(), chance=0.5)
@metric("auc_epochs_sd", title="AUC, deviation over the head's epochs", kinds=(), higher_is_better=False)
def _of_epochs(found: Predictions) -> Iterable[Score]:
    """Computed over the epochs of a head: see `study.head_curves`."""
    return []


@metric("ap", title="AP", kinds=(SINGLE_LABEL, MULTI_LABEL), per_class=True)
def _average_precisions(found: Predictions) -> Iterable[Score]:
    return found.by_class("ap", found.probabilities, _average_precision)


@metric("f1", title="F1", kinds=(MULTI_LABEL,))
def _f1s(found: Predictions) -> Iterable[Score]:
    return found.by_class("f1", found.decisions, _f1)[:1]


@metric("accuracy", title="accuracy", kinds=(MULTI_LABEL,))
def _accuracies(found: Predictions) -> Iterable[Score]:
    return found.by_class(
        "accuracy", found.decisions, lambda truth, predicted: float((truth == predicted).mean())
    )[:1]


@metric("balanced_accuracy", title="balanced accuracy", kinds=(SINGLE_LABEL,))
def _balanced_accuracy(found: Predictions) -> Iterable[Score]:
    present = [each for each in np.unique(found.labels) if found.seen[each]]
    recalls = [(found.predicted[found.labels == each] == each).mean() for each in present]
    mean = float(np.mean(recalls)) if present else float("nan")
    return found.whole("balanced_accuracy", mean, tuple(found.classes[each] for each in present))


@measure("accuracy", (SINGLE_LABEL,))
def _accuracy(found: Predictions) -> Iterable[Score]:
    return found.whole("accuracy", float((found.predicted == found.labels).mean()))


measure("f1", (SINGLE_LABEL,))(_f1s)


@metric("mcc", title="MCC", kinds=(SINGLE_LABEL,), low=-1.0, chance=0.0)
def _matthews(found: Predictions) -> Iterable[Score]:
    return found.whole("mcc", float(_sklearn().matthews_corrcoef(found.labels, found.predicted)))


@metric("kappa", title="kappa", kinds=(SINGLE_LABEL,), low=-1.0, chance=0.0)
def _kappa(found: Predictions) -> Iterable[Score]:
    return found.whole("kappa", kappa(found.labels, found.predicted, len(found.classes)))


@metric("kappa_quadratic", title="quadratic kappa", kinds=(ORDINAL,), low=-1.0, chance=0.0)
def _quadratic_kappa(found: Predictions) -> Iterable[Score]:
    return found.whole(
        "kappa_quadratic", kappa(found.labels, found.predicted, len(found.classes), "quadratic")
    )


@metric("ece", title="ECE", kinds=(SINGLE_LABEL,), higher_is_better=False)
def _calibration_error(found: Predictions) -> Iterable[Score]:
    return found.whole("ece", calibration_error(found.labels, found.probabilities))


def mean_auc(
    labels: Shaped[np.ndarray, "n ..."],
    probabilities: Float[np.ndarray, "n classes"],
    classes: tuple[str, ...],
    seen: Bool[np.ndarray, " classes"],
) -> float:
    """Return the score `auc` of `classification` alone; NaN where no class has positives and negatives."""
    found = Predictions(labels, probabilities, classes, seen)
    return next(iter(_aucs(found))).value


def _auc(truth: Shaped[np.ndarray, " n"], probability: Float[np.ndarray, " n"]) -> float:
    return (
        float(_sklearn().roc_auc_score(truth, probability)) if 0 < truth.sum() < len(truth) else float("nan")
    )


def _average_precision(truth: Shaped[np.ndarray, " n"], probability: Float[np.ndarray, " n"]) -> float:
    return float(_sklearn().average_precision_score(truth, probability)) if truth.any() else float("nan")


def _f1(truth: Shaped[np.ndarray, " n"], predicted: Bool[np.ndarray, " n"]) -> float:
    both, either = (truth * predicted).sum(), truth.sum() + predicted.sum()
    return float(2 * both / either) if either else float("nan")


def kappa(
    labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], classes: int, weights: str | None = None
) -> float:
    """Return Cohen's kappa; NaN where labels and predictions are the same single class.

    No disagreement is then expected by chance.

    Args:
        labels: True class numbers.
        predicted: Predicted class numbers.
        classes: Number of classes; absent ones count in the distance between the others.
        weights: `quadratic` for the squared distance; None for exact agreement.
    """
    if len(np.union1d(labels, predicted)) < 2:
        return float("nan")
    return float(_sklearn().cohen_kappa_score(labels, predicted, labels=np.arange(classes), weights=weights))


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Confidence and accuracy in bins of equal width over the probability of the predicted class.

    >>> bins = Reliability.of(np.array([0, 1]), np.array([[0.875, 0.125], [0.75, 0.25]]), 2)
    >>> bins.size.tolist(), float(bins.confidence[1]), float(bins.accuracy[1]), bins.error
    ([0, 2], 0.8125, 0.5, 0.3125)

    Attributes:
        size: Number of images of each bin.
        confidence: Mean probability of the predicted class in each bin; NaN of an empty one.
        accuracy: Share of images of each bin whose prediction is right; NaN of an empty one.
        error: Expected calibration error: the mean gap of confidence and accuracy, weighted by size.
    """

    size: Int[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]
    error: float

    @classmethod
    def of(
        cls, labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"], bins: int = 15
    ) -> "Reliability":
        """Return the bins of predictions.

        Args:
            labels: True class numbers.
            probabilities: Predicted probabilities.
            bins: Number of bins.
        """
        confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
        bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
        size = np.bincount(bin_of, minlength=bins)
        gap = np.bincount(bin_of, confidence - correct, minlength=bins)
        with np.errstate(invalid="ignore"):
            mean, share = (np.bincount(bin_of, each, minlength=bins) / size for each in (confidence, correct))
        return cls(size, mean, share, float(np.abs(gap).sum() / size.sum()))


def calibration_error(
    labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"], bins: int = 15
) -> float:
    """Return the expected calibration error; see `Reliability`."""
    return Reliability.of(labels, probabilities, bins).error
