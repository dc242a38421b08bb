"""Names of EfficientNets in EfficientNet-PyTorch (and its Lite fork) and in timm, both Apache-2.0."""

from dapt_jax.models.encoder import Encoder
from dapt_jax.weights.tables.scheme import Scheme, numbers


def _lukemelas(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return {"conv": "_conv_stem", "norm": "_bn0"}[part]
    if group == "top":
        return {"conv": "_conv_head", "norm": "_bn1"}[part]
    parts = {
        "expand": "_expand_conv",
        "norm_expand": "_bn0",
        "depthwise": "_depthwise_conv",
        "norm_depthwise": "_bn1",
        "project": "_project_conv",
        "norm_project": "_bn2",
    }
    return f"_blocks.{encoder.index(group) - 1}.{parts[part]}"


def _timm_efficientnet(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return {"conv": "conv_stem", "norm": "bn1"}[part]
    if group == "top":
        return {"conv": "conv_head", "norm": "bn2"}[part]
    stage, block = numbers(group)
    # The blocks of the first stage have no expansion, and number their layers from the depthwise convolution on.
    if stage == 1:
        parts = {"depthwise": "conv_dw", "norm_depthwise": "bn1", "project": "conv_pw", "norm_project": "bn2"}
    else:
        parts = {"expand": "conv_pw", "norm_expand": "bn1", "depthwise": "conv_dw", "norm_depthwise": "bn2"}
        parts |= {"project": "conv_pwl", "norm_project": "bn3"}
    return f"blocks.{stage - 1}.{block - 1}.{parts[part]}"


SCHEMES = {
    "efficientnet_lite0": (
        Scheme("EfficientNet-PyTorch", "torch", _lukemelas, "_fc"),
        Scheme("timm", "torch", _timm_efficientnet, "classifier"),
    ),
}
