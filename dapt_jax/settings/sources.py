"""Sections with user-defined names: corpora, target tasks and custom strategies."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from dapt_jax.errors import UserError, nearest
from dapt_jax.fields import SettingError
from dapt_jax.objectives import OBJECTIVES
from dapt_jax.records.renamed import PHASE_RENAMED
from dapt_jax.records.vocabulary import BASELINE, SPLITS
from dapt_jax.settings.names import is_like, wanted
from dapt_jax.training.phases import Phase, check_names

VAL_FRACTION = 0.1
"""Share of a corpus that is held out for validation, unless its settings say another."""

Source = Mapping[str, Any]
"""A description of a data set: `kind`, and what its reader takes; see `data.sources.load`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """In-domain images: the section `corpus`, or one of `corpora`.

    Attributes:
        source: Description of the data set.
        val_fraction: Fraction of the images, split by patient, held out for validation.
    """

    source: Source = dataclasses.field(default_factory=lambda: {"kind": ""})
    val_fraction: float = VAL_FRACTION

    def __post_init__(self) -> None:
        fraction = self.val_fraction
        if not is_like(fraction, VAL_FRACTION) or not 0 <= fraction < 1:
            raise SettingError("val_fraction", fraction, "0 to less than 1")

    @classmethod
    def from_config(cls, values: object, where: str) -> "CorpusSettings":
        """Return the corpus of a config section."""
        source = source_from_config(values, where)
        fraction = source.pop("val_fraction", VAL_FRACTION)
        try:
            return cls(source=source, val_fraction=fraction)
        except SettingError as error:
            raise error.within(where) from error

    def to_config(self) -> dict[str, Any]:
        """Return it in the form of a config."""
        return {**self.source, "val_fraction": self.val_fraction}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """The sets of a target task.

    Attributes:
        development: Images for training heads and, fold by fold, for scoring them.
        test: Images used for scoring only; None without a test set.
        external: Images of another site, used for scoring only; None without an external set.
    """

    development: Source
    test: Source | None = None
    external: Source | None = None

    @property
    def sources(self) -> dict[str, Source]:
        """The available sets by split."""
        found = {split: getattr(self, split) for split in SPLITS}
        return {split: source for split, source in found.items() if source is not None}

    @classmethod
    def from_config(cls, values: object, where: str) -> "TaskSettings":
        """Return the task of a config section."""
        if not isinstance(values, Mapping):
            expected = "expected its sets: development, and test or external if there are"
            raise UserError(f"{where} is {values!r}; {expected}")
        for split in values:
            if split not in SPLITS:
                raise UserError(f"{where} has no split {split!r}; {nearest(split, SPLITS)}")
        if "development" not in values:
            raise UserError(f"{where} has no development images")
        name = where.partition(".")[2]
        return cls(**{split: source_from_config(values[split], f"{name} {split}: ") for split in values})

    def to_config(self) -> dict[str, Any]:
        """Return it in the form of a config."""
        return {split: dict(source) for split, source in self.sources.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrategySpec:
    """A custom strategy.

    Attributes:
        phases: Phases in order; empty where nothing is adapted.
        like: Built-in strategy whose phases and cut it copies; empty to use `phases`.
        weights: Source weights; empty for those of the study.
        corpus: Name in `corpora` of the images for adaptation; empty for the corpus of the study.
        cut_after: Last layer group that remains; empty for all.
        objective: What adaptation minimises; empty for `adapt.objective`.
    """

    phases: tuple[Phase, ...] = ()
    like: str = ""
    weights: str = ""
    corpus: str = ""
    cut_after: str = ""
    objective: str = ""

    @classmethod
    def from_config(cls, values: object, where: str) -> "StrategySpec":
        """Return the custom strategy of a config section, which may be just a list of phases."""
        values = values if isinstance(values, Mapping) else {"phases": values}
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f"{where} has no setting {key!r}; {nearest(key, known)}")
            if key != "phases" and not isinstance(values[key], str):
                raise UserError(f"{where}.{key} is {values[key]!r}; expected text")
        if (objective := values.get("objective", "")) and objective not in OBJECTIVES:
            raise UserError(f"{where}.objective is {objective!r}; {nearest(str(objective), OBJECTIVES)}")
        if like := values.get("like", ""):
            if values.get("phases") or values.get("cut_after"):
                raise UserError(
                    f"{where}: like={like!r}; expected a built-in strategy, without phases of its own"
                )
            return cls(**{**values, "phases": ()})
        listed = values.get("phases", ())
        is_of_its_own = listed or values.get("cut_after") or values.get("weights")
        if not isinstance(listed, tuple | list) or not is_of_its_own:
            raise UserError(f"{where} has no list of phases; expected one or more: ({_EXAMPLE},)")
        phases = [_phase(f"{where}.phases[{number}]", settings) for number, settings in enumerate(listed)]
        check_names(phases)
        return cls(**{**values, "phases": tuple(phases)})

    def to_config(self) -> dict[str, Any]:
        """Return it in the form of a config, without values at their defaults."""
        said = {key: value for key, value in vars(self).items() if value and key != "phases"}
        return {"phases": tuple(_said(phase) for phase in self.phases), **said}


