"""Names of ConvNeXts in torchvision (BSD-3-Clause), timm (Apache-2.0) and the authors' code (MIT)."""

import numpy as np

from dapt_jax.models.encoder import Encoder
from dapt_jax.weights.tables.scheme import Fit, Scheme

_LAYERS = {"conv": 1, "norm": 0}


def _place(group: str) -> tuple[int, int]:
    """Return (stage, block) from 0 for `stage2/block5`; the block of `stage2/downsample` is -1."""
    stage, block = group.split("/")
    return int(stage[-1]) - 1, -1 if block == "downsample" else int(block.removeprefix("block")) - 1


def _torchvision(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return f"features.0.{1 - _LAYERS[part]}"
    if group == "top":
        return "classifier.0"
    stage, block = _place(group)
    if block < 0:
        return f"features.{2 * stage}.{_LAYERS[part]}"
    layers = {
        "depthwise": ".block.0",
        "norm": ".block.2",
        "expand": ".block.3",
        "project": ".block.5",
        "": "",
    }
    return f"features.{2 * stage + 1}.{block}{layers[part]}"


def _timm(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return f"stem.{1 - _LAYERS[part]}"
    if group == "top":
        return "head.norm"
    stage, block = _place(group)
    if block < 0:
        return f"stages.{stage}.downsample.{_LAYERS[part]}"
    layers = {"depthwise": ".conv_dw", "norm": ".norm", "expand": ".mlp.fc1", "project": ".mlp.fc2", "": ""}
    return f"stages.{stage}.blocks.{block}{layers[part]}"


def _authors(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return f"downsample_layers.0.{1 - _LAYERS[part]}"
    if group == "top":
        return "norm"
    stage, block = _place(group)
    if block < 0:
        return f"downsample_layers.{stage}.{_LAYERS[part]}"
    layers = {"depthwise": ".dwconv", "norm": ".norm", "expand": ".pwconv1", "project": ".pwconv2", "": ""}
    return f"stages.{stage}.{block}{layers[part]}"


_TORCHVISION = Scheme(
    "torchvision",
    "torch",
    _torchvision,
    "classifier.2",
    {"gamma": "layer_scale"},
    {"gamma": Fit(np.ravel, lambda gamma: gamma[:, None, None])},
)
_SCHEMES = (
    _TORCHVISION,
    Scheme("timm", "torch", _timm, "head.fc"),
    Scheme("facebookresearch/ConvNeXt", "torch", _authors, "head"),
)
SCHEMES = dict.fromkeys(("convnext_tiny", "convnext_small", "convnext_base"), _SCHEMES)
