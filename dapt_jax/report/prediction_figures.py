"""Figures of predictions: ROC and precision-recall curves, reliability diagrams and confusion matrices."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dapt_jax.metrics import Reliability
from dapt_jax.records.predictions import Predictions
from dapt_jax.records.study_records import Records
from dapt_jax.report import predictions
from dapt_jax.report.recommendation import arms_shown
from dapt_jax.report.style import GREY, INK, strategy_styles
from dapt_jax.statistics import (
    FALSE_POSITIVE_RATES,
    RECALLS,
    patient_weights,
    precision_curves,
    roc_curves,
)

DRAWS, FEWEST_DRAWS = 200, 50
"""Draws of patients behind a band, and the number below which there is no band."""
_MOST_VALUES, _MOST_AT_ONCE = 2e8, 5e6
MOST_CLASSES, MOST_CURVES = 12, 100
"""Classes up to which a confusion matrix is drawn, and up to which curves are averaged."""
_SIZE = (3.9, 4.3)
_LONGEST_NAME = 18

Curves = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Function from positives, scores and weights to curves, see `statistics.threshold_curves`."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure of predictions.

    Attributes:
        name: Part of its file name.
        figure: The figure.
        caption: Text below it.
        alt: Text in its place.
    """

    name: str
    figure: Figure
    caption: str
    alt: str


