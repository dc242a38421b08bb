"""Planned cost of a study, equal to the numbers in its later ledger, and the memory that it takes."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

import jax

from dapt_jax.cost import hardware
from dapt_jax.models.classifier import Classifier
from dapt_jax.settings.training import FINETUNE
from dapt_jax.study import balance, segmentation
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.classification import finetune_run, hyper_params, inner_parts, sweep_settings
from dapt_jax.study.runs import classification_loss
from dapt_jax.study.tasks import Task
from dapt_jax.training import accounting, approximations, freezing, head_sweep, linear_head
from dapt_jax.training import targets as training_targets
from dapt_jax.training.cache import store
from dapt_jax.training.cache.policy import CacheDecision
from dapt_jax.training.run import TrainingRun
from dapt_jax.training.steps import PhaseProgram


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """Planned cost of one phase.

    Attributes:
        name: Name of the phase.
        trainable: Number of trainable parameters.
        total: Number of parameters of the model.
        statistics: Number of moving statistics of the model beside these, which some frameworks count too.
        lowest: The lowest layer group that trains.
        steps: Optimizer steps.
        images: Images processed, including repeats.
        flops_per_image: Model FLOPs of one image in one step.
        fill_flops: Model FLOPs of computing frozen prefixes once; 0 if none is cached or an earlier phase
            computes it.
        flops: Model FLOPs of the phase.
        peak_bytes: Estimated peak memory of one device in bytes.
        cache_bytes: Bytes of cached activations.
        place: Tier of the cache; empty without caching.
        why: Reason for caching the prefix, or not.
        head_flops: Of `flops`, those of the head and loss of a label-free objective.
        target_flops: Of `flops`, those of a teacher's outputs.
        approximations: What makes it cheaper at the price of other numbers; empty for nothing.
        about_targets: Where these outputs are cached, or why they are not; empty without a teacher.
        depth: Line on few trained parameters that lie so low that their steps cost nearly full ones; empty
            otherwise.
    """

    name: str
    trainable: int
    total: int
    statistics: int
    lowest: str
    steps: int
    images: int
    flops_per_image: int
    fill_flops: int
    flops: int
    peak_bytes: int
    cache_bytes: int
    place: str
    why: str
    head_flops: int = 0
    target_flops: int = 0
    about_targets: str = ""
    approximations: str = ""
    depth: str = ""


def of_run(run: TrainingRun, fsdp: int = 1) -> list[PhasePlan]:
    """Return the planned phases of a run on the available devices, with the state sharded over `fsdp`."""
    planned = []
    devices = jax.device_count()
    fsdp = fsdp or devices
    size = run.dataset.images.size
    for place, program in enumerate(run.programs):
        decision = run.cache_decision(program)
        shapes, statistics = program.model.abstract()
        images = len(run.train_rows) * program.phase.epochs
        per_image = run.flops_per_image(place)
        fill = run.fill_flops(place)
        targets = run.target_decision(program)
        peak = accounting.peak_bytes(program, size, -(-run.batch_size // devices), fsdp)
        kept = sum(each.bytes for each in (decision, targets) if each.tier == "memory")
        planned.append(
            PhasePlan(
                name=program.phase.name,
                trainable=freezing.count(shapes, program.mask.trainable),
                total=freezing.count(shapes),
                statistics=freezing.count(statistics),
                lowest=program.model.groups[program.mask.boundary],
                steps=run.timeline.steps_per_epoch * program.phase.epochs,
                images=images,
                flops_per_image=per_image,
                fill_flops=fill,
                flops=per_image * images + fill + run.target_fill_flops(place),
                peak_bytes=peak + kept,
                cache_bytes=decision.bytes,
                place=decision.tier,
                why=decision.reason,
                head_flops=accounting.image_cost(program, size).head.model * images,
                target_flops=run.target_flops(place),
                about_targets=_about_targets(program, targets),
                approximations=approximations.of_phase(
                    run, place, is_cached=decision.cached, has_cached_targets=targets.cached
                ),
                depth=_depth_line(run, place),
            )
        )
    return planned


def _about_targets(program: PhaseProgram, decision: CacheDecision) -> str:
    """Return where the targets of a phase come from; empty for a loss without a teacher."""
    if program.self_distillation:
        return "not cached: own moving average"
    if training_targets.teacher_of(program) is None:
        return ""
    return ("cached: " if decision.cached else "not cached: ") + decision.reason


FEW = 0.1
"""Share of the encoder's parameters up to which a phase counts as one of few parameters."""


