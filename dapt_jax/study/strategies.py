"""The strategies of a study, built-in and custom ones, resolved against its encoder.

The built-in ones are in `dapt_jax.study.built_in_strategies`.
"""

import dataclasses
import itertools

from dapt_jax.errors import UserError, nearest
from dapt_jax.models.encoder import Encoder
from dapt_jax.objectives import SUPERVISED
from dapt_jax.settings import StrategySpec, StudySettings
from dapt_jax.study.built_in_strategies import STRATEGIES, SWITCH, Phases, switching
from dapt_jax.weights import locate
from dapt_jax.weights.run_reference import ALL, SCHEME, RunReference


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How an encoder is adapted.

    Attributes:
        name: Name in the settings.
        encoder: The encoder that is adapted, cut where the strategy cuts.
        phases: Phases of training; empty where nothing is adapted.
        weights: Source weights, in the form of the setting `weights`.
        corpus: Name in `corpora` of the images that it is adapted to; empty for the study's corpus.
        before: The earlier phases, of other corpora, whose encoder `phases` start from; None without any.
        part: Folder of its files within the arm's, of earlier phases; empty for the last ones.
        objective: What adaptation minimises: see `adapt.objective`.
        compute_budget: Share of full DAPT's FLOPs to which its phases are cut short; 0 for their own length.
    """

    name: str
    encoder: Encoder
    phases: Phases
    weights: str
    corpus: str = ""
    before: "Strategy | None" = None
    part: str = ""
    objective: str = SUPERVISED
    compute_budget: float = 0.0

    @property
    def is_label_free(self) -> bool:
        """Whether it adapts without any label."""
        return bool(self.phases) and self.objective != SUPERVISED

    @property
    def parts(self) -> "tuple[Strategy, ...]":
        """Its parts in order, one for each run of phases on one corpus, itself last."""
        return (*(self.before.parts if self.before else ()), self)


def resolve(name: str, encoder: Encoder, settings: StudySettings) -> Strategy:
    """Return a strategy by name: a built-in one, or one of `custom_strategies`.

    A custom strategy is a list of phases, or a copy of a built-in one (`like`); it may name separate
    `weights` and a separate `corpus`.

    Args:
        name: Name of the strategy.
        encoder: The whole encoder.
        settings: Settings of the study.

    Raises:
        UserError: The strategy does not exist, or its settings give no phase.
    """
    return _scaled_strategy(_resolved(name, encoder, settings), settings.phases_scale)


def _scaled_strategy(strategy: Strategy, factor: float) -> Strategy:
    """Return a strategy with a multiple of the epochs of its phases, earlier ones included."""
    before = _scaled_strategy(strategy.before, factor) if strategy.before else None
    return dataclasses.replace(strategy, phases=scaled(strategy.phases, factor), before=before)


def scaled(phases: Phases, factor: float) -> Phases:
    """Return phases with a multiple of their epochs, rounded, at least one each; warm-up is scaled alike.

        >>> [each.epochs for each in scaled((Phase("head", 1000, ("head",), 1e-4), Phase("all", 20, ("*",), 1e-5)), 0.02)]
        [20, 1]

    Args:
        phases: The phases.
        factor: The factor; 1 returns them as they are.
    """
    if factor == 1:
        return phases
    return tuple(
        dataclasses.replace(
            phase,
            epochs=(epochs := max(1, round(phase.epochs * factor))),
            warmup=min(phase.warmup * factor, float(epochs)),
        )
        for phase in phases
    )


def _resolved(name: str, encoder: Encoder, settings: StudySettings) -> Strategy:
    """Return a strategy with the epochs that the settings name."""
    if name in settings.custom_strategies:
        return _custom(name, encoder, settings)
    if SWITCH in name:
        phases = switching(name, encoder, settings.adapt)
        return Strategy(name, encoder, phases, settings.weights, objective=settings.adapt.objective)
    if name not in STRATEGIES:
        raise UserError(
            f"unknown strategy {name!r}; {nearest(name, [*STRATEGIES, *settings.custom_strategies])}"
        )
    entry, adapt = STRATEGIES[name], settings.adapt
    if entry.cuts:
        if not adapt.cut_after:
            raise UserError(
                f"strategy {name!r} needs --config.adapt.cut_after, the last layer group to keep; "
                f"valid: {', '.join(encoder.groups[:-1])}; --config.strategies without {name!r} needs none"
            )
        encoder = _truncated(encoder, adapt.cut_after, name, "adapt.cut_after")
    phases = entry.phases(encoder, adapt)
    return Strategy(name, encoder, phases, settings.weights, objective=adapt.objective)


def _truncated(encoder: Encoder, after: str, name: str, setting: str) -> Encoder:
    """Return the encoder of a strategy, cut after the layer group that a setting names."""
    if after not in encoder.groups:
        raise UserError(
            f"strategy {name!r}: {setting} is {after!r}, a layer group that model {encoder.name!r} does not have; "
            f"{nearest(after, encoder.groups)}"
        )
    return encoder.truncate(after)


def _custom(name: str, encoder: Encoder, settings: StudySettings) -> Strategy:
    spec = settings.custom_strategies[name]
    weights, objective = spec.weights or settings.weights, spec.objective or settings.adapt.objective
    may_read = settings.mode != "plan" or locate.is_here(weights, encoder.name)
    untruncated = settings.model.encoder()
    if weights != settings.weights and encoder.groups == untruncated.groups[: len(encoder.groups)]:
        encoder = untruncated  # the study's own weights may be of a truncated encoder
    encoder = locate.fitted(weights, encoder, settings.model.preprocess, may_read)
    if spec.like:
        if spec.like not in STRATEGIES and SWITCH not in spec.like:
            raise UserError(f"custom_strategies.{name}: like={spec.like!r}; {nearest(spec.like, STRATEGIES)}")
        adapt = dataclasses.replace(settings.adapt, objective=objective)
        like = _resolved(spec.like, encoder, dataclasses.replace(settings, adapt=adapt))
        return dataclasses.replace(
            like, name=name, weights=weights, corpus=spec.corpus, compute_budget=spec.compute_budget
        )
    if spec.cut_after:
        encoder = _truncated(encoder, spec.cut_after, name, f"custom_strategies.{name}.cut_after")
    whole = _in_parts(name, encoder, spec, weights, objective)
    if spec.compute_budget and whole.before:
        raise UserError(
            f"custom_strategies.{name}: a compute_budget does not cover phases on several corpora; expected one "
            "corpus, or no compute_budget"
        )
    return dataclasses.replace(whole, compute_budget=spec.compute_budget)


def _in_parts(name: str, encoder: Encoder, spec: StrategySpec, weights: str, objective: str) -> Strategy:
    """Return a custom strategy of phases, with a part for each run of phases on one corpus."""
    corpora = [
        (corpus, tuple(phases))
        for corpus, phases in itertools.groupby(spec.phases, lambda each: each.corpus or spec.corpus)
    ] or [(spec.corpus, ())]
    before: Strategy | None = None
    for number, (corpus, phases) in enumerate(corpora[:-1], start=1):
        before = Strategy(name, encoder, phases, weights, corpus, before, f"part{number}", objective)
    return Strategy(name, encoder, corpora[-1][1], weights, corpora[-1][0], before, objective=objective)


def expanded(settings: StudySettings) -> StudySettings:
    """Return settings in which each kept epoch of `run:WORKDIR@epoch=all` is a strategy `NAME-epoch50`.

    Raises:
        UserError: The reference is invalid, or its arm keeps no epoch.
    """
    specs: dict[str, StrategySpec] = {}
    names: dict[str, tuple[str, ...]] = {}
    for name, spec in settings.custom_strategies.items():
        specs[name] = spec
        if spec.weights.startswith(SCHEME) and (reference := RunReference.of(spec.weights)).epoch == ALL:
            of_epochs = {f"{name}-epoch{n}": reference.with_epoch(n) for n in reference.epochs()}
            names[name] = tuple(of_epochs)
            del specs[name]
            specs |= {each: dataclasses.replace(spec, weights=path) for each, path in of_epochs.items()}
    if not names:
        return settings
    listed = tuple(each for name in settings.strategies for each in names.get(name, (name,)))
    return dataclasses.replace(settings, strategies=listed, custom_strategies=specs)
