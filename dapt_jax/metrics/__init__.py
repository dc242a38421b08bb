"""Scores of predictions; undefined ones are NaN, and which classes and how many examples they cover is said."""

from dapt_jax.metrics.classification import calibration_error, classification
from dapt_jax.metrics.score import Score
from dapt_jax.metrics.segmentation import Segmentation, segmentation

__all__ = ["Score", "Segmentation", "calibration_error", "classification", "segmentation"]