def _depth_line(run: TrainingRun, number: int) -> str:
    """Return a line on a phase whose few parameters reach below most of the network; empty for others."""
    program = run.programs[number]
    model, boundary = program.model, program.mask.boundary
    if boundary >= len(model.encoder.groups):
        return ""
    shapes, _ = model.encoder.abstract()
    share = freezing.count(shapes, program.mask.trainable) / freezing.count(shapes)
    side = program.side(run.dataset.images.size)
    forward = accounting.forward(model, side, len(model.encoder.groups)).model
    if share > FEW or accounting.forward(model, side, boundary).model > forward / 2:
        return ""
    ratio = run.flops_per_image(number) / (3 * forward)
    return (
        f"{run.tag.strategy}: {program.phase.name} trains {share:.2%} of the encoder from "
        f"{model.groups[boundary]} up, so the backward pass runs down to there and a step costs {ratio:.2f} "
        "of a full one; patterns in the last groups (adapt.peft_groups) leave a prefix to cache"
    )


def largest_batch(run: TrainingRun, phases: list[PhasePlan], fsdp: int = 1) -> int:
    """Return the largest batch over all devices that fits the largest phase; 0 if below one per device."""
    place = max(range(len(phases)), key=lambda number: phases[number].peak_bytes)
    kept = phases[place].cache_bytes if phases[place].place == "memory" else 0
    left = hardware.device_bytes() - kept
    devices = jax.device_count()
    return devices * accounting.largest_batch(
        run.programs[place], run.dataset.images.size, left, fsdp or devices
    )


def uncounted(runs: Iterable[TrainingRun]) -> str:
    """Return a line on operations with unknown FLOPs; empty if all are known."""
    costs = [
        accounting.image_cost(program, run.dataset.images.size) for run in runs for program in run.programs
    ]
    names = sorted({name for cost in costs for name in (*cost.prefix.unknown, *cost.suffix.unknown)})
    return f"FLOPs are a lower bound: not counted are {', '.join(names)}" if names else ""


def adaptation_flops(study: Study, arm: Arm) -> int:
    """Return the model FLOPs of adapting an arm, on its own."""
    clusters = study.settings.adapt.balance_clusters
    return sum(run.flops() + balance.flops(run, clusters) for run in study.runs_of(arm))


def transfer_runs(study: Study, arm: Arm, task: Task) -> dict[str, list[TrainingRun]]:
    """Return the runs, a fold each, of every protocol of a target task that trains an encoder."""
    settings, encoder = study.settings.transfer_of(task.name), arm.strategy.encoder
    if task.is_segmentation:
        return {
            protocol: [run for run, _ in segmentation.fold_runs(study, arm, task, encoder, protocol)]
            for protocol in settings.segmentation.protocols
        }
    if FINETUNE not in settings.protocols:
        return {}
    folds = task.folds(settings.folds, arm.seed)[: settings.finetune.folds]
    return {
        FINETUNE: [
            finetune_run(study, arm, task, encoder, fold, train) for fold, (train, _) in enumerate(folds)
        ]
    }


def transfer_approximations(study: Study, arm: Arm, task: Task) -> dict[str, str]:
    """Return what makes a target task cheaper at the price of other numbers, by protocol or `features`.

    Args:
        study: The study.
        arm: The arm.
        task: The task.
    """
    settings, encoder = study.settings.transfer_of(task.name), arm.strategy.encoder
    if not encoder.options.patch_dropout and study.settings.cache.policy().dtype in ("", "float32"):
        return {}
    found = dict[str, str]()
    if not task.is_segmentation and set(settings.protocols) - {FINETUNE}:
        prefix = store.pooled_prefix(Classifier(encoder, 1, study.settings.model.dtype))
        size, dtype = task.development.images.size, study.settings.cache.policy().dtype
        found["features"] = approximations.of_cache("features", prefix, size, dtype)
    for protocol, (run, *_) in transfer_runs(study, arm, task).items():
        of_phases = [
            approximations.of_phase(run, number, is_cached=run.cache_decision(program).cached)
            for number, program in enumerate(run.programs)
        ]
        found[protocol] = "; ".join(dict.fromkeys(filter(None, of_phases)))
    return {name: said for name, said in found.items() if said}


