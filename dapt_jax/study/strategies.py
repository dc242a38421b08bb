"""Named strategies as lists of phases (arXiv 2204.13280), and custom ones from the settings.

A named strategy is one function below `@strategy(NAME, DESCRIPTION)`; README's table and `--help` show the description.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from dapt_jax.errors import UserError, nearest
from dapt_jax.models.classifier import HEAD
from dapt_jax.models.encoder import Encoder
from dapt_jax.settings.checks import is_like, wanted
from dapt_jax.training.phases import Phase, check_names
from dapt_jax.weights import locate

Phases = tuple[Phase, ...]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How an encoder is adapted.

    Attributes:
        name: Name in the settings.
        encoder: The encoder that is adapted, cut where the strategy cuts.
        phases: Phases of training; empty where nothing is adapted.
        weights: Source weights, as `config.weights` takes them.
        corpus: Corpus that it is adapted to: a name of `config.corpora`, or empty for `config.corpus`.
    """

    name: str
    encoder: Encoder
    phases: Phases
    weights: str
    corpus: str = ""


@dataclasses.dataclass(frozen=True)
class StrategyEntry:
    """A named strategy.

    Attributes:
        description: What it trains, in one sentence.
        phases: Makes its phases, given the encoder and the settings of adaptation.
        cuts: Whether the encoder is cut after `adapt.cut_after` first.
    """

    description: str
    phases: Callable[[Encoder, Any], Phases]
    cuts: bool = False


STRATEGIES: dict[str, StrategyEntry] = {}


def strategy(
    name: str, description: str, *, cuts: bool = False
) -> Callable[[Callable[[Encoder, Any], Phases]], Callable[[Encoder, Any], Phases]]:
    """Register the function below it as a named strategy: from an encoder and the settings of adaptation to phases.

    Args:
        name: Name in the settings.
        description: What it trains, in one sentence.
        cuts: Whether the encoder is cut after `adapt.cut_after` first.

    Raises:
        ValueError: The name is taken.
    """

    def register(phases: Callable[[Encoder, Any], Phases]) -> Callable[[Encoder, Any], Phases]:
        if name in STRATEGIES:
            raise ValueError(f"a strategy {name!r} is registered already")
        STRATEGIES[name] = StrategyEntry(description, phases, cuts)
        return phases

    return register


def listing() -> str:
    """Return the named strategies as a table in Markdown."""
    rows = [f"| `{name}` | {entry.description} |" for name, entry in STRATEGIES.items()]
    return "\n".join(["| strategy | what it trains |", "| --- | --- |", *rows])


def head_first(adapt: Any) -> Phases:
    """Return the phase that trains the head alone, as the paper's strategies begin; none if it has no epochs."""
    if not adapt.head_epochs:
        return ()
    return (Phase("head", adapt.head_epochs, (HEAD,), adapt.head_lr, augment=False),)


def phase(adapt: Any, name: str, epochs: int, groups: tuple[str, ...]) -> Phase:
    """Return a phase that trains layer groups and the head, under the settings of adaptation."""
    return Phase(
        name,
        epochs,
        (*groups, HEAD),
        adapt.lr,
        adapt.batch_norm,
        adapt.layer_norm,
        adapt.schedule,
        adapt.warmup,
        views=adapt.views,
    )


@strategy("none", "Nothing: the source weights as they are.")
def none(encoder: Encoder, adapt: Any) -> Phases:
    """Return no phase."""
    return ()


@strategy("full", "Every layer.")
def full(encoder: Encoder, adapt: Any) -> Phases:
    """Return the head, then every layer."""
    return (*head_first(adapt), phase(adapt, "full", adapt.epochs, encoder.groups))


@strategy("partial", "The last `adapt.partial_groups` layer groups.")
def partial(encoder: Encoder, adapt: Any) -> Phases:
    """Return the head, then the last layer groups."""
    return (*head_first(adapt), phase(adapt, "partial", adapt.epochs, last_groups(encoder, adapt.partial_groups)))


@strategy("hybrid", "The last layer groups for `adapt.hybrid_epochs`, then every layer.")
def hybrid(encoder: Encoder, adapt: Any) -> Phases:
    """Return the head, then `partial`, then `full`.

    Raises:
        UserError: One of the two would have no epoch.
    """
    if not 0 < adapt.hybrid_epochs < adapt.epochs:
        raise UserError(
            f"adapt.hybrid_epochs is {adapt.hybrid_epochs}; expected 1 to {adapt.epochs - 1}, "
            f"since hybrid has {adapt.epochs} epochs in all (adapt.epochs)"
        )
    return (
        *head_first(adapt),
        phase(adapt, "partial", adapt.hybrid_epochs, last_groups(encoder, adapt.partial_groups)),
        phase(adapt, "full", adapt.epochs - adapt.hybrid_epochs, encoder.groups),
    )


