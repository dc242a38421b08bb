"""What the models' parameters are called elsewhere.

A *scheme* names the parameters of one family of files. It maps a module of ours (`stage1/block1/conv1`) to the name of
its counterpart; the endings (`kernel` to `weight`) and layouts follow from the framework. Tables are therefore computed
from an encoder's own parameter paths and cannot miss one.

Names after: lukemelas/EfficientNet-PyTorch and its Lite fork, huggingface/pytorch-image-models (both Apache-2.0),
pytorch/vision (BSD-3-Clause), keras-team/keras-applications (MIT).
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import Encoder
from dapt_jax.weights.paths import flatten

Framework = Literal["torch", "keras", "dapt_jax"]
_ENDINGS: dict[Framework, dict[str, str]] = {
    "torch": {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"},
    "keras": {"kernel": "kernel", "scale": "gamma", "bias": "bias", "mean": "moving_mean", "var": "moving_variance"},
    "dapt_jax": {ending: ending for ending in ("kernel", "scale", "bias", "mean", "var")},
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The names of one family of weight files.

    Attributes:
        name: as reports call it.
        framework: decides endings, separators and layouts.
        module: (encoder, group, module within the group) to the module's name there; None for the ones without.
        head: name of the dense layer there.
    """

    name: str
    framework: Framework
    module: Callable[[Encoder, str, str], str]
    head: str

    @property
    def separator(self) -> str:
        """What stands between the parts of a key."""
        return "." if self.framework == "torch" else "/"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one of our arrays comes from.

    Attributes:
        key: its name there, without any prefix.
        framework: decides the layout.
    """

    key: str
    framework: Framework

    def convert(self, array: np.ndarray) -> np.ndarray:
        """The array in our layout: (h, w, in, out) and (in, out); torch has the outputs first."""
        if self.framework != "torch":
            return array
        if array.ndim == 4:
            return array.transpose(2, 3, 1, 0)
        return array.T if array.ndim == 2 else array


def table(scheme: Scheme, classifier: Classifier) -> dict[str, Entry]:
    """Our path to its source, for every parameter and statistic of a classifier, head included."""
    params, stats = classifier.abstract()
    return {path: _entry(scheme, classifier.encoder, path) for path in flatten(params) | flatten(stats)}


def _entry(scheme: Scheme, encoder: Encoder, path: str) -> Entry:
    module, _, leaf = path.rpartition("/")
    ending = _ENDINGS[scheme.framework][leaf]
    if module == HEAD:
        name = scheme.head
    else:
        group, _, part = module.rpartition("/")
        name = scheme.module(encoder, group, part)
        if scheme.framework == "keras" and part.startswith("norm") and leaf == "bias":
            ending = "beta"
    return Entry(f"{name}{scheme.separator}{ending}", scheme.framework)


def _numbers(group: str) -> tuple[int, int]:
    """(3, 2) of `stage3/block2`."""
    stage, block = re.findall(r"\d+", group)
    return int(stage), int(block)


def _own(encoder: Encoder, group: str, part: str) -> str:
    return f"{group}/{part}"


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
    stage, block = _numbers(group)
    # The blocks of the first stage have no expansion, and number their layers from the depthwise convolution on.
    if stage == 1:
        parts = {"depthwise": "conv_dw", "norm_depthwise": "bn1", "project": "conv_pw", "norm_project": "bn2"}
    else:
        parts = {"expand": "conv_pw", "norm_expand": "bn1", "depthwise": "conv_dw", "norm_depthwise": "bn2"}
        parts |= {"project": "conv_pwl", "norm_project": "bn3"}
    return f"blocks.{stage - 1}.{block - 1}.{parts[part]}"


def _torchvision_resnet(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return {"conv": "conv1", "norm": "bn1"}[part]
    stage, block = _numbers(group)
    name = {"conv_skip": "downsample.0", "norm_skip": "downsample.1"}.get(part, part.replace("norm", "bn"))
    return f"layer{stage}.{block - 1}.{name}"


def _keras_resnet(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return {"conv": "conv1_conv", "norm": "conv1_bn"}[part]
    stage, block = _numbers(group)
    kind = "conv" if part.startswith("conv") else "bn"
    number = 0 if part.endswith("_skip") else int(part[-1])
    return f"conv{stage + 1}_block{block}_{number}_{kind}"


def _keras_resnet_2016(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return {"conv": "conv1", "norm": "bn_conv1"}[part]
    stage, block = _numbers(group)
    kind = "res" if part.startswith("conv") else "bn"
    branch = "1" if part.endswith("_skip") else "2" + "abc"[int(part[-1]) - 1]
    return f"{kind}{stage + 1}{'abcdef'[block - 1]}_branch{branch}"


OWN = Scheme("dapt_jax", "dapt_jax", _own, HEAD)
_TORCHVISION = Scheme("torchvision", "torch", _torchvision_resnet, "fc")
_SCHEMES = {
    "efficientnet_lite0": (
        Scheme("EfficientNet-PyTorch", "torch", _lukemelas, "_fc"),
        Scheme("timm", "torch", _timm_efficientnet, "classifier"),
    ),
    "resnet18": (_TORCHVISION,),
    "resnet34": (_TORCHVISION,),
    "resnet50": (_TORCHVISION,),
    "resnet50_keras": (
        Scheme("Keras", "keras", _keras_resnet, "predictions"),
        Scheme("Keras of 2016", "keras", _keras_resnet_2016, "fc1000"),
    ),
}


def schemes(model: str) -> tuple[Scheme, ...]:
    """The schemes whose files fit a model of the registry; our own comes first."""
    return (OWN, *_SCHEMES.get(model, ()))


def prefix(entries: dict[str, Entry], scheme: Scheme, source: dict[str, Any]) -> tuple[str, int]:
    """What stands before every key of a table in a file, and how many of the table's keys are found behind it.

    Training scripts wrap models (`module.`, `backbone.`, `module.encoder_q.`). Any prefix is tried that makes some key of
    the file the table's first; the one with most keys wins. Where several hold as many, a student or query encoder is
    preferred to its averaged copy, as the copy's own names come later in `_PREFERRED`.
    """
    keys = [entry.key for entry in entries.values()]
    marker = min(keys, key=lambda key: (len(key), key)) if keys else ""
    candidates = {""}
    candidates |= {key.removesuffix(marker) for key in source if key.endswith(scheme.separator + marker)}
    hits = {candidate: sum(candidate + key in source for key in keys) for candidate in candidates}
    best = max(hits, key=lambda name: (hits[name], -_rank(name), -len(name)))
    return best, hits[best]


_PREFERRED = ("", "module.", "module.encoder_q.", "encoder_q.", "student.", "backbone.", "model.", "encoder.")


def _rank(name: str) -> int:
    return _PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED)
