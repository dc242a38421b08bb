"""What a score, and the difference of two strategies, are worth on other patients; how many would show it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from dapt_jax.records.predictions import ORDER, PROBABILITY, Predictions
from dapt_jax.records.study_records import Records
from dapt_jax.report import predictions
from dapt_jax.report.marks import LEVEL
from dapt_jax.statistics import mean_of_defined, patient_weights, weighted_aucs
from dapt_jax.statistics.power import POWER

DRAWS = 200
_MOST_VALUES = 1e8


@dataclasses.dataclass(frozen=True)
class PatientError:
    """The AUC of a strategy minus that of another, or minus chance, on the patients of a split, mean over seeds.

    Attributes:
        difference: The difference.
        error: Its standard error over draws of patients, seeds held fixed.
        patients: Number of patients; of images where these name no patient, each of which is drawn by itself.
        drawn: What is drawn: "patients", or "images".
    """

    difference: float
    error: float
    patients: int
    drawn: str = "patients"

    @property
    def is_shown(self) -> bool:
        """Whether a two-sided z-test at `LEVEL` over patients shows the first strategy to be better.

        >>> PatientError(0.05, 0.025, 100).is_shown, PatientError(0.05, 0.03, 100).is_shown
        (True, False)
        """
        return self.difference > float(stats.norm.ppf(1 - LEVEL / 2)) * self.error

    @property
    def needed(self) -> float:
        """Number of patients at which a two-sided z-test at `LEVEL` finds the difference with `POWER`.

        The number is n ((z(1 - LEVEL / 2) + z(POWER)) error / difference)^2, as the standard error falls with
        the square root of the number of patients; infinite without a difference.

        >>> round(PatientError(0.05, 0.025, 100).needed)
        196
        """
        if not self.difference:
            return math.inf
        quantiles = float(stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER))
        return self.patients * (quantiles * self.error / self.difference) ** 2


def error_of_difference(
    workdir: Path, records: Records, task: str, split: str, name: str, against: str | float
) -> PatientError | None:
    """Return a strategy's AUC on a split minus another's, or minus a level, with its error over patients.

    Args:
        workdir: Folder of the study.
        records: Its records.
        task: The task.
        split: The split.
        name: The strategy.
        against: The other strategy, or a level such as chance.

    Returns:
        None where the metric is not the AUC, where predictions are missing, or too many to draw.
    """
    pairs: list[tuple[Predictions, Predictions | None]] = []
    for seed in records.seeds:
        run = _of_arm(workdir, records, task, split, name, seed)
        if run is None:
            continue
        if not isinstance(against, str):
            pairs.append((run, None))
        elif (other := _of_arm(workdir, records, task, split, against, seed)) and run.same_images(other):
            pairs.append((run, other))
    level = 0.0 if isinstance(against, str) else against
    found = _error(pairs)
    return found and dataclasses.replace(found, difference=found.difference - level)


def _of_arm(
    workdir: Path, records: Records, task: str, split: str, name: str, seed: object
) -> Predictions | None:
    """Return the predictions of an arm by which its AUC is counted; None where that is not the metric."""
    if records.metric(task) != "auc":
        return None
    kinds = (PROBABILITY, ORDER)  # a published study has the order alone, which is enough for AUC
    arm = (workdir, name, seed, task, split, records.protocol(task))
    return next((found for kind in kinds if (found := predictions.of_arm(*arm, kind)) is not None), None)


def _error(pairs: Sequence[tuple[Predictions, Predictions | None]]) -> PatientError | None:
    """Return the mean over runs of AUC, or of its difference from that of another run, over draws of patients."""
    if not pairs:
        return None
    first = pairs[0][0]
    groups = first.groups
    patients = len(np.unique(groups))
    values = DRAWS * len(pairs) * first.probabilities.size * (1 if pairs[0][1] is None else 2)
    is_same = all(np.array_equal(run.groups, groups) for run, _ in pairs)
    if patients < 2 or values > _MOST_VALUES or not is_same:
        return None
    weights = np.concatenate([np.ones((1, len(groups)), int), patient_weights(groups, DRAWS)])
    of_runs = [_aucs(run, weights) - (0 if other is None else _aucs(other, weights)) for run, other in pairs]
    differences = np.mean(of_runs, axis=0)
    draws = differences[1:][np.isfinite(differences[1:])]
    if 2 * len(draws) <= DRAWS or not np.isfinite(differences[0]):
        return None
    return PatientError(float(differences[0]), float(draws.std(ddof=1)), patients, first.drawn)


def _aucs(run: Predictions, weights: np.ndarray) -> np.ndarray:
    """Return the mean one-versus-rest AUC over the classes that a draw defines, float [draws]."""
    found = []
    for targets, scores in zip(run.targets.T, run.probabilities.T, strict=True):
        known = ~np.isnan(targets)
        if known.any():
            found.append(weighted_aucs(targets[known] == 1, scores[known].astype(float), weights[:, known]))
    if not found:
        return np.full(len(weights), np.nan)
    return mean_of_defined(np.stack(found))