@strategy("simplified", "Every layer of the encoder cut after `adapt.cut_after`, whose weights are kept.", cuts=True)
def simplified(encoder: Encoder, adapt: Any) -> Phases:
    """Return the phases of `full`."""
    return full(encoder, adapt)


@strategy("truncated", "Nothing, of the encoder cut after `adapt.cut_after`: the control of `simplified`.", cuts=True)
def truncated(encoder: Encoder, adapt: Any) -> Phases:
    """Return no phase."""
    return ()


@strategy(
    "gradual",
    "Layer groups that join from the top in `adapt.gradual_steps` phases (gradual unfreezing, arXiv 1801.06146).",
)
def gradual(encoder: Encoder, adapt: Any) -> Phases:
    """Return the head, then phases of more and more layer groups.

    Raises:
        UserError: A phase would have no epoch or no group.
    """
    steps, count = adapt.gradual_steps, len(encoder.groups)
    most = min(adapt.epochs, count)
    if not 0 < steps <= most:
        raise UserError(f"adapt.gradual_steps is {steps}; expected 1 to {most}: each phase has an epoch and a group")
    joined = []
    for number in range(1, steps + 1):
        epochs = adapt.epochs * number // steps - adapt.epochs * (number - 1) // steps
        joined.append(phase(adapt, f"gradual{number}", epochs, encoder.groups[count - count * number // steps :]))
    return (*head_first(adapt), *joined)


def last_groups(encoder: Encoder, number: int) -> tuple[str, ...]:
    """Return the last layer groups of an encoder.

    Raises:
        UserError: It does not have that many.
    """
    if not 0 < number <= len(encoder.groups):
        raise UserError(f"adapt.partial_groups is {number}; {encoder.name} has 1 to {len(encoder.groups)} layer groups")
    return encoder.groups[-number:]


def resolve(name: str, encoder: Encoder, config: Any) -> Strategy:
    """Return a strategy by name: a named one, or one of `config.phases`.

    A custom strategy has phases of its own or those `like` a named one; it starts from `weights` and sees a `corpus` of its
    own where it names them.

    Args:
        name: Name of the strategy.
        encoder: The whole encoder.
        config: The study's settings.

    Raises:
        UserError: Unknown name, or settings that make no phase.
    """
    if name in config.phases:
        return _users_own(name, encoder, config)
    if name not in STRATEGIES:
        raise UserError(f"unknown strategy {name!r}; {nearest(name, [*STRATEGIES, *config.phases])}")
    entry = STRATEGIES[name]
    if entry.cuts:
        if not config.adapt.cut_after:
            raise UserError(
                f"strategy {name!r} needs --config.adapt.cut_after, the last layer group to keep; "
                f"valid: {', '.join(encoder.groups[:-1])}"
            )
        encoder = encoder.truncate(config.adapt.cut_after)
    return Strategy(name, encoder, entry.phases(encoder, config.adapt), config.weights)


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
        if entry["like"] not in STRATEGIES or entry.get("phases") or entry.get("cut_after"):
            raise UserError(
                f"phases.{name}: like={entry['like']!r}; {nearest(entry['like'], STRATEGIES)}, without phases of its own"
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


_RESTRATEGIES = {
    "norm": "it is 'batch_norm' now, beside 'layer_norm'",
    "rates": "it is 'lr_multipliers' now",
}
"""What the settings of a phase are called now that had another name."""
_EXAMPLE: dict[str, Any] = {"name": "head", "epochs": 10, "trainable": ("head",), "lr": 1e-3}


def _phase(where: str, settings: Any) -> Phase:
    """A phase as a config writes it down; a lone pattern needs no tuple around it."""
    if not isinstance(settings, Mapping):
        raise UserError(f"{where} is {settings!r}; expected settings such as {_EXAMPLE}")
    values = dict(settings)
    fields = vars(Phase(**_EXAMPLE))
    for key in values:
        if key not in fields:
            raise UserError(f"{where} has no setting {key!r}; {_RESTRATEGIES.get(key) or nearest(key, fields)}")
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
                    f"{where}: {key} is {mode!r}; expected one mode, or a mode by layer group: {{'stage4': 'train'}}"
                )
            modes[key] = tuple((pattern, str(each)) for pattern, each in pairs)
    factors = _pairs(multipliers)
    if factors is None or not all(is_like(factor, 1.0) for _, factor in factors):
        raise UserError(
            f"{where}: lr_multipliers is {multipliers!r}; expected a factor by layer group or pattern: {{'stage4': 0.1}}"
        )
    return Phase(**{**values, **modes, "trainable": tuple(map(str, values["trainable"])), "lr_multipliers": factors})


def _pairs(value: Any) -> tuple[tuple[str, Any], ...] | None:
    """What a config says by pattern, as a mapping or as pairs; None if it is neither."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple | list) or not all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs):
        return None
    return tuple((str(pattern), said) for pattern, said in pairs)