def source_from_config(values: object, where: str) -> dict[str, Any]:
    """Return the data set of a config section.

    Args:
        values: Settings of the set.
        where: Location of the settings, for error lines.

    Raises:
        UserError: The values are not settings of a data set.
    """
    if not isinstance(values, Mapping):
        where = where if where.endswith(": ") else f"{where}: "
        raise UserError(f"{where}{values!r}; expected settings such as kind='manifest', path='manifest.csv'")
    return {str(key): tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def check_name(section: str, name: str) -> None:
    """Refuse a name that is invalid as a file name, or reserved.

    Args:
        section: Section of the name.
        name: Name of a task or a strategy.
    """
    if not re.fullmatch(r"[\w.+-]+", name) or name == BASELINE:
        raise UserError(
            f"{section} holds the name {name!r}; expected letters, digits and . _ + -, not {BASELINE!r}"
        )


_EXAMPLE: dict[str, Any] = {"name": "head", "epochs": 10, "trainable": ("head",), "lr": 1e-3}


def _phase(where: str, settings: object) -> Phase:
    """Return the phase of a config section; a single pattern needs no tuple."""
    if not isinstance(settings, Mapping):
        raise UserError(f"{where} is {settings!r}; expected settings such as {_EXAMPLE}")
    values = dict(settings)
    fields = vars(Phase(**_EXAMPLE))
    for key in values:
        if key not in fields:
            now = f"it is called {PHASE_RENAMED[key]!r} now" if key in PHASE_RENAMED else nearest(key, fields)
            raise UserError(f"{where} has no setting {key!r}; {now}")
    if missing := [key for key in _EXAMPLE if key not in values]:
        raise UserError(f"{where} lacks {', '.join(missing)}; expected settings such as {_EXAMPLE}")
    if isinstance(values["trainable"], str):
        values["trainable"] = (values["trainable"],)
    modes = {key: values.pop(key, fields[key]) for key in ("batch_norm", "layer_norm")}
    multipliers = values.pop("lr_multipliers", fields["lr_multipliers"])
    for key, value in values.items():
        if not is_like(value, fields[key]):
            raise UserError(f"{where}: {key} is {value!r}; expected {wanted(fields[key])}")
    for key, mode in modes.items():
        if not isinstance(mode, str):
            pairs = _pairs(mode)
            if pairs is None:
                raise UserError(
                    f"{where}: {key} is {mode!r}; expected one mode, or a mode by layer group: "
                    "{'stage4': 'train'}"
                )
            modes[key] = tuple((pattern, str(each)) for pattern, each in pairs)
    factors = _pairs(multipliers)
    if factors is None or not all(is_like(factor, 1.0) for _, factor in factors):
        raise UserError(
            f"{where}: lr_multipliers is {multipliers!r}; expected a factor by layer group or pattern: "
            "{'stage4': 0.1}"
        )
    return Phase(
        **{**values, **modes, "trainable": tuple(map(str, values["trainable"])), "lr_multipliers": factors}
    )


def _said(phase: Phase) -> dict[str, Any]:
    """Return a phase in the form of a config, without values at their defaults."""
    standard = vars(Phase(**_EXAMPLE))
    return {key: value for key, value in vars(phase).items() if key in _EXAMPLE or value != standard[key]}


def _pairs(value: object) -> tuple[tuple[str, Any], ...] | None:
    """Return pairs by pattern from a mapping or pairs; None for anything else."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple | list) or not all(
        isinstance(p, tuple | list) and len(p) == 2 for p in pairs
    ):
        return None
    return tuple((str(pattern), said) for pattern, said in pairs)
