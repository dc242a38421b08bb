"""Names of the U-Net's contracting path in milesial/Pytorch-UNet (GPL-3.0)."""

from dapt_jax.models.encoder import Encoder
from dapt_jax.weights.tables.scheme import Scheme


def _pytorch_unet(encoder: Encoder, group: str, part: str) -> str:
    number, (layer, kind) = encoder.index(group), part.split("/")
    stage = f"down{number}.maxpool_conv.1" if number else "inc"
    return f"{stage}.double_conv.{3 * (int(layer[-1]) - 1) + (kind == 'norm')}"


SCHEMES = {"unet": (Scheme("Pytorch-UNet", "torch", _pytorch_unet, "outc"),)}
