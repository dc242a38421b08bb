"""The named strategies as lists of phases (arXiv 2204.13280), and those a user writes down."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dapt_jax.errors import UserError, nearest
from dapt_jax.models.classifier import HEAD
from dapt_jax.models.encoder import Encoder
from dapt_jax.settings.checks import is_like, wanted
from dapt_jax.training.phases import Phase, check_names
from dapt_jax.weights import locate

NAMED = ("none", "full", "partial", "hybrid", "simplified", "truncated", "gradual")


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How an encoder is adapted.

    Attributes:
        name: as in the config.
        encoder: what is adapted, cut where the strategy cuts.
        phases: head first; empty where nothing is adapted.
        weights: that it starts from, as `config.weights` takes them.
        corpus: that it is adapted to: a name of `config.corpora`, or empty for `config.corpus`.
    """

    name: str
    encoder: Encoder
    phases: tuple[Phase, ...]
    weights: str
    corpus: str = ""


def resolve(name: str, encoder: Encoder, config: Any) -> Strategy:
    """A strategy by name.

    - `none`: the source weights as they are.
    - `full`: every layer; `partial`: the last `adapt.partial_groups` groups;
    - `hybrid`: partial for `adapt.hybrid_epochs`, then full;
    - `simplified`: the encoder cut after `adapt.cut_after`, its pretrained weights kept, then full;
    - `truncated`: that same cut without adaptation, the control of `simplified`;
    - `gradual`: groups join from the top in `adapt.gradual_steps` phases (Howard & Ruder, arXiv 1801.06146);
    - any name under `config.phases`: phases of the user's own, or those `like` one of these; from `weights` and on a
      `corpus` of its own where it names them.

    All but `none` and `truncated` begin with the head alone, as in the paper.

    Args:
        name: of the strategy.
        encoder: whole.
        config: the study's.

    Raises:
        UserError: unknown name, or settings that make no phase.
    """
    adapt = config.adapt
    if name in config.phases:
        return _users_own(name, encoder, config)
    if name not in NAMED:
        raise UserError(f"unknown strategy {name!r}; {nearest(name, [*NAMED, *config.phases])}")
    if name in ("simplified", "truncated"):
        if not adapt.cut_after:
            raise UserError(
                f"strategy {name!r} needs --config.adapt.cut_after, the last layer group to keep; "
                f"valid: {', '.join(encoder.groups[:-1])}"
            )
        encoder = encoder.truncate(adapt.cut_after)
    if name in ("none", "truncated"):
        return Strategy(name, encoder, (), config.weights)

    def phase(label: str, epochs: int, trainable: tuple[str, ...]) -> Phase:
        shared = {"lr": adapt.lr, "norm": adapt.norm, "schedule": adapt.schedule, "warmup": adapt.warmup}
        return Phase(label, epochs, trainable, views=adapt.views, **shared)

    whole = (*encoder.groups, HEAD)
    if name == "partial":
        later = [phase("partial", adapt.epochs, (*last_groups(encoder, adapt.partial_groups), HEAD))]
    elif name == "hybrid":
        if not 0 < adapt.hybrid_epochs < adapt.epochs:
            raise UserError(
                f"adapt.hybrid_epochs is {adapt.hybrid_epochs}; expected 1 to {adapt.epochs - 1}, "
                f"since hybrid has {adapt.epochs} epochs in all (adapt.epochs)"
            )
        later = [
            phase("partial", adapt.hybrid_epochs, (*last_groups(encoder, adapt.partial_groups), HEAD)),
            phase("full", adapt.epochs - adapt.hybrid_epochs, whole),
        ]
    elif name == "gradual":
        later = _gradual(encoder, adapt, phase)
    else:
        later = [phase("full", adapt.epochs, whole)]
    head = Phase("head", adapt.head_epochs, (HEAD,), adapt.head_lr, augment=False) if adapt.head_epochs else None
    return Strategy(name, encoder, tuple([head, *later] if head else later), config.weights)


def last_groups(encoder: Encoder, number: int) -> tuple[str, ...]:
    """The last groups of an encoder.

    Raises:
        UserError: it does not have that many.
    """
    if not 0 < number <= len(encoder.groups):
        raise UserError(f"adapt.partial_groups is {number}; {encoder.name} has 1 to {len(encoder.groups)} layer groups")
    return encoder.groups[-number:]


