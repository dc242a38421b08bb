"""What adaptation minimises: a loss of labels (`dapt_jax.losses`), or a label-free objective."""

from dapt_jax.objectives.base import Objective
from dapt_jax.objectives.dino import Dino, DinoSettings
from dapt_jax.objectives.distil import Distil, DistilSettings
from dapt_jax.objectives.mae import MaeSettings, MaskedAutoencoder
from dapt_jax.objectives.reconstruct import Reconstruct, ReconstructSettings
from dapt_jax.objectives.two_views import TwoViews, TwoViewsSettings

SUPERVISED = "supervised"
LABEL_FREE = (Reconstruct.name, Distil.name, TwoViews.name, MaskedAutoencoder.name, Dino.name)
"""Names of the objectives that need no labels."""
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
    "TwoViews",
    "TwoViewsSettings",
]
