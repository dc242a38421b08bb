"""Registration and parameters of losses, shared by classification and segmentation."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from dapt_jax.errors import UserError, nearest
from dapt_jax.fields import SettingError


def register(losses: dict[str, type], cls: type, name: str) -> None:
    """Add a loss to its registry.

    Args:
        losses: Registry of the loss.
        cls: Class that is being defined.
        name: Name of the loss in the settings.

    Raises:
        TypeError: Another class has that name.
    """
    if name in losses and losses[name].__qualname__ != cls.__qualname__:
        raise TypeError(f"two losses are called {name!r}: {losses[name].__qualname__} and {cls.__qualname__}")
    losses[name] = cls


def own_parameters(loss: type) -> dict[str, "dataclasses.Field[Any]"]:
    """Return the parameters of a loss by name: its fields made by `fields.setting`."""
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
    """Refuse an unknown name of a loss.

    Args:
        losses: Registry to search.
        name: Name to check.
        others: Further valid names.

    Raises:
        UserError: The name is unknown; names the nearest loss.
    """
    valid = (*others, *losses)
    if name not in valid:
        raise UserError(f"unknown loss {name!r}; {nearest(name, valid)}")


def of_loss(losses: Mapping[str, type], name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that a loss has, and refuse others that differ from their default.

    Args:
        losses: Registry of the loss.
        name: Name of the loss.
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
