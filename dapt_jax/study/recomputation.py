"""Activations that are computed again instead of kept, chosen so that every phase of a study fits in memory.

A layer group that is recomputed keeps its input alone (Chen et al., arXiv 1604.06174): results are the same, and a
step costs one more forward pass of the group. The lowest groups are taken first: of a convolutional network they hold
most of the activations and cost the least, and of a transformer all are alike.
"""

import bisect
import dataclasses
from collections.abc import Sequence

from dapt_jax.cost import hardware
from dapt_jax.errors import UserError
from dapt_jax.models.encoder import Encoder
from dapt_jax.settings.schema import FIT
from dapt_jax.study import plan
from dapt_jax.study.arms import Study
from dapt_jax.study.strategies import Strategy


def with_fitting_activations(study: Study) -> tuple[Study, str]:
    """Return the study with `model.remat` chosen for the memory of a device, and a line on it.

    Args:
        study: The study; one whose `model.remat` is not `fit` is returned as it is.

    Raises:
        UserError: `fit` beside names of layer groups, or for chips that are not there.
    """
    settings = study.settings
    if FIT not in settings.model.remat:
        return study, ""
    if settings.model.remat != (FIT,) or settings.mode == "aot":
        raise UserError(
            f"model.remat is {', '.join(settings.model.remat)}; expected fit alone, and layer groups or * ahead of "
            "time, whose memory mode=aot shows"
        )
    groups = max((each.encoder.groups for each in study.strategies), key=len, default=())
    room = hardware.device_bytes()

    def is_enough(number: int) -> bool:
        return _peak(_recomputing(study, groups[:number])) <= room

    places = range(len(groups))
    number = 0 if is_enough(0) else bisect.bisect_left(places, True, lo=1, key=is_enough)
    chosen = groups[:number]
    about = f"model.remat: of the largest step, and with {room / 2**30:.1f} GiB of memory,"
    fitting = _recomputing(study, chosen)
    if not chosen:
        return fitting, f"{about} no activations are computed again"
    name = f"{chosen[0]} to {chosen[-1]}" if len(chosen) > 1 else chosen[0]
    line = f"{about} the activations of {name} are computed again"
    if number == len(groups) and not is_enough(number):
        line += (
            ", which is NOT enough: mode=plan says which batch_size to lower, or grad_accum_steps to raise"
        )
    return fitting, line


def _peak(study: Study) -> int:
    """Return the largest planned peak of adaptation and of training on target tasks, in bytes of one device."""
    fsdp, arms = study.settings.runtime.fsdp, study.arms_of(study.settings.seeds[0])
    runs = [run for arm in arms for run in study.runs_of(arm)]
    peaks = [phase.peak_bytes for run in runs for phase in plan.of_run(run, fsdp)]
    peaks += [target.peak_bytes for arm in arms for target in plan.target_memory(study, arm)]
    return max(peaks, default=0)


def _recomputing(study: Study, groups: Sequence[str]) -> Study:
    """Return the study with the activations of some layer groups recomputed, wherever an encoder has them."""
    made: dict[Encoder, Encoder] = {}  # strategies that share an encoder share compiled programs

    def encoder(plain: Encoder) -> Encoder:
        own = [name for name in groups if name in plain.groups]
        if own and plain not in made:
            made[plain] = plain.rematerialised(*own)
        return made.get(plain, plain)

    def strategy(plain: Strategy) -> Strategy:
        before = strategy(plain.before) if plain.before else None
        return dataclasses.replace(plain, encoder=encoder(plain.encoder), before=before)

    settings = study.settings
    model = dataclasses.replace(settings.model, remat=tuple(groups))
    return dataclasses.replace(
        study,
        settings=dataclasses.replace(settings, model=model),
        strategies=tuple(map(strategy, study.strategies)),
        _runs={},
    )
