"""The strategies of a study as lists of phases: the built-in ones (arXiv 2204.13280) and custom ones."""

import dataclasses
from collections.abc import Callable

from dapt_jax.errors import UserError, nearest
from dapt_jax.models.classifier import HEAD
from dapt_jax.models.encoder import Encoder
from dapt_jax.settings import StudySettings
from dapt_jax.settings.sources import NAMED
from dapt_jax.settings.training import AdaptSettings
from dapt_jax.training.phases import Phase
from dapt_jax.weights import locate


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How an encoder is adapted.

    Attributes:
        name: Name in the settings.
        encoder: The encoder that is adapted, cut where the strategy cuts.
        phases: Phases of training, the head's first; empty where nothing is adapted.
        weights: Weights that it starts from, as the setting `weights` names them.
        corpus: Name in `corpora` of the images that it is adapted to; empty for the study's corpus.
    """

    name: str
    encoder: Encoder
    phases: tuple[Phase, ...]
    weights: str
    corpus: str = ""


def resolve(name: str, encoder: Encoder, settings: StudySettings) -> Strategy:
    """Return a strategy by name.

    - `none`: the source weights as they are.
    - `full`: every layer; `partial`: the last `adapt.partial_groups` groups;
    - `hybrid`: partial for `adapt.hybrid_epochs`, then full;
    - `simplified`: the encoder cut after `adapt.cut_after`, its pretrained weights kept, then full;
    - `truncated`: that same cut without adaptation, the control of `simplified`;
    - `gradual`: groups join from the top in `adapt.gradual_steps` phases (Howard & Ruder, arXiv 1801.06146);
    - any name under `custom_strategies`: phases of its own, or those `like` one of these; from `weights` and on a
      `corpus` of its own where it names them.

    All but `none` and `truncated` begin with the head alone, as in the paper.

    Args:
        name: Name of the strategy.
        encoder: The whole encoder.
        settings: Settings of the study.

    Raises:
        UserError: There is no such strategy, or its settings make no phase.
    """
    if name in settings.custom_strategies:
        return _custom(name, encoder, settings)
    if name not in NAMED:
        raise UserError(f"unknown strategy {name!r}; {nearest(name, [*NAMED, *settings.custom_strategies])}")
    adapt = settings.adapt
    if name in ("simplified", "truncated"):
        if not adapt.cut_after:
            raise UserError(
                f"strategy {name!r} needs --config.adapt.cut_after, the last layer group to keep; "
                f"valid: {', '.join(encoder.groups[:-1])}"
            )
        encoder = encoder.truncate(adapt.cut_after)
    if name in ("none", "truncated"):
        return Strategy(name, encoder, (), settings.weights)

    def phase(label: str, epochs: int, trainable: tuple[str, ...]) -> Phase:
        return Phase(
            label,
            epochs,
            trainable,
            adapt.lr,
            norm=adapt.batch_norm,
            schedule=adapt.schedule,
            warmup=adapt.warmup,
            views=adapt.num_fixed_views,
        )

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
    return Strategy(name, encoder, tuple([head, *later] if head else later), settings.weights)


def last_groups(encoder: Encoder, number: int) -> tuple[str, ...]:
    """Return the last groups of an encoder.

    Raises:
        UserError: It does not have that many.
    """
    if not 0 < number <= len(encoder.groups):
        raise UserError(f"adapt.partial_groups is {number}; {encoder.name} has 1 to {len(encoder.groups)} layer groups")
    return encoder.groups[-number:]


def _gradual(
    encoder: Encoder, adapt: AdaptSettings, phase: Callable[[str, int, tuple[str, ...]], Phase]
) -> list[Phase]:
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


def _custom(name: str, encoder: Encoder, settings: StudySettings) -> Strategy:
    spec = settings.custom_strategies[name]
    weights = spec.weights or settings.weights
    encoder = locate.fitted(weights, encoder, settings.model.preprocess)
    if spec.like:
        like = resolve(spec.like, encoder, settings)
        return dataclasses.replace(like, name=name, weights=weights, corpus=spec.corpus)
    if spec.cut_after:
        encoder = encoder.truncate(spec.cut_after)
    return Strategy(name, encoder, spec.phases, weights, spec.corpus)
