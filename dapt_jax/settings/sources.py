"""Sections with user-defined names: corpora, target tasks and custom strategies."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from dapt_jax.data.sets import SETS
from dapt_jax.errors import UserError, nearest
from dapt_jax.fields import SettingError
from dapt_jax.objectives import OBJECTIVES
from dapt_jax.records.renamed import PHASE_RENAMED
from dapt_jax.records.vocabulary import BASELINE, OFFICIAL
from dapt_jax.settings.names import is_like, wanted
from dapt_jax.statistics import PATIENT, RULES, Aggregation
from dapt_jax.training.phases import Phase, check_names

VAL_FRACTION = 0.1
"""Share of a corpus that is held out for validation, unless its settings say another."""

Source = Mapping[str, Any]
"""A description of a data set: `kind`, and what its reader takes; see `data.sources.load`."""

Sources = Source | tuple[Source, ...]
"""One description, or several of sets that are concatenated."""

TASK_SPLITS = ("development", *OFFICIAL, "test", "external")
"""Sets that a target task can have."""

_OF_TASK = ("transfer", "auc_classes", "unit", "aggregate")
"""Keys of a task that are no sets."""


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
    """The sets of a target task, each a source or several sources that are one set.

    Attributes:
        development: Images for training heads and, fold by fold, for scoring them; None with `train`.
        train: Official training images, all of which train, without folds; None with `development`.
        val: Official validation images, on which the loss is watched and settings are chosen; None without.
        test: Images used for scoring only; None without a test set.
        external: Images of another site, used for scoring only; None without an external set.
        transfer: What of the section `transfer` is other for this task, as nested dicts.
        auc_classes: Classes whose mean AUC is scored beside that of all, as `auc_subset`; empty for none.
        unit: What is scored beside images: `patient`, or a column of the manifest that names each patient's
            volumes or the like; empty for images alone.
        aggregate: How the probabilities of a unit's images are aggregated: `mean`, `max` or `vote`.
    """

    development: Sources | None = None
    train: Sources | None = None
    val: Sources | None = None
    test: Sources | None = None
    external: Sources | None = None
    transfer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    auc_classes: tuple[str, ...] = ()
    unit: str = ""
    aggregate: str = ""

    @property
    def aggregation(self) -> Aggregation | None:
        """What images are aggregated to, and how; None for images alone."""
        return Aggregation(self.unit, self.aggregate or RULES[0]) if self.unit else None

    @property
    def sources(self) -> dict[str, Sources]:
        """The available sets by split."""
        found = {split: getattr(self, split) for split in TASK_SPLITS}
        return {split: source for split, source in found.items() if source is not None}

    @classmethod
    def from_config(cls, values: object, where: str) -> "TaskSettings":
        """Return the task of a config section.

        A section that describes a set, with `kind`, takes the official lists of this set.
        """
        if not isinstance(values, Mapping):
            expected = "expected its sets: development, or train and val, and test or external if there are"
            raise UserError(f"{where} is {values!r}; {expected}")
        own = {key: values[key] for key in _OF_TASK if key in values}
        values = {key: values[key] for key in values if key not in _OF_TASK}
        if "kind" in values:
            values = _official(values, where)
        for split in values:
            if split not in TASK_SPLITS:
                raise UserError(
                    f"{where} has no split {split!r}; {nearest(split, (*TASK_SPLITS, *_OF_TASK))}"
                )
        if not {"development", "train"} & set(values):
            raise UserError(f"{where} has no development images, and no train")
        if "development" in values and (twice := [split for split in OFFICIAL if split in values]):
            raise UserError(
                f"{where} has development and {twice[0]}; expected either development, which is divided into "
                "folds, or train with or without val"
            )
        name = where.partition(".")[2]
        if not isinstance(changes := own.get("transfer", {}), Mapping):
            raise UserError(f"{where}.transfer is {changes!r}; expected settings such as {{'folds': 3}}")
        classes = own.get("auc_classes", ())
        names = tuple(part.strip() for part in classes.split(",")) if isinstance(classes, str) else classes
        if not isinstance(names, tuple | list) or not all(isinstance(each, str) for each in names):
            raise UserError(f"{where}.auc_classes is {classes!r}; expected names of classes")
        found = {split: _sources(values[split], f"{name} {split}: ") for split in values}
        unit, rule = own.get("unit", ""), own.get("aggregate", "")
        for key, value in (("unit", unit), ("aggregate", rule)):
            if not isinstance(value, str):
                raise UserError(f"{where}.{key} is {value!r}; expected a name")
        if rule and rule not in RULES:
            raise UserError(f"{where}.aggregate is {rule!r}; {nearest(rule, RULES)}")
        if rule and not unit:
            raise UserError(f"{where}.aggregate without {where}.unit; expected a unit such as {PATIENT!r}")
        return cls(
            **found, transfer=changes, auc_classes=tuple(filter(None, names)), unit=unit, aggregate=rule
        )

    def to_config(self) -> dict[str, Any]:
        """Return it in the form of a config."""
        found: dict[str, Any] = {
            split: dict(source) if isinstance(source, Mapping) else tuple(map(dict, source))
            for split, source in self.sources.items()
        }
        return {**found, **{name: getattr(self, name) for name in _OF_TASK if getattr(self, name)}}


def _sources(values: object, where: str) -> Sources:
    """Return the set, or the sets, of a split."""
    if not isinstance(values, tuple | list):
        return source_from_config(values, where)
    if not values:
        raise UserError(f"{where}an empty list; expected one source or more")
    found = tuple(source_from_config(each, where) for each in values)
    return found if len(found) > 1 else found[0]


def _official(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the splits of a task that names one set: its official lists, and the splits that it names itself.

    Raises:
        UserError: The set has no official lists.
    """
    splits = {split: values[split] for split in values if split in TASK_SPLITS}
    source = source_from_config({key: values[key] for key in values if key not in splits}, where)
    kind = str(source["kind"])
    lists = SETS[kind].official if kind in SETS else {}
    if not lists:
        known = sorted(kind for kind, entry in SETS.items() if entry.official)
        raise UserError(
            f"{where}: kind {kind!r} has no official lists; expected development or train, each with a kind, "
            f"or one of {', '.join(known)}"
        )
    given = str(source.get("where", ""))
    return {
        **{split: {**source, "where": ",".join(filter(None, (w, given)))} for split, w in lists.items()},
        **splits,
    }


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
        compute_budget: Most FLOPs of adaptation, as a share of those of full DAPT on the study's corpus: its
            phases are cut short to it; 0 for their own length.
    """

    phases: tuple[Phase, ...] = ()
    like: str = ""
    weights: str = ""
    corpus: str = ""
    cut_after: str = ""
    objective: str = ""
    compute_budget: float = 0.0

    @classmethod
    def from_config(cls, values: object, where: str) -> "StrategySpec":
        """Return the custom strategy of a config section, which may be just a list of phases."""
        values = values if isinstance(values, Mapping) else {"phases": values}
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f"{where} has no setting {key!r}; {nearest(key, known)}")
            if key == "compute_budget":
                check_share(f"{where}.{key}", values[key])
            elif key != "phases" and not isinstance(values[key], str):
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


def check_share(where: str, value: object) -> None:
    """Refuse a compute budget that is not a finite number from 0; `where` names the setting."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"{where} is {value!r}; expected a share of full DAPT's FLOPs, such as 0.1, or 0")


_LONGEST_NAME = 80


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
    if len(name.encode()) > _LONGEST_NAME:  # files are named after a task, a strategy and a protocol
        raise UserError(f"{section} holds the name {name[:40]}...; expected at most {_LONGEST_NAME} bytes")


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
