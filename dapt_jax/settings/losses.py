"""The sections `loss`: a name, and the declared parameters of all losses of a registry."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from dapt_jax.fields import SettingError, check_fields, default_of, setting, settings_of
from dapt_jax.losses import AUTO, LOSSES, SEGMENTATION_LOSSES, parameters
from dapt_jax.losses.registry import own_parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Name of a loss, and one field for each parameter of the losses of a registry.

    Only parameters of the chosen loss may differ from their defaults.
    """

    name: str

    def __post_init__(self) -> None:
        check_fields(self)
        own = self.values()
        for name, field in settings_of(type(self)).items():
            value, default = getattr(self, name), default_of(field)
            if name != "name" and name not in own and value != default:
                expected = f"{default!r}, since the loss {self.name!r} has no {name}"
                raise SettingError(name, value, expected)

    def registry(self) -> Mapping[str, type]:
        """Return the registry to which the name belongs."""
        raise NotImplementedError

    def values(self) -> dict[str, Any]:
        """Return the parameters of the loss by name; those of cross-entropy for "auto"."""
        loss = self.registry()["ce" if self.name == AUTO else self.name]
        return {name: getattr(self, name) for name in sorted(own_parameters(loss))}


def classification_loss() -> LossSettings:
    """Return the default settings of a loss of classes, with the parameters of all registered losses."""
    return _settings_class("classification", tuple(LOSSES))()


def segmentation_loss() -> LossSettings:
    """Return the default settings of a loss of masks, with the parameters of all registered losses."""
    return _settings_class("segmentation", tuple(SEGMENTATION_LOSSES))()


@functools.cache
def _settings_class(kind: str, names: tuple[str, ...]) -> Any:
    """Return the settings class of a registry with losses of these names."""
    is_classification = kind == "classification"
    registry: Mapping[str, type] = LOSSES if is_classification else SEGMENTATION_LOSSES
    choices = (AUTO, *names) if is_classification else names
    doc = "Loss; auto: ce, or bce where an image may have several labels." if is_classification else "Loss."
    fields = {"name": setting(AUTO if is_classification else "dice_ce", choices=choices, doc=doc)}
    for name, field in parameters(registry).items():
        fields[name] = dataclasses.field(default=field.default, metadata=field.metadata)
    return dataclasses.make_dataclass(
        "LossSettings",
        [(name, type(field.default), field) for name, field in fields.items()],
        bases=(LossSettings,),
        namespace={"registry": lambda self: registry},
        frozen=True,
        kw_only=True,
    )
