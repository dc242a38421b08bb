"""Metrics of predictions, with the classes and the number of examples that each score covers.

Undefined scores are NaN.

A metric is one function under `@metric(...)`, which declares its title, direction, range and chance level:
settings, tables and figures read them from `METRICS`. This package does not need JAX.
"""

from dapt_jax.metrics.classification import (
    Predictions,
    Reliability,
    calibration_error,
    classification,
    mean_auc,
)
from dapt_jax.metrics.registry import METRICS, Metric, display_name, lookup, lower_is_better, metric
from dapt_jax.metrics.score import Score
from dapt_jax.metrics.segmentation import Segmentation, segmentation

__all__ = [
    "METRICS",
    "Metric",
    "Predictions",
    "Reliability",
    "Score",
    "Segmentation",
    "calibration_error",
    "classification",
    "display_name",
    "lookup",
    "lower_is_better",
    "mean_auc",
    "metric",
    "segmentation",
]
