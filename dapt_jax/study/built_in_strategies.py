"""The built-in strategies of adaptation, each a function from an encoder and settings to phases (arXiv 2204.13280).

A strategy is one function below `@strategy(NAME, DESCRIPTION)`; `listing` shows the descriptions.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from dapt_jax.errors import UserError, nearest
from dapt_jax.models.classifier import HEAD
from dapt_jax.models.encoder import Encoder
from dapt_jax.objectives import LABEL_FREE, SUPERVISED
from dapt_jax.settings.training import AdaptSettings
from dapt_jax.training.patterns import KINDS, LORA, ROWS, select
from dapt_jax.training.phases import Phase

Phases = tuple[Phase, ...]
MakePhases = Callable[[Encoder, AdaptSettings], Phases]


@dataclasses.dataclass(frozen=True)
class StrategyEntry:
    """A built-in strategy.

    Attributes:
        description: What it trains, in one sentence.
        phases: Makes its phases, given the encoder and the settings of adaptation.
        cuts: Whether the encoder is cut after `adapt.cut_after` first.
    """

    description: str
    phases: MakePhases
    cuts: bool = False


STRATEGIES: dict[str, StrategyEntry] = {}

_PROJECTION = "/attention/project"
"""End of the path of the dense layer after the heads of self-attention."""

SWITCH = "+"
"""Between two names of strategies: the first, then the second."""


def strategy(name: str, description: str, *, cuts: bool = False) -> Callable[[MakePhases], MakePhases]:
    """Register a function from an encoder and the settings of adaptation to phases as a strategy.

    Args:
        name: Name in the settings.
        description: What it trains, in one sentence.
        cuts: Whether the encoder is cut after `adapt.cut_after` first.

    Raises:
        ValueError: The name is taken.
    """

    def register(phases: MakePhases) -> MakePhases:
        if name in STRATEGIES:
            raise ValueError(f"a strategy {name!r} is registered already")
        STRATEGIES[name] = StrategyEntry(description, phases, cuts)
        return phases

    return register


def listing() -> str:
    """Return the built-in strategies as a table in Markdown."""
    rows = [f"| `{name}` | {entry.description} |" for name, entry in STRATEGIES.items()]
    return "\n".join(["| strategy | what it trains |", "| --- | --- |", *rows])


def head_first(adapt: AdaptSettings) -> Phases:
    """Return the phase that trains the head alone, which comes first; none if it has no epochs.

    The head of a label-free objective sees the views of the later phases, of which everything is cached. Of
    some objectives, parts of the head train alone for one epoch.
    """
    if not adapt.head_epochs:
        return ()
    head = Phase("head", adapt.head_epochs, (HEAD,), adapt.head_lr, views=adapt.num_fixed_views)
    if adapt.objective == SUPERVISED:
        return (dataclasses.replace(head, views=0, augment=False),)
    objective = LABEL_FREE[adapt.objective]
    if not objective.trains_head_first:
        return ()
    if not objective.first_head_layers:
        return (head,)
    layers = tuple(f"{HEAD}/{name}" for name in objective.first_head_layers)
    below = dataclasses.replace(head, name="head_layers", epochs=1, trainable=layers)
    rest = adapt.head_epochs - 1
    return (below, dataclasses.replace(head, epochs=rest)) if rest else (below,)


def phase(adapt: AdaptSettings, name: str, epochs: int, groups: tuple[str, ...]) -> Phase:
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
        views=adapt.num_fixed_views,
    )


@strategy("none", "Nothing: the source weights as they are.")
def none(encoder: Encoder, adapt: AdaptSettings) -> Phases:
    """Return no phase."""
    return ()


@strategy("full", "Every layer.")
def full(encoder: Encoder, adapt: AdaptSettings) -> Phases:
    """Return the head, then every layer."""
    return (*head_first(adapt), phase(adapt, "full", adapt.epochs, encoder.groups))


@strategy("partial", "The last `adapt.partial_groups` layer groups.")
def partial(encoder: Encoder, adapt: AdaptSettings) -> Phases:
    """Return the head, then the last layer groups."""
    return (
        *head_first(adapt),
        phase(adapt, "partial", adapt.epochs, last_groups(encoder, adapt.partial_groups)),
    )


@strategy("hybrid", "The last layer groups for `adapt.hybrid_epochs`, then every layer.")
def hybrid(encoder: Encoder, adapt: AdaptSettings) -> Phases:
    """Return the head, then `partial`, then `full`.

    Raises:
        UserError: One of the two would have no epoch.
    """
    if adapt.epochs < 2:
        raise UserError(
            f"adapt.epochs is {adapt.epochs}; expected 2 or more for hybrid, of which adapt.hybrid_epochs train "
            "the last layer groups and the rest every layer; or strategies without hybrid"
        )
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


@strategy(
    "simplified", "Every layer of the encoder cut after `adapt.cut_after`, whose weights are kept.", cuts=True
)
def simplified(encoder: Encoder, adapt: AdaptSettings) -> Phases:
    """Return the phases of `full`."""
    return full(encoder, adapt)


@strategy(
    "truncated",
    "Nothing, of the encoder cut after `adapt.cut_after`: the control of `simplified`.",
    cuts=True,
)
def truncated(encoder: Encoder, adapt: AdaptSettings) -> Phases:
    """Return no phase."""
    return ()


@strategy(
    "gradual",
    "Layer groups that join from the top in `adapt.gradual_steps` phases (gradual unfreezing, arXiv "
    "1801.06146).",
)
def gradual(encoder: Encoder, adapt: AdaptSettings) -> Phases:
    """Return the head, then phases of more and more layer groups.

    Raises:
        UserError: A phase would have no epoch or no group.
    """
    steps, count = adapt.gradual_steps, len(encoder.groups)
    most = min(adapt.epochs, count)
    if not 0 < steps <= most:
        raise UserError(
            f"adapt.gradual_steps is {steps}; expected 1 to {most}: each phase has an epoch and a group"
        )
    joined = []
    for number in range(1, steps + 1):
        epochs = adapt.epochs * number // steps - adapt.epochs * (number - 1) // steps
        joined.append(
            phase(adapt, f"gradual{number}", epochs, encoder.groups[count - count * number // steps :])
        )
    return (*head_first(adapt), *joined)


@strategy(
    "bitfit",
    "The biases, those of norms included, of the last `adapt.peft_groups` groups (arXiv 2106.10199).",
)
def bitfit(encoder: Encoder, adapt: AdaptSettings) -> Phases:
    """Return the head, then every bias; batch norm keeps its statistics."""
    return (*head_first(adapt), few_parameters(encoder, adapt, "bitfit", "bias"))


@strategy(
    "norm_tuning",
    "Scale and bias of the norms of the last `adapt.peft_groups` groups; in a convolutional network this is "
    "SSF (arXiv 2210.08823) on frozen statistics.",
)
def norm_tuning(encoder: Encoder, adapt: AdaptSettings) -> Phases:
    """Return the head, then scale and bias of every norm; batch norm keeps its statistics."""
    return (*head_first(adapt), few_parameters(encoder, adapt, "norm_tuning", "norm"))


@strategy(
    "attention_output",
    "The dense layer after the heads of self-attention, in the last `adapt.peft_groups` groups (APLA, arXiv "
    "2503.11335).",
)
def attention_output(encoder: Encoder, adapt: AdaptSettings) -> Phases:
    """Return the head, then the output projection of self-attention.

    Raises:
        UserError: The encoder has no self-attention in these groups.
    """
    chosen = _attention_outputs(encoder, adapt, "attention_output")
    return (*head_first(adapt), phase(adapt, "attention_output", adapt.epochs, chosen))


@strategy(
    "apla",
    "As attention_output, but `adapt.rows.number` rows of each weight alone, drawn once from `adapt.rows.seed` "
    "(APLA, arXiv 2503.11335).",
)
def apla(encoder: Encoder, adapt: AdaptSettings) -> Phases:
    """Return the head, then some rows of the output projection of self-attention.

    Raises:
        UserError: The encoder has no self-attention in these groups.
    """
    chosen = tuple(f"{each}:{ROWS}" for each in _attention_outputs(encoder, adapt, "apla"))
    return (*head_first(adapt), phase(adapt, "apla", adapt.epochs, chosen))


def _attention_outputs(encoder: Encoder, adapt: AdaptSettings, name: str) -> tuple[str, ...]:
    """Return patterns of the output projections of self-attention in the groups of a strategy."""
    groups = peft_groups(encoder, adapt)
    patterns = tuple(f"{group}{_PROJECTION}" for group in groups)
    present = tuple(each for each in patterns if f"{each}/kernel" in encoder.kinds)
    if not present:
        raise UserError(
            f"strategy {name!r} trains the output of self-attention, which {encoder.name} has none "
            f"of in {groups[0]} to {groups[-1]}; expected a transformer such as vit_small, or bitfit, "
            "norm_tuning or lora"
        )
    return present


@strategy(
    "lora",
    "Low-rank updates (arXiv 2106.09685) of the kernels of the last `adapt.peft_groups` groups, merged at the "
    "end.",
)
def lora(encoder: Encoder, adapt: AdaptSettings) -> Phases:
    """Return the head, then low-rank updates of dense layers and of convolutions that are not grouped."""
    groups = peft_groups(encoder, adapt)
    return (*head_first(adapt), phase(adapt, "lora", adapt.epochs, _updates(encoder, groups)))


@strategy(
    "explora",
    "The last `adapt.partial_groups` groups, and low-rank updates in the `adapt.peft_groups` groups below "
    "them (ExPLoRA, arXiv 2406.10973); what lies below those is computed once and cached.",
)
def explora(encoder: Encoder, adapt: AdaptSettings) -> Phases:
    """Return the head, then the last groups whole together with low-rank updates below them.

    Raises:
        UserError: Fewer layer groups lie below the last ones.
    """
    whole = last_groups(encoder, adapt.partial_groups)
    below = encoder.groups[: -len(whole)]
    if adapt.peft_groups > len(below) or not below:
        raise UserError(
            f"adapt.peft_groups is {adapt.peft_groups}; {encoder.name} has {len(below)} layer groups below "
            f"the last {len(whole)} (adapt.partial_groups)"
        )
    updates = _updates(encoder, below[-adapt.peft_groups :] if adapt.peft_groups else below)
    return (*head_first(adapt), phase(adapt, "explora", adapt.epochs, (*updates, *whole)))


def switching(name: str, encoder: Encoder, adapt: AdaptSettings) -> Phases:
    """Return the head, then `adapt.hybrid_epochs` of one strategy, and the rest of `adapt.epochs` of another.

    Args:
        name: Names of two built-in strategies, such as `lora+full`.
        encoder: The encoder.
        adapt: Settings of adaptation.

    Raises:
        UserError: There are not two names, one is unknown or has not one phase after the head, or one of the
            two would have no epoch.
    """
    able = [each for each, entry in STRATEGIES.items() if not entry.cuts and each not in _OF_SEVERAL]
    names = name.split(SWITCH)
    if len(names) != 2 or names[0] == names[1]:
        raise UserError(
            f"strategy {name!r}: expected two different strategies, such as {'lora' + SWITCH + 'full'!r}"
        )
    for each in names:
        if each not in able:
            raise UserError(f"strategy {name!r}: {each!r} is none to switch between; {nearest(each, able)}")
    if not 0 < adapt.hybrid_epochs < adapt.epochs:
        raise UserError(
            f"strategy {name!r}: adapt.hybrid_epochs is {adapt.hybrid_epochs} of {adapt.epochs} epochs "
            f"(adapt.epochs); expected 1 or more for each of both"
        )
    found = list(head_first(adapt))
    for each, epochs in zip(names, (adapt.hybrid_epochs, adapt.epochs - adapt.hybrid_epochs), strict=True):
        own = dataclasses.replace(adapt, epochs=epochs, head_epochs=0)
        found += STRATEGIES[each].phases(encoder, own)
    return tuple(found)


_OF_SEVERAL = ("none", "hybrid", "gradual")
"""Strategies of no phase or of several."""

_OF_KINDS = {LORA: "lora", "norm": "norm_tuning", "bias": "bitfit"}
"""Built-in strategy of a phase by the one kind of its patterns."""


def built_in_like(trained: Sequence[Sequence[str]], encoder: Encoder, is_cut: bool = False) -> str:
    """Return the built-in strategy whose phases train the same kind of parts, or `A+B`; empty where none does.

    Layer groups count where they are the last ones, whole. How many they are is not told.

    Args:
        trained: Patterns of each phase, in order. Phases of the head alone do not count.
        encoder: The encoder that they are of.
        is_cut: Whether it was cut first.

    Example:
        >>> from dapt_jax.models.registry import build
        >>> built_in_like([("head",), ("stage4", "head"), ("*",)], build("resnet18"))
        'hybrid'
    """
    own = [
        [each for each in patterns if each.partition(":")[0].partition("/")[0] != HEAD]
        for patterns in trained
    ]
    try:
        bodies = [_of_phase(patterns, encoder) for patterns in own if patterns]
    except UserError:  # a pattern matches nothing of the encoder
        return ""
    names, sizes = [name for name, _ in bodies], [size for _, size in bodies]
    if not bodies or "" in names:
        return ""
    if is_cut:
        return "simplified" if set(names) == {"full"} else ""
    if len(set(bodies)) == 1:
        return names[0]
    if names == ["partial", "full"]:
        return "hybrid"
    if len(names) == 2 and names[0] != names[1]:
        return SWITCH.join(names)
    is_growing = all(a < b for a, b in itertools.pairwise(sizes))
    return "gradual" if set(names) <= {"partial", "full"} and is_growing else ""


def _of_phase(patterns: Sequence[str], encoder: Encoder) -> tuple[str, int]:
    """Return the built-in strategy of a phase, empty where there is none, and the number of arrays of whole groups."""
    kinds = {each.partition(":")[2] for each in patterns}
    paths = {
        path
        for each in patterns
        if ":" not in each
        for path in select(each, encoder.kinds, encoder.groups, "a strategy:")
    }
    lowest = min((encoder.groups.index(encoder.group_of(path)) for path in paths), default=0)
    top = {path for path in encoder.kinds if encoder.groups.index(encoder.group_of(path)) >= lowest}
    is_projection = all(each.partition(":")[0].endswith(_PROJECTION) for each in patterns)
    found = ""
    if kinds == {""}:
        is_whole, is_top = paths == encoder.kinds.keys(), paths == top
        found = "full" if is_whole else "partial" if is_top else "attention_output" if is_projection else ""
    elif kinds == {"", LORA}:
        found = "explora" if paths == top else ""
    elif kinds == {ROWS}:
        found = "apla" if is_projection else ""
    elif len(kinds) == 1:
        found = _OF_KINDS.get(kinds.pop(), "")
    return found, len(paths)


def few_parameters(encoder: Encoder, adapt: AdaptSettings, name: str, kind: str) -> Phase:
    """Return a phase that trains the head and the parameters of one kind, of all groups or the last ones.

    Frozen batch norm becomes `affine` and layer norm trains, or the phase would not train what it is named
    after.

    Args:
        encoder: The encoder.
        adapt: Settings of adaptation.
        name: Name of the phase.
        kind: Kind of the parameters, one of `patterns.KINDS`.

    Raises:
        UserError: The groups have no parameter of that kind.
    """
    groups = peft_groups(encoder, adapt)
    having = {encoder.group_of(path) for path, each in encoder.kinds.items() if each in KINDS[kind]}
    chosen = tuple(f"{group}/*:{kind}" for group in groups if group in having)
    if not chosen:
        raise UserError(f"strategy {name!r}: no {kind} in {', '.join(groups)} of {encoder.name}")
    own = phase(adapt, name, adapt.epochs, chosen)
    batch_norm = "affine" if adapt.batch_norm == "frozen" else adapt.batch_norm
    return dataclasses.replace(own, batch_norm=batch_norm, layer_norm="train")


def peft_groups(encoder: Encoder, adapt: AdaptSettings) -> tuple[str, ...]:
    """Return the layer groups in which few-parameter strategies train: the last ones, or all.

    Raises:
        UserError: The encoder has fewer layer groups.
    """
    number = adapt.peft_groups or len(encoder.groups)
    if number > len(encoder.groups):
        raise UserError(
            f"adapt.peft_groups is {number}; {encoder.name} has 1 to {len(encoder.groups)} layer groups, and "
            "0 means all"
        )
    return encoder.groups[-number:]


def _updates(encoder: Encoder, groups: tuple[str, ...]) -> tuple[str, ...]:
    """Return patterns of low-rank updates of the groups that have a kernel for one."""
    able = {
        encoder.group_of(path)
        for path, kind in encoder.kinds.items()
        if kind.is_kernel and not kind.is_grouped
    }
    chosen = tuple(f"{group}:{LORA}" for group in groups if group in able)
    if not chosen:
        raise UserError(f"no kernel for low-rank updates in {', '.join(groups)} of {encoder.name}")
    return chosen


def last_groups(encoder: Encoder, number: int) -> tuple[str, ...]:
    """Return the last layer groups of an encoder.

    Raises:
        UserError: The encoder has fewer layer groups.
    """
    if not 0 < number <= len(encoder.groups):
        raise UserError(
            f"adapt.partial_groups is {number}; {encoder.name} has 1 to {len(encoder.groups)} layer groups"
        )
    return encoder.groups[-number:]
