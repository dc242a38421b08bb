"""Names of vision transformers in timm (Apache-2.0), torchvision (BSD-3-Clause) and the authors' files.

MAE's files, and DINO's and DINOv2's without registers, have timm's names. Files with registers treat the
class token differently: DINOv2's have a position for it, timm's have already added that position to it.
"""

import numpy as np

from dapt_jax.models.encoder import Encoder
from dapt_jax.weights.tables.scheme import Fit, Scheme

_PARTS = {
    "attention/qkv": "attn.qkv",
    "attention/project": "attn.proj",
    "mlp/expand": "mlp.fc1",
    "mlp/project": "mlp.fc2",
}
_LEAVES = {"class_token": "cls_token", "position": "pos_embed"}


def _timm(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return "patch_embed.proj" if part else ""
    if group == "top":
        return "norm"
    block = f"blocks.{encoder.index(group) - 1}"
    return f"{block}.{_PARTS.get(part, part)}" if part else block


def _torchvision(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return "conv_proj" if part else ""
    if group == "top":
        return "encoder.ln"
    parts = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attention/qkv": "self_attention.in_proj",
        "attention/project": "self_attention.out_proj",
        "mlp/expand": "mlp.0",
        "mlp/project": "mlp.3",
    }
    return f"encoder.layers.encoder_layer_{encoder.index(group) - 1}.{parts[part]}"


def _with_class_row(position: np.ndarray) -> np.ndarray:
    """Return the positions of the patches with a zero row for the class token before them."""
    return np.concatenate([np.zeros_like(position[:, :1]), position], 1)


def _position_in_class_token(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return arrays whose class token has its position added, which is zero: both are summed before the first block."""
    token, position = (np.asarray(arrays[f"stem/{name}"]) for name in ("class_token", "position"))
    joined = {"stem/class_token": token + position[:, :1], "stem/position": _with_class_row(position[:, 1:])}
    return arrays | joined


_SCALES = {"gamma1": "ls1.gamma", "gamma2": "ls2.gamma"}
_TIMM = Scheme("timm", "torch", _timm, "head", _LEAVES)
_TORCHVISION = Scheme(
    "torchvision",
    "torch",
    _torchvision,
    "heads.head",
    {"position": "encoder.pos_embedding"},
    separators={"qkv": "_"},
)
_DINOV2 = Scheme("timm", "torch", _timm, "head", _LEAVES | _SCALES)
_HUGGING_FACE = {
    "attention/qkv": "attention.attention.qkv",
    "attention/project": "attention.output.dense",
    "mlp/expand": "mlp.fc1",
    "mlp/project": "mlp.fc2",
}


def _transformers(encoder: Encoder, group: str, part: str) -> str:
    """Return names of Hugging Face's `Dinov2Model`, with `query`, `key` and `value` joined."""
    if group == "stem":
        return "embeddings.patch_embeddings.projection" if part else "embeddings"
    if group == "top":
        return "layernorm"
    block = f"encoder.layer.{encoder.index(group) - 1}"
    return f"{block}.{_HUGGING_FACE.get(part, part)}" if part else block


_TRANSFORMERS = Scheme(
    "transformers",
    "torch",
    _transformers,
    "classifier",
    {
        "class_token": "cls_token",
        "position": "position_embeddings",
        "gamma1": "layer_scale1.lambda1",
        "gamma2": "layer_scale2.lambda1",
    },
)
_REGISTERS = (
    Scheme("DINOv2", "torch", _timm, "head", _LEAVES | _SCALES),
    Scheme(
        "timm",
        "torch",
        _timm,
        "head",
        _LEAVES | _SCALES | {"register_tokens": "reg_token"},
        {"position": Fit(_with_class_row, lambda position: position[:, 1:])},
        equivalent=_position_in_class_token,
    ),
)
_DINOV3 = (
    Scheme(
        "timm",
        "torch",
        _timm,
        "head",
        _LEAVES | {"gamma1": "gamma_1", "gamma2": "gamma_2", "register_tokens": "reg_token"},
    ),
    Scheme("DINOv3", "torch", _timm, "head", _LEAVES | _SCALES | {"register_tokens": "storage_tokens"}),
)
SCHEMES = {
    **{f"vit_{size}": (_TIMM, _TORCHVISION) for size in ("small", "base", "large")},
    **{f"vit_{size}_mae": (_TIMM,) for size in ("base", "large")},
    **{f"vit_{size}_dinov2": (_DINOV2, _TRANSFORMERS) for size in ("small", "base", "large")},
    **{f"vit_{size}_dinov2_registers": _REGISTERS for size in ("small", "base", "large")},
    **{f"vit_{size}_dinov3": _DINOV3 for size in ("small", "base", "large")},
}
