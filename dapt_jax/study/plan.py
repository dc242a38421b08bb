"""Planned cost of a study, equal to the numbers in its later ledger."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from dapt_jax.cost import hardware
from dapt_jax.cost.memory import tree_bytes
from dapt_jax.formatting import number
from dapt_jax.models.classifier import Classifier
from dapt_jax.objectives import Objective
from dapt_jax.settings.training import FINETUNE
from dapt_jax.study import balance, budgets, checkpoint_scores, pace, power, segmentation, speed
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.classification import finetune_run, hyper_params, inner_parts, sweep_settings
from dapt_jax.study.runs import classification_loss
from dapt_jax.study.tasks import Task
from dapt_jax.study.workdir import arms_left
from dapt_jax.training import accounting, approximations, freezing, head_sweep, label_free, linear_head
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


def _transfer_runs(study: Study, arm: Arm, task: Task) -> dict[str, list[TrainingRun]]:
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
    for protocol, (run, *_) in _transfer_runs(study, arm, task).items():
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
        for protocol, runs in _transfer_runs(study, arm, task).items()
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
    of_tasks = sum(sum(transfer_flops(study, arm, task).values()) for task in study.tasks)
    return adaptation_flops(study, arm) + of_tasks


def show(study: Study, workdir: Path | None = None) -> None:
    """Print a table for each strategy that is left to run, and the comparison with full DAPT.

    Args:
        study: The study.
        workdir: Folder whose finished arms are left out; None to count all.

    Raises:
        UserError: The workdir holds another study.
    """
    console = Console(width=None if Console().is_terminal else 150, markup=False, emoji=False)
    settings = study.settings
    left = arms_left(study, workdir) if workdir else study.arms
    first = {arm.name: arm for arm in reversed(left)}
    arms = tuple(first[strategy.name] for strategy in study.strategies if strategy.name in first)
    if len(left) < len(study.arms):
        console.print(_about_left(study, left, workdir), soft_wrap=True, markup=False)
    if not left:
        return
    totals = {arm.name: adaptation_flops(study, arm) for arm in arms}
    full = totals.get("full", 0)
    if not full and study.has_full_flops(settings.seeds[0]):
        full = study.full_flops(settings.seeds[0])
    overview = Table(
        title=f"{settings.title or settings.name}: one seed of each strategy"
        f"{' that is left' if len(left) < len(study.arms) else ''}; the study has {len(settings.seeds)}"
    )
    for column in (
        "strategy",
        "trainable",
        "total",
        "images",
        "steps",
        "DAPT TFLOP",
        "of full",
        "transfer TFLOP",
        "peak MiB",
        "largest batch",
    ):
        overview.add_column(column, justify="left" if column == "strategy" else "right")
    too_large: list[str] = []
    depths: list[str] = []
    fsdp = settings.runtime.fsdp
    for arm in arms:
        phases, largest = list[PhasePlan](), 0
        if study.corpus_of(arm) is not None:
            runs = study.runs_of(arm)
            planned = [of_run(run, fsdp) for run in runs]
            phases = [phase for each in planned for phase in each]
            largest = min(largest_batch(run, each, fsdp) for run, each in zip(runs, planned, strict=True))
            too_large += [arm.name] if largest < settings.adapt.batch_size else []
            console.print(_phase_table(arm.name, phases))
            for phase in phases:
                if phase.approximations:
                    line = f"{arm.name}: {phase.name} is approximate: {phase.approximations}"
                    console.print(line, soft_wrap=True)
            for line in filter(
                None, [label_free.warning(arm.name, runs[0].programs[0]), *map(views_line, runs)]
            ):
                console.print(line, soft_wrap=True)
            if statistics := phases[-1].statistics:
                whole = phases[-1].total + statistics
                print(f"parameters: {whole:,} with the {statistics:,} moving statistics of {arm.name}")
            depths += [phase.depth for phase in phases if phase.depth]
        for task in study.tasks:
            for name, said in transfer_approximations(study, arm, task).items():
                line = f"{arm.name}: {task.name} {name} is approximate: {said}"
                console.print(line, soft_wrap=True)
        spent = sum(sum(transfer_flops(study, arm, task).values()) for task in study.tasks)
        shapes, _ = arm.strategy.encoder.abstract()
        overview.add_row(
            arm.name,
            f"{phases[-1].trainable:,}" if phases else "0",
            f"{phases[-1].total:,}" if phases else f"{freezing.count(shapes):,}",
            f"{sum(phase.images for phase in phases):,}",
            f"{sum(phase.steps for phase in phases):,}",
            number(totals[arm.name] / 1e12),
            f"{totals[arm.name] / full:.3f}" if full else "-",
            number(spent / 1e12),
            f"{max((phase.peak_bytes for phase in phases), default=0) / 2**20:.0f}",
            f"{largest:,}" if phases else "-",
        )
    console.print(overview)
    if line := _about_seeds(study, totals):
        console.print(line, soft_wrap=True)
    kinds = [(task.name, task.is_segmentation) for task in study.tasks]
    report, seeds = settings.report, len(settings.seeds)
    for line in power.lines(settings.plan.records, workdir, kinds, report.margin, report.metric, seeds):
        console.print(line, soft_wrap=True)
    console.print(_about_memory(settings.adapt.batch_size, too_large), soft_wrap=True)
    for line in budgets.crop_lines(study):
        console.print(line, soft_wrap=True)
    work = sum(arm_flops(study, arm) for arm in left)
    encoder = study.strategies[0].encoder.base
    console.print(speed.line(work, encoder, settings.model.dtype, time.time()), soft_wrap=True)
    if line := pace.line(settings.plan.records, settings.model.name, work):
        console.print(line, soft_wrap=True)
    for line in depths:
        console.print(line, soft_wrap=True)
    clusters = settings.adapt.balance_clusters
    for line in [balance.line(run, clusters) for arm in arms for run in study.runs_of(arm)]:
        if line:
            console.print(line, soft_wrap=True)
    for arm in arms:
        if line := checkpoint_scores.score_cost_line(study, arm):
            console.print(line, soft_wrap=True)
    if line := uncounted(run for arm in arms for run in study.runs_of(arm)):
        console.print(line, soft_wrap=True)
    console.print(
        "FLOPs: a multiply-accumulate is 2; what is frozen is not counted because it is not computed; "
        "evaluation is "
        "not included. Each strategy is counted as if it ran alone; in the study, a prefix that two arms "
        "share is "
        "computed once.",
        soft_wrap=True,
    )


def views_line(run: TrainingRun) -> str:
    """Return how many fixed views of every image the cache holds for a label-free run; else empty."""
    if not isinstance(run.loss, Objective):
        return ""
    size, caching = run.dataset.images.size, run.caching
    per_view = max(
        sum(tree_bytes(each.shapes(size, caching.dtype)) for each in training_targets.cacheable(program))
        for program in run.programs
    ) * len(run.dataset)
    if not per_view:
        return ""
    memory, disk = caching.memory_bytes // per_view, caching.disk_bytes // per_view
    return (
        f"fixed views: each takes {per_view / 2**20:,.1f} MiB of cache; adapt.num_fixed_views up to {memory} fits "
        f"in memory (cache.memory_mb), up to {max(memory, disk)} on disk (cache.disk_mb)"
    )


def _about_left(study: Study, left: Sequence[Arm], workdir: Path | None) -> str:
    """Return a line on the arms without results in a workdir."""
    line = f"{workdir}: {len(study.arms) - len(left)} of {len(study.arms)} arms are done; "
    if not left:
        return f"{line}nothing is left"
    flops = sum(arm_flops(study, arm) for arm in left)
    return f"{line}left are {', '.join(arm.title for arm in left)}: {number(flops / 1e12)} TFLOP"


def _about_seeds(study: Study, totals: dict[str, int]) -> str:
    """Return a line on the number of adaptations; empty where no strategy adapts."""
    settings = study.settings
    adapting, seeds = sum(flops > 0 for flops in totals.values()), len(settings.seeds)
    if not adapting:
        return ""
    per_seed = sum(totals.values())
    runs = adapting * len(settings.adaptation_seeds)
    line = f"adaptation: {runs} in all, {number(per_seed * len(settings.adaptation_seeds) / 1e12)} TFLOP"
    if settings.adapt.has_own_seed:
        saved = per_seed * (seeds - 1) / 1e12
        return (
            f"{line}: each strategy once, with seed {settings.adapt.seed}, for {seeds} seeds of the target "
            f"tasks ({number(saved)} TFLOP less than one per seed)"
        )
    return f"{line}: each strategy with each of {seeds} seeds (adapt.seed shares one among them)"


def _about_memory(batch_size: int, too_large: list[str]) -> str:
    """Return a line on the batch size that fits."""
    devices, available = jax.device_count(), hardware.device_bytes()
    of = f"of {devices} devices" if devices > 1 else "of the device"
    line = f"memory: peak and largest batch are estimates for {available / 2**30:.1f} GiB {of}; "
    if too_large:
        return (
            f"{line}a batch of {batch_size} does NOT fit for {', '.join(too_large)}: split it "
            "(adapt.grad_accum_steps), shard the state (runtime.fsdp), or compute activations again "
            "(model.remat=fit)"
        )
    return f"{line}a batch of {batch_size} fits for every strategy"


def _phase_table(strategy: str, phases: list[PhasePlan]) -> Table:
    table = Table(title=strategy, title_justify="left")
    table.add_column("phase")
    for column in (
        "lowest trained",
        "trainable",
        "total",
        "images",
        "steps",
        "MFLOP/image",
        "prefix TFLOP",
        "TFLOP",
        "peak MiB",
    ):
        table.add_column(column, justify="right")
    is_label_free = any(phase.head_flops for phase in phases)
    for column in ("heads TFLOP", "targets TFLOP") if is_label_free else ():
        table.add_column(column, justify="right")
    table.add_column("frozen prefix")
    if is_label_free:
        table.add_column("targets")
    for phase in phases:
        table.add_row(
            phase.name,
            phase.lowest,
            f"{phase.trainable:,}",
            f"{phase.total:,}",
            f"{phase.images:,}",
            f"{phase.steps:,}",
            f"{phase.flops_per_image / 1e6:,.2f}",
            number(phase.fill_flops / 1e12),
            number(phase.flops / 1e12),
            f"{phase.peak_bytes / 2**20:.0f}",
            *(
                [number(each / 1e12) for each in (phase.head_flops, phase.target_flops)]
                if is_label_free
                else []
            ),
            ("cached: " if phase.place else "not cached: ") + phase.why,
            *([phase.about_targets or "none"] if is_label_free else []),
        )
    return table