@dataclasses.dataclass(frozen=True)
class SplitPredictions:
    """The predictions of the arms shown on one split.

    Attributes:
        task: The task.
        split: The split.
        runs: Predictions of every seed by strategy; all of the same images.
        colours: Colour by strategy.
        has_folds: Whether the task is cross-validated, so that a table's score is a mean over folds.
    """

    task: str
    split: str
    runs: dict[str, list[Predictions]]
    colours: dict[str, str]
    has_folds: bool = False

    @classmethod
    def read(cls, workdir: Path, records: Records, task: str, split: str) -> SplitPredictions | None:
        """Read the predictions of the arms shown, by the primary protocol; None without any."""
        runs: dict[str, list[Predictions]] = {}
        first = None
        for name in arms_shown(records, task):
            for seed in records.seeds:
                found = predictions.of_arm(workdir, name, seed, task, split, records.protocol(task))
                if found is None or not len(found.groups) or not found.probabilities.shape[1]:
                    continue
                first = first or found
                if len(named := _classes(records, task)) == found.probabilities.shape[1]:
                    found = dataclasses.replace(found, classes=named)
                is_like = (found.labels is None) == (first.labels is None)
                if is_like and found.probabilities.shape == first.probabilities.shape:
                    runs.setdefault(name, []).append(found)
        styles = strategy_styles(records.strategies)
        colours = {name: styles[name][0] for name in runs}
        return cls(task, split, runs, colours, "development" in records.splits(task)) if runs else None

    @property
    def first(self) -> Predictions:
        """One of the predictions, which has the images and classes of all."""
        return next(iter(self.runs.values()))[0]

    @property
    def columns(self) -> list[int]:
        """Classes whose curves are averaged: all, or the second of two exclusive ones."""
        classes = self.first.probabilities.shape[1]
        return [1] if classes == 2 and self.first.labels is not None else list(range(classes))

    @property
    def draws(self) -> int:
        """Number of draws of patients that there is time for; 0 below `FEWEST_DRAWS`."""
        n, runs = len(self.first.groups), sum(map(len, self.runs.values()))
        possible = int(min(DRAWS, _MOST_AT_ONCE / n, _MOST_VALUES / (n * runs * len(self.columns))))
        return possible if possible >= FEWEST_DRAWS and len(np.unique(self.first.groups)) > 1 else 0

    @property
    def of_classes(self) -> str:
        """What the curves are of, as a part of a caption."""
        folds = (
            " Predictions of all folds are taken together, so that values differ from the table's means over folds."
            if self.has_folds
            else ""
        )
        if len(self.columns) == 1:
            return f"Positive: {self.first.classes[self.columns[0]]}.{folds}"
        return f"Each class against the rest, mean over classes.{folds}"

    def pictures(self) -> list[Picture]:
        """Return the figures for which the predictions suffice."""
        found = [self._reliability()]
        if len(self.columns) <= MOST_CURVES:
            found = [self._roc(), self._precision(), *found]
        return [each for each in found if each] + self._confusions()

    def _roc(self) -> Picture | None:
        figure, axes = _square()
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (1, 2)), label="chance, AUC 0.500")
        areas = {
            name: _mean([run.auc(np.arange(len(run.groups))) for run in runs])
            for name, runs in self.runs.items()
        }
        if not self._bands(
            axes, FALSE_POSITIVE_RATES, roc_curves, {n: f"{n}, AUC {a:.3f}" for n, a in areas.items()}
        ):
            return None
        _finish(figure, axes, "false positive rate (1 - specificity)", "true positive rate (sensitivity)")
        caption = f"ROC. {self.of_classes} {self._band_words}"
        return Picture("roc", figure, caption, self._alt("ROC curves", "AUC", areas, "0.500"))

    def _precision(self) -> Picture | None:
        figure, axes = _square()
        shares = [_share(self.first.targets[:, column]) for column in self.columns]
        share = _mean(shares)
        axes.axhline(
            share, color=GREY, linestyle=(0, (1, 2)), label=f"chance, share of positives {share:.3f}"
        )
        values = {
            name: _mean([_average_precision(run, column) for run in runs for column in self.columns])
            for name, runs in self.runs.items()
        }
        labels = {name: f"{name}, AP {value:.3f}" for name, value in values.items()}
        if not self._bands(axes, RECALLS, precision_curves, labels):
            return None
        _finish(figure, axes, "recall (sensitivity)", "precision (positive predictive value)")
        caption = f"Precision and recall. {self.of_classes} {self._band_words}"
        return Picture(
            "precision_recall",
            figure,
            caption,
            self._alt("Precision-recall curves", "AP", values, f"{share:.3f}"),
        )

    def _bands(self, axes: Axes, x: np.ndarray, curves: Curves, labels: dict[str, str]) -> bool:
        """Draw the mean curve of each arm over its seeds, with its band; return whether any is defined."""
        groups = self.first.groups
        weights = np.concatenate([np.ones((1, len(groups)), int), patient_weights(groups, self.draws)])
        is_any = False
        for name, runs in self.runs.items():
            mean = _mean_curves(runs, self.columns, curves, weights)
            if not np.isfinite(mean[0]).all():
                continue
            is_any = True
            axes.plot(x, mean[0], color=self.colours[name], linewidth=1.8, label=labels[name])
            known = mean[1:][np.isfinite(mean[1:]).all(1)]
            if 2 * len(known) > self.draws > 0:
                low, high = np.quantile(known, [0.025, 0.975], axis=0)
                axes.fill_between(x, low, high, color=self.colours[name], alpha=0.15, linewidth=0)
        return is_any

    @property
    def _band_words(self) -> str:
        words = "Lines: mean over seeds."
        return f"{words} Bands: 95% over {self.draws} draws of {self.first.drawn}." if self.draws else words

    def _alt(self, what: str, measure: str, values: dict[str, float], chance: str = "") -> str:
        listed = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        return f"{what} of {self.task}, {self.split} images. {measure}: {listed}{f'; chance {chance}' if chance else ''}."

    def _reliability(self) -> Picture | None:
        if self.first.labels is None:
            return None
        figure, axes = _square()
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (1, 2)), label="perfect calibration")
        errors = {}
        for name, runs in self.runs.items():
            errors[name] = _mean([Reliability.of(_labels(run), run.probabilities).error for run in runs])
            together = Reliability.of(
                np.concatenate([_labels(run) for run in runs]),
                np.concatenate([run.probabilities for run in runs]),
            )
            filled, colour = together.size > 0, self.colours[name]
            x, y = together.confidence[filled], together.accuracy[filled]
            areas = 10 + 150 * together.size[filled] / together.size.sum()
            axes.plot(
                x,
                y,
                color=colour,
                linewidth=1.3,
                marker="o",
                markersize=3,
                label=f"{name}, ECE {errors[name]:.3f}",
            )
            axes.scatter(x, y, s=areas, color=colour, alpha=0.25, linewidths=0)
        _finish(figure, axes, "confidence (probability of the predicted class)", "accuracy")
        caption = (
            "Reliability. Below the diagonal: overconfident. 15 bins of confidence, all seeds together; larger "
            "discs hold more images. ECE: mean over seeds."
        )
        return Picture("reliability", figure, caption, self._alt("Reliability diagram", "ECE", errors))

    def _confusions(self) -> list[Picture]:
        from sklearn.metrics import confusion_matrix  # a second to import, which a first step does not need

        classes = self.first.classes
        if self.first.labels is None or len(classes) > MOST_CLASSES:
            return []
        found = []
        for name, runs in self.runs.items():
            counts = np.mean(
                [
                    confusion_matrix(_labels(r), r.probabilities.argmax(1), labels=range(len(classes)))
                    for r in runs
                ],
                0,
            )
            caption = (
                f"Confusion matrix of {name}. Shares of each true class; below them images, mean over seeds."
            )
            recalls = ", ".join(
                f"{each} {counts[row, row] / counts[row].sum():.2f}"
                for row, each in enumerate(classes)
                if counts[row].sum()
            )
            alt = f"Confusion matrix of {name} on {self.split} images of {self.task}. Recall: {recalls}."
            found.append(Picture(f"confusion_{name}", _confusion(counts, classes, name), caption, alt))
        return found


