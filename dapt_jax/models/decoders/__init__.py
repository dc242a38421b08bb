"""Decoders for segmentation: each is a function from an encoder to the steps that follow it."""

from collections.abc import Callable

from dapt_jax.models.decoders import hidy2024
from dapt_jax.models.decoders.head import Head
from dapt_jax.models.decoders.step import Decoder, Part, Step
from dapt_jax.models.decoders.swin_unet import swin_unet
from dapt_jax.models.decoders.unet import attention_unet, unet
from dapt_jax.models.decoders.upernet import upernet
from dapt_jax.models.encoder import Encoder

__all__ = ["BUILDERS", "Decoder", "Head", "Part", "Step"]

BUILDERS: dict[str, Callable[[Encoder], Decoder]] = {
    "unet": unet,
    "attention_unet": attention_unet,
    "swin_unet": swin_unet,
    "upernet": upernet,
    "unet_hidy2024": hidy2024.unet,
    "attention_unet_hidy2024": hidy2024.attention_unet,
    "swin_unet_hidy2024": hidy2024.swin_unet,
}
