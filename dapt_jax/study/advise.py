"""`mode=advise`: propose a strategy and a schedule for a budget, with price and evidence; runs nothing."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from dapt_jax.cost import hardware
from dapt_jax.cost.energy import EnergyMeter
from dapt_jax.errors import UserError
from dapt_jax.formatting import number, p_value, percent
from dapt_jax.metrics import METRICS
from dapt_jax.runtime import streams
from dapt_jax.settings import StudySettings
from dapt_jax.statistics import Comparison, holm
from dapt_jax.study import evidence, plan, speed
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.cut_short import cut
from dapt_jax.study.evidence import INSIDE, OUTSIDE, Finding
from dapt_jax.study.tasks import Task
from dapt_jax.training.run import TrainingRun

NONE = "none"
LEVEL = 0.05
"""Level of the test that a strategy is better than none."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A strategy within the budget.

    Attributes:
        name: Name of the strategy.
        flops: Model FLOPs of adaptation and target tasks of one seed, within the budget.
        whole: FLOPs at its own length.
        schedule: Its phases within the budget, in words; empty where nothing is adapted.
        share: FLOPs of adaptation within the budget, as a share of those of full DAPT; 0 where that could not run.
        gain: Difference from `none` in the evidence, with its interval and p; None without evidence.
        found: The evidence.
    """

    name: str
    flops: int
    whole: int
    schedule: str
    share: float
    gain: Comparison | None = None
    found: tuple[Finding, ...] = ()

    @property
    def is_cut(self) -> bool:
        """Whether it is shorter than its own length."""
        return self.flops < self.whole


def chosen(candidates: Sequence[Candidate], margin: float) -> Candidate | None:
    """Return the strategy that the evidence supports; None where there is no evidence.

    Of the strategies shown to be better than `none`, by Holm's method over all with evidence, the cheapest whose
    mean gain is within the margin of the best one's; `none` where no strategy is shown to be better.

    Args:
        candidates: Strategies within the budget, `none` among them.
        margin: Margin in the metric.
    """
    gains = [(each.gain, each) for each in candidates if each.gain is not None]
    if not gains:
        return None
    adjusted = holm([gain.p for gain, _ in gains])
    helping = [
        (gain.difference.mean, each)
        for (gain, each), p in zip(gains, adjusted, strict=True)
        if p is not None and p < LEVEL and gain.difference.mean > 0
    ]
    if not helping:
        return next((each for each in candidates if each.name == NONE), None)
    best = max(gain for gain, _ in helping)
    return min((each for gain, each in helping if gain >= best - margin), key=lambda each: each.flops)


def evidence_for(found: Iterable[Finding], like: Finding) -> list[Finding]:
    """Return the findings of one strategy, task kind, metric, encoder, weights, objective and place, at about its share.

    Of a data set the finding of the nearest share alone, of several that of most seeds, and then the first: arms of one
    study and studies of the same images are no independent evidence.

    Args:
        found: All findings.
        like: What is asked for; its scores are not read.
    """
    keys = ("kind", "encoder", "init", "objective", "strategy", "cut_after", "where", "metric")
    low, high = like.share / evidence.SAME_SHARE, like.share * evidence.SAME_SHARE
    alike = [
        each
        for each in found
        if all(getattr(each, key) == getattr(like, key) for key in keys) and low <= each.share <= high
    ]
    by_data_set: dict[str, Finding] = {}
    for each in sorted(alike, key=lambda each: (abs(math.log(each.share / like.share)), -each.seeds)):
        by_data_set.setdefault(each.data_set, each)
    return list(by_data_set.values())


def candidates(study: Study, task: Task, found: Sequence[Finding], flops: float) -> list[Candidate]:
    """Return the strategies that fit the budget, cut short where they are longer, with their evidence.

    Args:
        study: The study.
        task: The target task that is asked about.
        found: All findings.
        flops: Budget in FLOPs of one seed, all target tasks included.
    """
    settings, seed = study.settings, study.settings.seeds[0]
    full = study.full_flops(seed) if study.has_full_flops(seed) else 0
    where = OUTSIDE if "external" in task.datasets else INSIDE
    listed = []
    for arm in study.arms_of(seed):
        of_tasks = sum(sum(plan.transfer_flops(study, arm, each).values()) for each in study.tasks)
        whole = plan.adaptation_flops(study, arm) + of_tasks
        if of_tasks > flops:
            continue
        if not arm.strategy.phases:
            listed.append(Candidate(arm.name, of_tasks, of_tasks, "", 0.0))
            continue
        if len(arm.strategy.parts) > 1:
            continue
        try:
            run = cut(study.run_of(arm), int(flops) - of_tasks)
        except UserError:
            continue  # not even an epoch of two images fits, or none of images that a phase watches
        share = run.flops() / full if full else 0.0
        is_cut = len(run.model.encoder.groups) < len(settings.model.encoder().groups)
        spec = settings.custom_strategies.get(arm.name)
        like = Finding(
            study="",
            task=task.name,
            data_set="",
            kind="masks" if task.is_segmentation else "classes",
            encoder=settings.model.name,
            init=arm.strategy.weights,
            objective=arm.strategy.objective,
            corpus=len(run.dataset),
            strategy=evidence.resembled(arm.name, spec, arm.strategy.encoder, is_cut),
            cut_after=arm.strategy.encoder.groups[-1] if is_cut else "",
            share=share,
            where=where,
            metric=_metric(settings, task),
            gain=0.0,
            error=0.0,
            seeds=0,
        )
        own = tuple(evidence_for(found, like)) if share and like.strategy else ()
        listed.append(
            Candidate(
                arm.name,
                run.flops() + of_tasks,
                whole,
                _schedule(study, arm, run),
                share,
                evidence.pooled(own),
                own,
            )
        )
    return listed


def _metric(settings: StudySettings, task: Task) -> str:
    """Return the metric by which a task is judged: the study's primary one, or Dice where that is not of masks."""
    metric = settings.report.metric
    return metric if METRICS[metric].of_masks or not task.is_segmentation else "dice"


