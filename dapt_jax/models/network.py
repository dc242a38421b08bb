"""The trained network: an encoder with a head, for classification or segmentation."""

from dapt_jax.models.classifier import Classifier
from dapt_jax.models.segmenter import Segmenter

Network = Classifier | Segmenter
"""Ordered layer groups that can be split at any boundary: `prefix` before it, `suffix` after it."""
