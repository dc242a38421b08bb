"""Names of the encoders released with arXiv 2410.18677 (aielte-research/MedSegPretrainImageNet).

Its pre-trained classifiers hold the encoder behind `layers.0.`, its segmentation networks behind `encoder.`.
"""

from dapt_jax.models.encoder import Encoder
from dapt_jax.weights.tables.scheme import Fit, Scheme, numbers

_HEAD = "layers.3"
_BLOCK = {"attention/qkv": "attn.qkv", "attention/project": "attn.proj", "": "attn"}
_BLOCK |= {"mlp/expand": "mlp.fc1", "mlp/project": "mlp.fc2"}


def _resnet(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return {"conv": "stem.0", "norm": "stem.1"}[part]
    stage, block = numbers(group)
    return f"levels.{stage - 1}.{block - 1}.{part.replace('norm', 'bn')}"


def _unet(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return "first_block"
    number = int(group.removeprefix("stage"))
    level = "bottom_block" if number == 5 else f"down_layers.{number - 1}"
    place = {"conv1": 0, "norm1": 1, "conv2": 3, "norm2": 4}[part]
    return f"{level}.conv0.block.{place}"


def _swin(encoder: Encoder, group: str, part: str) -> str:
    if group == "stem":
        return {"conv": "first_block.proj", "norm": "first_block.norm_layer"}[part]
    name, _, within = group.partition("/")
    stage = int(name.removeprefix("stage"))
    if within == "merge":  # there, the stage before holds it
        return f"down_layers.{stage - 2}.downsampl.{'reduction' if part == 'reduce' else part}"
    level = "bottom_block" if stage == 4 else f"down_layers.{stage - 1}"
    return f"{level}.conv{int(within.removeprefix('block')) - 1}.{_BLOCK.get(part, part)}"


_NAME = "MedSegPretrainImageNet"
# Unlike all other matrices, this table is (positions, heads) there, too.
_TABLE = {"relative_bias": Fit(lambda table: table, lambda table: table)}
SCHEMES = {
    "resnet50_hidy2024": (Scheme(_NAME, "torch", _resnet, _HEAD),),
    "unet_hidy2024": (Scheme(_NAME, "torch", _unet, _HEAD),),
    "swin_hidy2024": (
        Scheme(_NAME, "torch", _swin, _HEAD, {"relative_bias": "relative_position_bias_table"}, _TABLE),
    ),
}
