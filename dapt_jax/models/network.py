"""What is trained: an encoder with a head behind it, whichever of the two kinds."""

from dapt_jax.models.classifier import Classifier
from dapt_jax.models.segmenter import Segmenter

Network = Classifier | Segmenter
"""Ordered groups that can be split at any boundary: `prefix` up to it, a pytree of activations at it, `suffix` from it on."""
