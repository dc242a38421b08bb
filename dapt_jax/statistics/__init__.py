"""Intervals and tests for scores: means, differences, non-inferiority, AUC, and ranks over tasks."""

from dapt_jax.statistics.aggregation import PATIENT, PIXELS, RULES, Aggregation, Units
from dapt_jax.statistics.comparisons import (
    Comparison,
    Estimate,
    cohens_d,
    equivalence,
    hedges_g,
    holm,
    non_inferiority,
    paired_dz,
    paired_t,
    summary_t,
    welch_t,
)
from dapt_jax.statistics.intervals import (
    Interval,
    Summary,
    bootstrap_interval,
    drawn_by,
    mean_interval,
    mean_of_defined,
    patient_draws,
    patient_interval,
    too_few_seeds,
)
from dapt_jax.statistics.power import (
    margin_for_seeds,
    power_of_non_inferiority,
    seeds_for_margin,
    upper_sd,
)
from dapt_jax.statistics.random_effects import RandomEffects, random_effects
from dapt_jax.statistics.ranks import Ranks, pareto, ranks
from dapt_jax.statistics.roc import Areas, auc, auc_half_width, delong
from dapt_jax.statistics.threshold_curves import (
    FALSE_POSITIVE_RATES,
    RECALLS,
    patient_weights,
    precision_curves,
    roc_curves,
    weighted_aucs,
)
from dapt_jax.statistics.two_level import two_level

__all__ = [
    "FALSE_POSITIVE_RATES",
    "PATIENT",
    "PIXELS",
    "RECALLS",
    "RULES",
    "Aggregation",
    "Areas",
    "Comparison",
    "Estimate",
    "Interval",
    "RandomEffects",
    "Ranks",
    "Summary",
    "Units",
    "auc",
    "auc_half_width",
    "bootstrap_interval",
    "cohens_d",
    "delong",
    "drawn_by",
    "equivalence",
    "hedges_g",
    "holm",
    "margin_for_seeds",
    "mean_interval",
    "mean_of_defined",
    "non_inferiority",
    "paired_dz",
    "paired_t",
    "pareto",
    "patient_draws",
    "patient_interval",
    "patient_weights",
    "power_of_non_inferiority",
    "precision_curves",
    "random_effects",
    "ranks",
    "roc_curves",
    "seeds_for_margin",
    "summary_t",
    "too_few_seeds",
    "two_level",
    "upper_sd",
    "weighted_aucs",
    "welch_t",
]
