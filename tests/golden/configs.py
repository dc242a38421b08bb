"""Every shipped config resolved to text, a setting a line: a default that changes shows in review."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.golden import FOLDER, interface, renamed

CHOICES = {
    "hidy2024": ("acdc,resnet50,simple", "covid_qu,swin,advanced", "own,unet"),
    "medmnist": ("pneumoniamnist,28", "chestmnist,224"),
    "mehmood2022": ("full", "l1sb_pft", "f2b"),
    "taher2021": ("shenzhen,random", "chestxray14,table", "montgomery,imagenet", "chexpert,imagenet->chestxray14"),
}
"""Of the configs that take a choice, one or two of each kind."""
DEFAULT = "default"
PLACE = FOLDER / "configs"


def names() -> list[str]:
    """Return `NAME` or `NAME:CHOICE` of all configs that are held, and `DEFAULT`."""
    shipped = sorted(path.stem for path in (FOLDER.parents[1] / "configs").glob("*.py"))
    chosen = [f"{name}:{choice}" for name in shipped for choice in CHOICES.get(name, ())]
    return [DEFAULT, *(name for name in shipped if name not in CHOICES), *chosen]


def path(name: str) -> Path:
    """Return the golden file of a config."""
    return PLACE / f"{name.replace(':', '-').replace(',', '-').replace('->', '-')}.txt"


def resolved(name: str) -> dict[str, str]:
    """Return the settings of a config as text, by name."""
    file, colon, choice = name.partition(":")
    return render(interface.flat("" if name == DEFAULT else f"configs/{file}.py{colon}{choice}"))


def render(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as text, by name; what is nested in them is settings of its own, and lists are as good as tuples.

    >>> render({"a.b": 1e-3, "mine": ({"epochs": 2}, {"epochs": 3}), "seeds": [0, 1]})
    {'a.b': '0.001', 'mine[0].epochs': '2', 'mine[1].epochs': '3', 'seeds': '(0, 1)'}
    """
    return dict(sorted(_leaves(settings, "")))


def _leaves(value: Any, name: str) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and (value or not name):
        for key, each in value.items():
            yield from _leaves(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
        for number, each in enumerate(value):
            yield from _leaves(each, f"{name}[{number}]")
    else:
        yield name, repr(tuple(value) if isinstance(value, list) else value)


def golden(name: str) -> dict[str, str]:
    """Read the golden settings of a config, under the names that they have now."""
    lines = (line.partition(" = ") for line in path(name).read_text().splitlines())
    found = {renamed.setting(setting): value for setting, _, value in lines}
    return {setting: value for setting, value in found.items() if setting is not None}


def write(name: str, settings: Mapping[str, str]) -> None:
    """Write the golden settings of a config."""
    PLACE.mkdir(exist_ok=True)
    path(name).write_text("".join(f"{setting} = {value}\n" for setting, value in settings.items()))
