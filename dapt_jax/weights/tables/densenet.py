"""Names of DenseNets in torchvision (BSD-3-Clause; timm's are the same) and in Keras applications (MIT)."""

from dapt_jax.models.encoder import Encoder
from dapt_jax.weights.tables.scheme import Scheme


def _place(group: str) -> tuple[int, int]:
    """Return (stage, layer) for `stage2/layer5`; layer 0 is the transition."""
    stage, layer = group.split("/")
    return int(stage[-1]), 0 if layer == "transition" else int(layer.removeprefix("layer"))


def _torchvision(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return f"features.{part}0"
    if group == "top":
        return "features.norm5"
    stage, layer = _place(group)
    return (
        f"features.denseblock{stage}.denselayer{layer}.{part}"
        if layer
        else f"features.transition{stage}.{part}"
    )


def _torchvision_2017(encoder: Encoder, group: str, part: str) -> str:
    """Return names in torchvision's files, which still follow PyTorch 0.2: `norm.1` for `norm1`."""
    name = _torchvision(encoder, group, part)
    return f"{name[:-1]}.{name[-1]}" if "denselayer" in name else name


def _sequence(encoder: Encoder, group: str, part: str) -> str:
    """Return names below `features`, under any name: RadImageNet's files have `backbone.0.conv0`."""
    return _torchvision(encoder, group, part).removeprefix("features.")


def _keras(encoder: Encoder, group: str, part: str) -> str:
    kind = {"conv": "conv", "norm": "bn"}[part.rstrip("12")]
    if group == "stem":
        return f"conv1_{kind}"
    if group == "top":
        return "bn"
    stage, layer = _place(group)
    if not layer:
        return f"pool{stage + 1}_{kind}"
    return f"conv{stage + 1}_block{layer}_{int(part[-1]) - (kind == 'bn')}_{kind}"


_TORCH = (
    Scheme("torchvision", "torch", _torchvision, "classifier"),
    Scheme("torchvision of 2017", "torch", _torchvision_2017, "classifier"),
    Scheme("features of torchvision", "torch", _sequence, "classifier"),
)
_KERAS = (Scheme("Keras", "keras", _keras, "predictions"),)
SCHEMES = {
    "densenet121": _TORCH,
    "densenet169": _TORCH,
    "densenet121_keras": _KERAS,
    "densenet169_keras": _KERAS,
}
