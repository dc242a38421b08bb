"""What losses of classes and of masks have in common: how they are registered, and how their parameters are read."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from dapt_jax.errors import UserError, nearest
from dapt_jax.fields import SettingError


def register(losses: dict[str, type], cls: type, name: str) -> None:
    """Enter a loss into its registry.

    Args:
        losses: The registry.
        cls: The class that is being defined.
        name: Its name in the settings.

    Raises:
        TypeError: Another class has that name.
    """
    if name in losses and losses[name].__qualname__ != cls.__qualname__:
        raise TypeError(f"two losses are called {name!r}: {losses[name].__qualname__} and {cls.__qualname__}")
    losses[name] = cls


def own_parameters(loss: type) -> dict[str, "dataclasses.Field[Any]"]:
    """Return the parameters of a loss by name: its fields made by `fields.setting`, which alone have metadata."""
    return {field.name: field for field in dataclasses.fields(loss) if field.metadata}


def parameters(losses: Mapping[str, type]) -> dict[str, "dataclasses.Field[Any]"]:
    """Return the parameters of all losses of a registry, by name: the settings of a section `loss`.

    Args:
        losses: `LOSSES` or `SEGMENTATION_LOSSES`.

    Raises:
        TypeError: Two losses declare a parameter of the same name with different defaults or ranges.
    """
    found: dict[str, dataclasses.Field[Any]] = {}
    for loss in losses.values():
        for name, field in own_parameters(loss).items():
            known = found.setdefault(name, field)
            if (known.default, known.metadata) != (field.default, field.metadata):
                raise TypeError(
                    f"{loss.__qualname__} declares {name!r} otherwise than another loss; rename it"
                )
    return found


def check_name(losses: Mapping[str, type], name: str, others: Iterable[str] = ()) -> None:
    """Refuse a name that no loss has.

    Args:
        losses: The registry.
        name: The name.
        others: Names that are valid beside those of the registry.

    Raises:
        UserError: Names the nearest loss.
    """
    valid = (*others, *losses)
    if name not in valid:
        raise UserError(f"unknown loss {name!r}; {nearest(name, valid)}")


def of_loss(losses: Mapping[str, type], name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some parameters that a loss has, and refuse the others where they say something.

    Args:
        losses: The registry.
        name: A loss in it.
        params: Values of parameters of any of its losses.

    Raises:
        UserError: A parameter is unknown, outside its range, or changed from its default although the loss
            lacks it.
    """
    known, own = parameters(losses), own_parameters(losses[name])
    for key, value in params.items():
        if key not in known:
            raise UserError(f"unknown parameter {key!r} of a loss; {nearest(key, known)}")
        if key not in own and value != known[key].default:
            owners = [each for each, loss in losses.items() if key in own_parameters(loss)]
            expected = f"{known[key].default!r}, since loss {name!r} has no {key}; {owners[0]!r} has"
            raise SettingError(key, value, expected)
    return {key: value for key, value in params.items() if key in own}
