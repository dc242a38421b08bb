"""Losses per example, and the conversion of logits to probabilities.

A loss is a frozen dataclass in a file of this folder. Defining it registers it, and its fields made by
`dapt_jax.fields.setting` are its parameters: nothing else has to be edited.

    >>> loss = make("focal", {"gamma": 1.0}, classes=3)
    >>> loss
    FocalLoss(outputs=3, multi_label=False, uncertain=None, label_smoothing=0.0, gamma=1.0, alpha=0.0)
    >>> make("auto", classes=2, single_logit=True).name
    'bce'
"""

import importlib
import pkgutil

from dapt_jax.losses.base import AUTO, LOSSES, ClassificationLoss, make
from dapt_jax.losses.registry import parameters
from dapt_jax.losses.segmentation import SEGMENTATION_LOSSES, SegmentationLoss, make_segmentation

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")

Loss = ClassificationLoss | SegmentationLoss

__all__ = [
    "AUTO",
    "LOSSES",
    "SEGMENTATION_LOSSES",
    "ClassificationLoss",
    "Loss",
    "SegmentationLoss",
    "make",
    "make_segmentation",
    "parameters",
]