def _schedule(study: Study, arm: Arm, run: TrainingRun) -> str:
    """Return the phases of a run in words."""
    phases = ", ".join(f"{each.name} {each.epochs} epoch{'s' * (each.epochs != 1)}" for each in run.phases)
    images = len(study.run_of(arm).train_rows)
    if len(run.train_rows) < images:
        return f"{phases}, on {len(run.train_rows):,} of {images:,} images"
    return phases


def budget_flops(settings: StudySettings, study: Study) -> tuple[float, str]:
    """Return the budget in FLOPs, and in words.

    Hours and kWh become FLOPs by the measured speed of this machine, and energy by the published formula.

    Raises:
        UserError: The settings name no budget, or several.
    """
    asked = settings.advise
    given = {name: value for name in ("tflop", "hours", "kwh") if (value := getattr(asked, name)) > 0}
    if len(given) != 1:
        raise UserError(
            f"mode=advise has {len(given)} budgets; expected one for one seed: --config.advise.tflop=5, "
            "--config.advise.hours=0.5 or --config.advise.kwh=0.01"
        )
    ((name, value),) = given.items()
    if name == "tflop":
        return value * 1e12, f"{value:g} TFLOP"
    pace = speed.of_machine(study.strategies[0].encoder.base, settings.model.dtype).flops_per_s
    pace *= speed.at_once()
    hours = value
    if name == "kwh":
        own = settings.energy
        device = hardware.describe(watts=own.watts, memory_gb=own.memory_gb, pue=own.pue)
        hours = value / EnergyMeter(device)(3600.0)
    words = f"{value:g} {'kWh' if name == 'kwh' else 'hours'}"
    return (
        hours * 3600 * pace,
        f"{words}, about {number(hours * 3600 * pace / 1e12)} TFLOP on this machine, give or take a factor of {speed.FACTOR:g}",
    )


