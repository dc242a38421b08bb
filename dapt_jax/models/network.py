"""What is trained: an encoder with a head behind it, whichever of the two kinds."""

from dapt_jax.models.classifier import Classifier
from dapt_jax.models.segmenter import Segmenter

Network = Classifier | Segmenter
"""Ordered layer groups that can be split at any boundary: `prefix` up to it, `suffix` from it on."""
