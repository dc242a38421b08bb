"""Comparisons of two arms over seeds and over cases at once."""

import math
from collections.abc import Sequence

import numpy as np

from dapt_jax.statistics.comparisons import Estimate
from dapt_jax.statistics.intervals import Summary, defined


def two_level(differences: Sequence[float | None], draws: np.ndarray, patients: int) -> Estimate | None:
    """Return the mean difference of two arms with the error of other seeds and of other patients.

    Seeds and patients are crossed: every network is scored on the same images. The error has two parts, as in
    the random-reader, random-case analysis of reader studies (Obuchowski and Rockette, 1995), with seeds for
    readers: the variance between seeds, divided by their number, and the variance over draws of patients of
    the mean over all seeds. What seeds and patients do together is in both parts, so the error errs on the
    wide side. Degrees of freedom by Welch and Satterthwaite. With no variance over patients it is the paired
    t-test over seeds; with equal seeds it is the bootstrap over patients.

    Args:
        differences: First arm minus second for each seed, on all patients; None where one is missing.
        draws: The same differences for draws of patients with replacement, float [draws, seeds]; see
            `patient_draws`. NaN where undefined.
        patients: Number of patients that were drawn from.

    Returns:
        None without a seed. Without an error, where there is one seed or one patient or where more than half
        of the draws are undefined.
    """
    present = [number for number, value in enumerate(differences) if defined([value])]
    summary = Summary.of(differences)
    if summary is None:
        return None
    means = np.asarray(draws, float)[:, present].mean(1)
    known = means[np.isfinite(means)]
    if summary.n < 2 or patients < 2 or 2 * len(known) <= len(means):
        return Estimate(summary.mean, None, 0, summary.n, "two-level t-test")
    of_seeds, of_patients = summary.sd**2 / summary.n, float(known.var(ddof=1))
    total = of_seeds + of_patients
    parts = (of_seeds**2 / (summary.n - 1), of_patients**2 / (patients - 1))
    freedom = total**2 / sum(parts) if sum(parts) else summary.n - 1
    return Estimate(summary.mean, math.sqrt(total), freedom, summary.n, "two-level t-test")
