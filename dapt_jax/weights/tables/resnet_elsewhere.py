"""Names of residual networks in haiku (BYOL), SimCLR-v2's converter, and unnamed sequences.

BYOL's networks use TensorFlow's "SAME" padding, which at stride 2 shifts the grid by a pixel; as in the
benchmark that uses them (arXiv 2108.05930), the weights are used here in a torchvision ResNet-50.

Names after: google-deepmind/dm-haiku `nets/resnet.py` and deepmind-research `byol` (Apache-2.0),
Separius/SimCLRv2-Pytorch.
"""

import numpy as np

from dapt_jax.models.encoder import Encoder
from dapt_jax.weights.tables.scheme import Fit, Scheme, numbers


def _haiku(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return {"conv": "initial_conv", "norm": "initial_batchnorm"}[part]
    stage, block = numbers(group)
    kind = "conv" if part.startswith("conv") else "batchnorm"
    name = f"shortcut_{kind}" if part.endswith("_skip") else f"{kind}_{int(part[-1]) - 1}"
    return f"block_group_{stage - 1}/~/block_{block - 1}/~/{name}"


def _simclr2(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return {"conv": "net.0.0", "norm": "net.0.1.0"}[part]
    stage, block = numbers(group)
    parts = {"conv_skip": "projection.shortcut", "norm_skip": "projection.bn.0"}
    for number in (1, 2, 3):  # convolution and [norm, ReLU] alternate
        parts |= {f"conv{number}": f"net.{2 * number - 2}", f"norm{number}": f"net.{2 * number - 1}.0"}
    return f"net.{stage}.blocks.{block - 1}.{parts[part]}"


def _sequence(encoder: Encoder, group: str, part: str) -> str:
    # conv1, bn1, ReLU, max-pool, layer1 to layer4, as torch.nn.Sequential(*model.children()) numbers them.
    if group == "stem":
        return {"conv": "0", "norm": "1"}[part]
    stage, block = numbers(group)
    name = {"conv_skip": "downsample.0", "norm_skip": "downsample.1"}.get(part, part.replace("norm", "bn"))
    return f"{stage + 3}.{block - 1}.{name}"


_HAIKU = Scheme(
    "haiku",
    "dapt_jax",  # keys joined by slashes and kernels in (h, w, in, out), as here
    _haiku,
    "classifier",
    {"kernel": "w", "bias": "offset", "mean": "~/mean_ema/average", "var": "~/var_ema/average"},
    dict.fromkeys(
        ("scale", "bias", "mean", "var"), Fit(np.ravel, lambda array: array[None, None, None])
    ),  # haiku keeps (1, 1, 1, c)
)
_SIMCLR2 = Scheme("SimCLR-v2", "torch", _simclr2, "fc")
_SEQUENCE = Scheme("nn.Sequential of torchvision", "torch", _sequence, "fc")
SCHEMES = {
    "resnet18": (_SEQUENCE,),
    "resnet34": (_SEQUENCE,),
    "resnet50": (_HAIKU, _SIMCLR2, _SEQUENCE),
    "resnet101": (_SEQUENCE,),
    "resnet152": (_SEQUENCE,),
}
