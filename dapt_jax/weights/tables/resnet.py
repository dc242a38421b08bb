"""Names of residual networks in torchvision (BSD-3-Clause), timm, and Keras applications (MIT)."""

from dapt_jax.models.encoder import Encoder
from dapt_jax.weights.tables.scheme import Scheme, numbers


def _torchvision_resnet(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return {"conv": "conv1", "norm": "bn1"}[part]
    stage, block = numbers(group)
    name = {"conv_skip": "downsample.0", "norm_skip": "downsample.1"}.get(part, part.replace("norm", "bn"))
    return f"layer{stage}.{block - 1}.{name}"


def _keras_resnet(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return {"conv": "conv1_conv", "norm": "conv1_bn"}[part]
    stage, block = numbers(group)
    kind = "conv" if part.startswith("conv") else "bn"
    number = 0 if part.endswith("_skip") else int(part[-1])
    return f"conv{stage + 1}_block{block}_{number}_{kind}"


def _keras_resnet_2016(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return {"conv": "conv1", "norm": "bn_conv1"}[part]
    stage, block = numbers(group)
    kind = "res" if part.startswith("conv") else "bn"
    branch = "1" if part.endswith("_skip") else "2" + "abc"[int(part[-1]) - 1]
    return f"{kind}{stage + 1}{'abcdef'[block - 1]}_branch{branch}"


def _torchvision_resnet_d(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        # `before` has two triples of convolution, norm and ReLU; the last norm is outside the sequence.
        if part == "norm":
            return "bn1"
        _, number, kind = ("", 2, part) if part == "conv" else part.split("/")
        return f"conv1.{3 * int(number) + (kind == 'norm')}"
    name = {"conv_skip": "downsample.1", "norm_skip": "downsample.2"}.get(part)
    stage, block = numbers(group)
    return f"layer{stage}.{block - 1}.{name}" if name else _torchvision_resnet(encoder, group, part)


_TORCHVISION = Scheme("torchvision", "torch", _torchvision_resnet, "fc")
_KERAS = (
    Scheme("Keras", "keras", _keras_resnet, "predictions"),
    Scheme("Keras of 2016", "keras", _keras_resnet_2016, "fc1000"),
)
SCHEMES = {
    "resnet18": (_TORCHVISION,),
    "resnet34": (_TORCHVISION,),
    "resnet50": (_TORCHVISION,),
    "resnet101": (_TORCHVISION,),
    "resnet152": (_TORCHVISION,),
    "wide_resnet50_2": (_TORCHVISION,),
    "resnext50": (_TORCHVISION,),
    "resnet50d": (Scheme("timm", "torch", _torchvision_resnet_d, "fc"),),
    "resnet50_keras": _KERAS,
    "resnet101_keras": _KERAS[:1],
    "resnet152_keras": _KERAS[:1],
}
