"""Metrics of predictions; undefined scores are NaN, and which classes and how many examples they cover is said.

A metric is one function under `@metric(...)`, which declares its title, direction, range and chance level:
settings, tables and figures read them from `METRICS`. Needs no JAX.
"""

from dapt_jax.metrics.classification import Predictions, calibration_error, classification
from dapt_jax.metrics.registry import METRICS, Metric, display_name, lookup, lower_is_better, metric
from dapt_jax.metrics.score import Score
from dapt_jax.metrics.segmentation import Segmentation, segmentation

__all__ = [
    "METRICS",
    "Metric",
    "Predictions",
    "Score",
    "Segmentation",
    "calibration_error",
    "classification",
    "display_name",
    "lookup",
    "lower_is_better",
    "metric",
    "segmentation",
]
