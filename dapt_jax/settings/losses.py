"""The sections `loss`: a name, and the parameters of all losses of a registry."""

import dataclasses
from typing import Any

from dapt_jax.fields import SettingError, check_fields, default_of, setting, settings_of

_SMOOTHING = setting(0.0, at_least=0, below=1, doc="Share of the target that is spread evenly over the classes.")
_CLASSIFICATION: dict[str, dict[str, Any]] = {
    "ce": {"label_smoothing": _SMOOTHING},
    "bce": {"label_smoothing": _SMOOTHING},
    "focal": {
        "label_smoothing": _SMOOTHING,
        "gamma": setting(2.0, at_least=0, doc="Power by which examples that are classified well count less."),
        "alpha": setting(
            0.0, at_least=0, below=1, doc="Share of the weight that positive targets of sigmoids have; 0: all alike."
        ),
    },
    "asymmetric": {
        "label_smoothing": _SMOOTHING,
        "gamma_positive": setting(0.0, at_least=0, doc="Power for positive targets."),
        "gamma_negative": setting(4.0, at_least=0, doc="Power for negative targets."),
        "margin": setting(
            0.05, at_least=0, below=1, doc="By how much the probability of negative targets is lowered, at least to 0."
        ),
    },
    "ordinal": {"label_smoothing": _SMOOTHING},
}
_OVERLAP = {
    "batchwise": setting(False, doc="Whether the pixels of a batch are taken together, not image by image."),
    "smoothing_constant": setting(1.0, above=0, doc="Added to twice the overlap, above and below."),
}
_SEGMENTATION: dict[str, dict[str, Any]] = {"dice": _OVERLAP, "ce": {}, "dice_ce": _OVERLAP, "tversky": _OVERLAP}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """A loss by its name, and the parameters of all losses of a registry, one field each.

    A parameter that is changed from its default has to be one of the chosen loss.
    """

    name: str

    def __post_init__(self) -> None:
        check_fields(self)
        own = self.own_parameters()
        for name, field in settings_of(type(self)).items():
            value, default = getattr(self, name), default_of(field)
            if name != "name" and name not in own and value != default:
                expected = f"{default!r}, since the loss {self.name!r} has no {name}"
                raise SettingError(name, value, expected)

    def own_parameters(self) -> set[str]:
        """Return the names of the parameters that the loss has."""
        raise NotImplementedError

    def values(self) -> dict[str, Any]:
        """Return the parameters of the loss by name."""
        return {name: getattr(self, name) for name in sorted(self.own_parameters())}


def _section(losses: dict[str, dict[str, Any]], default: str, auto: tuple[str, ...], doc: str) -> type[LossSettings]:
    """Return the settings class of a registry.

    Args:
        losses: Parameters by name, as fields, of each loss by name.
        default: Name of the default loss; "auto" stands for one of `auto`.
        auto: Losses that "auto" chooses among.
        doc: Help text of the name.
    """

    def own_parameters(self: LossSettings) -> set[str]:
        return {name for loss in (auto if self.name == "auto" else (self.name,)) for name in losses[loss]}

    choices = (*(("auto",) if auto else ()), *losses)
    fields = {"name": setting(default, choices=choices, doc=doc)}
    for parameters in losses.values():
        for name, field in parameters.items():
            fields.setdefault(name, dataclasses.field(default=field.default, metadata=field.metadata))
    return dataclasses.make_dataclass(
        "LossSettings",
        [(name, type(field.default), field) for name, field in fields.items()],
        bases=(LossSettings,),
        namespace={"own_parameters": own_parameters},
        frozen=True,
        kw_only=True,
    )


ClassificationLossSettings = _section(
    _CLASSIFICATION, "auto", ("ce", "bce"), "Loss; auto: ce, or bce where an image may have several labels."
)
SegmentationLossSettings = _section(_SEGMENTATION, "dice_ce", (), "Loss.")