def transfer_flops(study: Study, arm: Arm, task: Task) -> dict[str, int]:
    """Return the model FLOPs of a target task by protocol; `features` is the pass that all heads share.

    Args:
        study: The study.
        arm: The arm.
        task: The task.
    """
    settings, encoder = study.settings.transfer_of(task.name), arm.strategy.encoder
    costs = {
        protocol: sum(run.flops() for run in runs)
        for protocol, runs in transfer_runs(study, arm, task).items()
    }
    if task.is_segmentation:
        return costs
    model = Classifier(encoder, len(task.development.classes), study.settings.model.dtype)
    folds = task.folds(settings.folds, arm.seed)
    for protocol in settings.protocols:
        if protocol == FINETUNE:
            continue
        passes = (
            accounting.forward(model, dataset.images.size, len(model.encoder.groups)).model * len(dataset)
            for dataset in task.datasets.values()
        )
        costs.setdefault("features", sum(passes))
        loss = classification_loss(task.development, settings.head.loss)
        training = [train for train, _ in folds]
        if protocol not in head_sweep.HIDDEN:
            inner = task.inner_folds(training, len(settings.head.strengths), arm.seed)
            costs[protocol] = linear_head.count_flops(
                len(task.development),
                model.encoder.features,
                loss,
                len(folds),
                len(inner[0]),
                len(settings.head.strengths),
            )
            continue
        sweep, grid = sweep_settings(settings.head, protocol, loss), hyper_params(settings.head)
        rows = sum(map(len, training))
        inner_parts_of = inner_parts(task, training, settings.head, arm.seed)
        rows += len(grid) * sum(len(fit) for parts in inner_parts_of for fit, _ in parts)
        of_head = model.encoder.features, sweep.hidden, loss
        costs[protocol] = rows * sweep.epochs * head_sweep.flops_per_image(*of_head)
        if sweep.early_stopping:
            held = len(grid) * sum(len(rows) for parts in inner_parts_of for _, rows in parts)
            costs[protocol] += held * sweep.epochs * head_sweep.forward_flops(*of_head)
    return costs


def arm_flops(study: Study, arm: Arm) -> int:
    """Return the planned model FLOPs of an arm, adaptation and target tasks: the unit of progress."""
    return adaptation_flops(study, arm) + task_flops(study, arm) + checkpoint_flops(study, arm)


def task_flops(study: Study, arm: Arm) -> int:
    """Return the model FLOPs of all target tasks of one encoder."""
    return sum(sum(transfer_flops(study, arm, task).values()) for task in study.tasks)


def checkpoint_flops(study: Study, arm: Arm) -> int:
    """Return the model FLOPs of the target tasks of an arm's scored checkpoints: see `checkpoint_scoring.downstream`."""
    scoring = study.scoring_plan(arm) if study.settings.checkpoint_scoring.downstream else None
    return len(scoring.epochs) * task_flops(study, arm) if scoring else 0


def work_of(study: Study, arms: Sequence[Arm]) -> int:
    """Return the planned model FLOPs of several arms; the most that they can take under a `compute_budget`.

    Strategies that compete for a budget spend it together, with each seed, and one of them goes on to the target tasks.
    An adaptation that all seeds share (`adapt.seed`) is done with the first of them.
    """
    if not study.settings.compute_budget:
        adapting: Iterable[Arm] = arms
        if study.settings.adapt.has_own_seed:
            left = Counter(arm.name for arm in arms)
            adapting = {arm.name: arm for arm in arms if left[arm.name] == len(study.settings.seeds)}.values()
        of_tasks = sum(task_flops(study, arm) + checkpoint_flops(study, arm) for arm in arms)
        return of_tasks + sum(adaptation_flops(study, arm) for arm in adapting)
    total = sum(arm_flops(study, arm) for arm in arms if not arm.strategy.phases)
    for seed in dict.fromkeys(arm.seed for arm in arms if arm.strategy.phases):
        competing = [arm for arm in arms if arm.seed == seed and arm.strategy.phases]
        total += study.budget_flops(seed)
        total += max(task_flops(study, arm) + checkpoint_flops(study, arm) for arm in competing)
    return total


@dataclasses.dataclass(frozen=True)
class TargetMemory:
    """Memory of training on a target task.

    Attributes:
        task: Name of the task.
        protocol: What trains.
        section: Section of its settings.
        batch_size: Images of a step over all devices.
        peak_bytes: Estimated peak memory of one device in bytes.
        largest_batch: The largest batch over all devices that fits by the same estimate.
    """

    task: str
    protocol: str
    section: str
    batch_size: int
    peak_bytes: int
    largest_batch: int


def target_memory(study: Study, arm: Arm) -> list[TargetMemory]:
    """Return what every protocol of every target task that trains an encoder or a decoder takes.

    Linear heads on features, which are small, are left out. All folds of a protocol take the same.

    Args:
        study: The study.
        arm: The arm.
    """
    found, fsdp = list[TargetMemory](), study.settings.runtime.fsdp
    for task in study.tasks:
        section = "transfer.segmentation" if task.is_segmentation else "transfer.finetune"
        for protocol, (run, *_) in transfer_runs(study, arm, task).items():
            phases = of_run(run, fsdp)
            peak = max(phase.peak_bytes for phase in phases)
            largest = largest_batch(run, phases, fsdp)
            found.append(TargetMemory(task.name, protocol, section, run.batch_size, peak, largest))
    return found