def advice(study: Study, found: Sequence[Finding], flops: float, budget: str) -> list[str]:
    """Return the advice for every target task, in lines.

    Args:
        study: The study.
        found: All findings.
        flops: Budget of one seed in FLOPs.
        budget: The budget in words.
    """
    lines = [f"budget for one seed: {budget}"]
    for task in study.tasks:
        listed = candidates(study, task, found, flops)
        if not listed:
            lines.append(f"{task.name}: not even the target task alone fits the budget")
            continue
        lines += _of_task(study, task, listed)
    return lines


def _of_task(study: Study, task: Task, listed: Sequence[Candidate]) -> list[str]:
    where = OUTSIDE if "external" in task.datasets else INSIDE
    place = "on the external set" if where == OUTSIDE else "on images like those of training"
    best = chosen(listed, study.settings.report.margin)
    lines = []
    if best is None:
        kind = "masks" if task.is_segmentation else "classes"
        lines.append(
            f"{task.name}: no evidence. No study of ours has {study.settings.model.name} with these weights, {kind} and "
            f"these strategies at this length {place}; compare them with none in a pilot of three seeds or more"
        )
    elif best.name == NONE:
        lines.append(
            f"{task.name}: use none, the weights as they are ({_price(best)}). No strategy within the budget is shown to "
            f"be better {place}"
        )
        if others := [each for each in listed if each.schedule and each.gain is not None]:
            trial = max(others, key=lambda each: each.gain.difference.mean if each.gain else 0.0)
            lines.append(
                f"  to try beside it: {trial.name} ({trial.schedule}; {_price(trial)}), the largest mean gain, not shown"
            )
    else:
        lines.append(
            f"{task.name}: use {best.name}: {best.schedule}; {_price(best)}. It is the cheapest of those shown to be better "
            f"than none {place}, by Holm's method over all with evidence, whose gain is within "
            f"{study.settings.report.margin:g} of the best"
        )
    used = [finding for each in listed for finding in each.found]
    lines += [
        f"  {each.name}: {each.schedule}; {_price(each)}; {_gain(each)}" for each in listed if each.schedule
    ]
    if used:
        lines.append(f"  rests on {'; '.join(_sources(used))}")
        corpora = [finding.corpus for finding in used if finding.corpus]
        images = len(study.corpora[""])
        lines.append(
            f"  your corpus has {images:,} images, theirs {min(corpora):,} to {max(corpora):,}; none of them is of your "
            "data, so that a pilot of your own outweighs all of it"
        )
    return lines


def _sources(used: Sequence[Finding]) -> list[str]:
    by_study = {(each.study, each.task): each for each in used}
    return [
        f"{study}, task {task} ({each.metric}, {each.seeds} seeds, intervals over seeds alone)"
        for (study, task), each in by_study.items()
    ]


def _price(each: Candidate) -> str:
    price = f"{number(each.flops / 1e12)} TFLOP"
    return f"{price}, cut short from {number(each.whole / 1e12)}" if each.is_cut else price


def _gain(each: Candidate) -> str:
    if each.gain is None or each.gain.difference.low is None:
        return f"no evidence at {percent(each.share)} of full's FLOPs" if each.share else "no evidence"
    number_of, gain = len(each.found), each.gain.difference
    return (
        f"gain over none {gain.mean:+.3f} (95% interval {gain.low:+.3f} to {gain.high:+.3f}, p {p_value(each.gain.p)} not "
        f"adjusted, {number_of} data set{'s' * (number_of != 1)})"
    )


def show(study: Study) -> None:
    """Print the advice for a study that is prepared.

    Raises:
        UserError: There is no target task or no corpus, or not one budget.
    """
    settings = study.settings
    if not study.tasks or "" not in study.corpora:
        raise UserError(
            "mode=advise needs a corpus and a target task, whose sizes set the price; expected config.corpus and "
            "tasks.NAME.development, and a strategy that adapts"
        )
    flops, words = budget_flops(settings, study)
    found = [*evidence.of_folders(settings.advise.records), *evidence.shipped()]
    for line in advice(study, found, flops, words):
        streams.say(line)
