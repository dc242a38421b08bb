"""Losses: what a run minimises, per example, and what logits say."""

from dapt_jax.losses.classification import Objective
from dapt_jax.losses.segmentation import MaskObjective

AnyObjective = Objective | MaskObjective

__all__ = ["AnyObjective", "MaskObjective", "Objective"]
