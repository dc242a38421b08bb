"""What adaptation minimises: a loss of labels (`dapt_jax.losses`), or a label-free objective.

A label-free objective is a class in a file of this folder, an entry of `LABEL_FREE` and, where it has options,
a section of `dapt_jax.settings.training.AdaptSettings` with its name.
"""

from dapt_jax.objectives.base import Objective, SelfDistillation
from dapt_jax.objectives.dino import Dino, DinoSettings
from dapt_jax.objectives.distil import Distil, DistilSettings
from dapt_jax.objectives.mae import MaeSettings, MaskedAutoencoder
from dapt_jax.objectives.reconstruct import Reconstruct, ReconstructSettings
from dapt_jax.objectives.two_views import TwoViews, TwoViewsSettings

SUPERVISED = "supervised"
LABEL_FREE: dict[str, type[Objective]] = {
    objective.name: objective for objective in (Reconstruct, Distil, TwoViews, MaskedAutoencoder, Dino)
}
"""Objectives that need no labels by their names in the settings, the least risky first."""
OBJECTIVES = (SUPERVISED, *LABEL_FREE)

__all__ = [
    "LABEL_FREE",
    "OBJECTIVES",
    "SUPERVISED",
    "Dino",
    "DinoSettings",
    "Distil",
    "DistilSettings",
    "MaeSettings",
    "MaskedAutoencoder",
    "Objective",
    "Reconstruct",
    "ReconstructSettings",
    "SelfDistillation",
    "TwoViews",
    "TwoViewsSettings",
]