def _classes(records: Records, task: str) -> tuple[str, ...]:
    """Return the names of a task's classes by its results, which older files of predictions lack."""
    listed = (
        row.get("classes") for row in records.results if row["task"] == task and "/" not in row["metric"]
    )
    names = max((each for each in listed if isinstance(each, list)), key=len, default=[])
    return tuple(names)


def _confusion(counts: np.ndarray, classes: tuple[str, ...], title: str) -> Figure:
    """Draw a matrix of true classes by predicted ones."""
    figure, axes = _square()
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 9 if len(classes) <= 5 else 7 if len(classes) <= 8 else 5.5
    for (row, column), count in np.ndenumerate(counts):
        if totals[row, 0]:
            text = f"{shares[row, column]:.2f}".removeprefix("0")
            text += f"\n{count:.0f}" if len(classes) <= 8 else ""
            colour = "white" if shares[row, column] > 0.6 else INK
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    names = [_short(name) for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.grid(visible=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."


def _square() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.subplots()


def _finish(figure: Figure, axes: Axes, x: str, y: str) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_box_aspect(1)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    figure.legend(loc="outside lower center", ncols=1, fontsize=9)


def _mean_curves(
    runs: list[Predictions], columns: list[int], curves: Curves, weights: np.ndarray
) -> np.ndarray:
    """Return the mean curve over classes and runs, for each row of the weights."""
    of_runs = []
    for run in runs:
        of_classes = []
        for column in columns:
            known = ~np.isnan(run.targets[:, column])
            if known.any():
                positive = run.targets[known, column] == 1
                of_classes.append(
                    curves(positive, run.probabilities[known, column].astype(float), weights[:, known])
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the mean of no defined class is NaN
            of_runs.append(
                np.nanmean(of_classes, axis=0) if of_classes else np.full((len(weights), 1), np.nan)
            )
    mean: np.ndarray = np.mean(of_runs, axis=0)
    return mean


def _average_precision(run: Predictions, column: int) -> float:
    from sklearn.metrics import average_precision_score

    known = ~np.isnan(run.targets[:, column])
    truth = run.targets[known, column]
    return float(average_precision_score(truth, run.probabilities[known, column])) if truth.any() else np.nan


def _share(targets: np.ndarray) -> float:
    known = targets[~np.isnan(targets)]
    return float(known.mean()) if known.any() else np.nan


def _labels(run: Predictions) -> np.ndarray:
    assert run.labels is not None
    return run.labels


def _mean(values: list[float]) -> float:
    """Return the mean of the defined values; NaN without any."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else np.nan
