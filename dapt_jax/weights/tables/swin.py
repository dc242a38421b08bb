"""Names of Swin transformers in torchvision (BSD-3-Clause), timm (Apache-2.0) and the authors' code (MIT)."""

from dapt_jax.models.encoder import Encoder
from dapt_jax.weights.tables.scheme import Fit, Scheme

_MERGE = {"norm": "norm", "reduce": "reduction"}


def _place(group: str) -> tuple[int, int]:
    """Return (stage, block) from 0 for `stage2/block5`; the block of `stage2/merge` is -1."""
    stage, block = group.split("/")
    return int(stage[-1]) - 1, -1 if block == "merge" else int(block.removeprefix("block")) - 1


def _torchvision(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return {"conv": "features.0.0", "norm": "features.0.2"}[part]
    if group == "top":
        return "norm"
    stage, block = _place(group)
    if block < 0:
        return f"features.{2 * stage}.{_MERGE[part]}"
    parts = {"": "attn", "mlp/expand": "mlp.0", "mlp/project": "mlp.3"}
    return f"features.{2 * stage + 1}.{block}.{parts.get(part) or _attention(part)}"


def _attention(part: str) -> str:
    return {"attention/qkv": "attn.qkv", "attention/project": "attn.proj"}.get(part, part)


def _blocks(group: str, part: str, merge: int) -> str:
    """Return names in timm and in the authors' code, which assign a merge to different stages."""
    if group == "stem":
        return {"conv": "patch_embed.proj", "norm": "patch_embed.norm"}[part]
    if group == "top":
        return "norm"
    stage, block = _place(group)
    if block < 0:
        return f"layers.{stage + merge}.downsample.{_MERGE[part]}"
    parts = {"": "attn", "mlp/expand": "mlp.fc1", "mlp/project": "mlp.fc2"}
    return f"layers.{stage}.blocks.{block}.{parts.get(part) or _attention(part)}"


def _timm(encoder: Encoder, group: str, part: str) -> str:
    return _blocks(group, part, 0)


def _authors(encoder: Encoder, group: str, part: str) -> str:
    return _blocks(group, part, -1)


_LEAVES = {"relative_bias": "relative_position_bias_table"}
# Unlike all their other matrices, this table is (positions, heads) in every library.
_FITS = {"relative_bias": Fit(lambda table: table, lambda table: table)}
_SCHEMES = (
    Scheme("torchvision", "torch", _torchvision, "head", _LEAVES, _FITS),
    Scheme("timm", "torch", _timm, "head.fc", _LEAVES, _FITS),
    Scheme("microsoft/Swin-Transformer", "torch", _authors, "head", _LEAVES, _FITS),
)
SCHEMES = dict.fromkeys(("swin_tiny", "swin_small", "swin_base"), _SCHEMES)