def _gradual(encoder: Encoder, adapt: Any, phase: Any) -> list[Phase]:
    steps = adapt.gradual_steps
    if not 0 < steps <= min(adapt.epochs, len(encoder.groups)):
        most = min(adapt.epochs, len(encoder.groups))
        raise UserError(f"adapt.gradual_steps is {steps}; expected 1 to {most}: each phase has an epoch and a group")
    made = []
    for number in range(1, steps + 1):
        epochs = adapt.epochs * number // steps - adapt.epochs * (number - 1) // steps
        groups = encoder.groups[len(encoder.groups) - len(encoder.groups) * number // steps :]
        made.append(phase(f"gradual{number}", epochs, (*groups, HEAD)))
    return made


_SETTINGS = ("cut_after", "phases", "like", "weights", "corpus")


def _users_own(name: str, encoder: Encoder, config: Any) -> Strategy:
    entry = config.phases[name]
    if not isinstance(entry, Mapping | ConfigDict):
        entry = {"phases": entry}
    for key in entry:
        if key not in _SETTINGS:
            raise UserError(f"phases.{name} has no setting {key!r}; {nearest(key, _SETTINGS)}")
    corpus, weights = entry.get("corpus", ""), entry.get("weights", "") or config.weights
    if corpus and corpus not in config.corpora:
        raise UserError(f"phases.{name}: no corpus {corpus!r} in corpora; {nearest(corpus, config.corpora)}")
    encoder = locate.fitted(weights, encoder)
    if entry.get("like"):
        if entry["like"] not in NAMED or entry.get("phases") or entry.get("cut_after"):
            raise UserError(
                f"phases.{name}: like={entry['like']!r}; {nearest(entry['like'], NAMED)}, without phases of its own"
            )
        like = resolve(entry["like"], encoder, config)
        return dataclasses.replace(like, name=name, weights=weights, corpus=corpus)
    if entry.get("cut_after"):
        encoder = encoder.truncate(entry["cut_after"])
    listed = entry.get("phases", ())
    is_of_its_own = listed or entry.get("cut_after") or entry.get("weights")
    if not isinstance(listed, tuple | list) or not is_of_its_own:
        raise UserError(f"phases.{name} has no list of phases; expected one or more: ({_EXAMPLE},)")
    phases = [_phase(f"phases.{name}.phases[{number}]", settings) for number, settings in enumerate(listed)]
    check_names(phases)
    return Strategy(name, encoder, tuple(phases), weights, corpus)


_EXAMPLE: dict[str, Any] = {"name": "head", "epochs": 10, "trainable": ("head",), "lr": 1e-3}


def _phase(where: str, settings: Any) -> Phase:
    """A phase as a config writes it down; a lone pattern needs no tuple around it."""
    if not isinstance(settings, Mapping):
        raise UserError(f"{where} is {settings!r}; expected settings such as {_EXAMPLE}")
    values = dict(settings)
    fields = vars(Phase(**_EXAMPLE))
    for key in values:
        if key not in fields:
            raise UserError(f"{where} has no setting {key!r}; {nearest(key, fields)}")
    if missing := [key for key in _EXAMPLE if key not in values]:
        raise UserError(f"{where} lacks {', '.join(missing)}; expected settings such as {_EXAMPLE}")
    if isinstance(values["trainable"], str):
        values["trainable"] = (values["trainable"],)
    norm, rates = (values.pop(key, fields[key]) for key in ("norm", "rates"))
    for key, value in values.items():
        if not is_like(value, fields[key]):
            raise UserError(f"{where}: {key} is {value!r}; expected {wanted(fields[key])}")
    if not isinstance(norm, str):
        pairs = _pairs(norm)
        if pairs is None:
            raise UserError(
                f"{where}: norm is {norm!r}; expected one mode, or a mode by layer group: {{'stage4': 'train'}}"
            )
        norm = tuple((pattern, str(mode)) for pattern, mode in pairs)
    factors = _pairs(rates)
    if factors is None or not all(is_like(factor, 1.0) for _, factor in factors):
        raise UserError(f"{where}: rates is {rates!r}; expected a factor by layer group or pattern: {{'stage4': 0.1}}")
    return Phase(**{**values, "trainable": tuple(map(str, values["trainable"])), "norm": norm, "rates": factors})


def _pairs(value: Any) -> tuple[tuple[str, Any], ...] | None:
    """What a config says by pattern, as a mapping or as pairs; None if it is neither."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple | list) or not all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs):
        return None
    return tuple((str(pattern), said) for pattern, said in pairs)
