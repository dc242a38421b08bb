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
        "gate_reduce": "_se_reduce",
        "gate_expand": "_se_expand",
    }
    return f"_blocks.{encoder.index(group) - 1}.{parts[part]}"


def _timm_efficientnet(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return {"conv": "conv_stem", "norm": "bn1"}[part]
    if group == "top":
        return {"conv": "conv_head", "norm": "bn2"}[part]
    stage, block = numbers(group)
    # The blocks of the first stage have no expansion, and number their layers from the depthwise convolution.
    if stage == 1:
        parts = {"depthwise": "conv_dw", "norm_depthwise": "bn1", "project": "conv_pw", "norm_project": "bn2"}
    else:
        parts = {"expand": "conv_pw", "norm_expand": "bn1", "depthwise": "conv_dw", "norm_depthwise": "bn2"}
        parts |= {"project": "conv_pwl", "norm_project": "bn3"}
    parts |= {"gate_reduce": "se.conv_reduce", "gate_expand": "se.conv_expand"}
    return f"blocks.{stage - 1}.{block - 1}.{parts[part]}"


def _torchvision(encoder: Encoder, group: str, part: str) -> str:
    if group in ("stem", "top"):
        return f"features.{0 if group == 'stem' else 8}.{int(part == 'norm')}"
    stage, block = numbers(group)
    # The blocks of the first stage have no expansion, and number their layers from the depthwise convolution.
    first = int(stage > 1)
    parts = {
        "expand": "0.0",
        "norm_expand": "0.1",
        "depthwise": f"{first}.0",
        "norm_depthwise": f"{first}.1",
        "gate_reduce": f"{first + 1}.fc1",
        "gate_expand": f"{first + 1}.fc2",
        "project": f"{first + 2}.0",
        "norm_project": f"{first + 2}.1",
    }
    return f"features.{stage}.{block - 1}.block.{parts[part]}"


def _keras(encoder: Encoder, group: str, part: str) -> str:
    if group in ("stem", "top"):
        return f"{group}_{ {'conv': 'conv', 'norm': 'bn'}[part] }"
    stage, block = numbers(group)
    parts = {
        "expand": "expand_conv",
        "norm_expand": "expand_bn",
        "depthwise": "dwconv",
        "norm_depthwise": "bn",
        "gate_reduce": "se_reduce",
        "gate_expand": "se_expand",
        "project": "project_conv",
        "norm_project": "project_bn",
    }
    return f"block{stage}{'abcdefgh'[block - 1]}_{parts[part]}"


_LUKEMELAS = Scheme("EfficientNet-PyTorch", "torch", _lukemelas, "_fc")
_TIMM = Scheme("timm", "torch", _timm_efficientnet, "classifier")
SCHEMES = {
    "efficientnet_lite0": (_LUKEMELAS, _TIMM),
    "efficientnet_lite1": (_LUKEMELAS, _TIMM),
    "efficientnet_b0": (Scheme("torchvision", "torch", _torchvision, "classifier.1"), _TIMM),
    "efficientnet_b0_keras": (
        Scheme("Keras", "keras", _keras, "predictions"),
        Scheme("Keras 2", "keras", _keras, "predictions", {"depthwise": "depthwise_kernel"}),
        _LUKEMELAS,
        _TIMM,
    ),
}
