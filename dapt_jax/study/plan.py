"""What a study would cost, before it runs: the same numbers that its ledger will hold."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from dapt_jax.cost import hardware
from dapt_jax.data.dataset import Dataset
from dapt_jax.models.classifier import Classifier
from dapt_jax.report.tables import number
from dapt_jax.study import checkpoint_scores, halving, segmentation
from dapt_jax.study.adapt import dapt_run, objective_for
from dapt_jax.study.classification import FINETUNE, finetune_run, head_points, head_settings
from dapt_jax.study.strategies import Strategy
from dapt_jax.study.tasks import Arm, Task
from dapt_jax.training import accounting, freezing, head_sweep
from dapt_jax.training.run import TrainingRun


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """What one phase would cost.

    Attributes:
        name: of the phase.
        trainable: parameters that train.
        total: parameters of the model.
        steps: optimizer steps.
        images: gone through, repeats counted.
        flops_per_image: model FLOPs of one image in one step.
        fill_flops: model FLOPs of computing frozen prefixes once; 0 where none is cached or an earlier phase did it.
        flops: model FLOPs of the phase.
        peak_bytes: estimate of peak memory of one device.
        cache_bytes: activations kept.
        place: where they are kept; empty where they are not.
        why: why the prefix is cached, or not.
    """

    name: str
    trainable: int
    total: int
    steps: int
    images: int
    flops_per_image: int
    fill_flops: int
    flops: int
    peak_bytes: int
    cache_bytes: int
    place: str
    why: str


def of_run(run: TrainingRun, fsdp: int = 1) -> list[PhasePlan]:
    """The phases of a run on the devices that there are, each copy of the model's state spread over `fsdp` of them."""
    planned = []
    devices = jax.device_count()
    fsdp = fsdp or devices
    size = run.dataset.images.size
    for place, program in enumerate(run.programs):
        decision = run.cache_decision(program)
        shapes, _ = program.model.abstract()
        images = len(run.train_rows) * program.phase.epochs
        per_image = run.flops_per_image(place)
        fill = run.fill_flops(place)
        peak = accounting.peak_bytes(program, size, -(-run.batch_size // devices), fsdp)
        kept = decision.bytes if decision.tier == "memory" else 0
        planned.append(
            PhasePlan(
                name=program.phase.name,
                trainable=freezing.count(shapes, program.mask.trainable),
                total=freezing.count(shapes),
                steps=run.timeline.steps_per_epoch * program.phase.epochs,
                images=images,
                flops_per_image=per_image,
                fill_flops=fill,
                flops=per_image * images + fill,
                peak_bytes=peak + kept,
                cache_bytes=decision.bytes,
                place=decision.tier,
                why=decision.reason,
            )
        )
    return planned


def largest_batch(run: TrainingRun, phases: list[PhasePlan], fsdp: int = 1) -> int:
    """Images of a step, over all devices, that there is memory for in the phase that takes most; 0 for not even one on each."""
    place = max(range(len(phases)), key=lambda number: phases[number].peak_bytes)
    kept = phases[place].cache_bytes if phases[place].place == "memory" else 0
    left = hardware.device_bytes() - kept
    devices = jax.device_count()
    return devices * accounting.largest_batch(run.programs[place], run.dataset.images.size, left, fsdp or devices)


def uncounted(runs: Iterable[TrainingRun]) -> str:
    """A line that names the operations whose FLOPs are not known, or nothing where all are."""
    costs = [accounting.image_cost(program, run.dataset.images.size) for run in runs for program in run.programs]
    names = sorted({name for cost in costs for name in (*cost.prefix.unknown, *cost.suffix.unknown)})
    return f"FLOPs are a lower bound: not counted are {', '.join(names)}" if names else ""


def dapt_flops(config: Any, strategy: Strategy, seed: int, corpus: Dataset | None) -> int:
    """Model FLOPs of adapting by one strategy, on its own."""
    if not strategy.phases or corpus is None:
        return 0
    return dapt_run(config, strategy, seed, corpus).flops()


def transfer_flops(config: Any, task: Task, strategy: Strategy, seed: int) -> dict[str, int]:
    """Model FLOPs of a target task by protocol; `features` stands for the pass that all heads share."""
    arm = Arm(strategy.name, seed, "", "")
    if task.is_segmentation:
        return {
            protocol: sum(run.flops() for run, _ in segmentation.runs(config, task, arm, strategy.encoder, protocol))
            for protocol in config.transfer.segmentation.protocols
        }
    model = Classifier(strategy.encoder, len(task.development.classes), config.model.dtype)
    size = task.development.images.size
    images = sum(len(dataset) for dataset in task.datasets.values())
    folds = task.folds(config.transfer.folds, seed)
    costs: dict[str, int] = {}
    objective = objective_for(task.development, config.transfer.head)
    for protocol in config.transfer.protocols:
        if protocol == FINETUNE:
            runs = [
                finetune_run(config, task, arm, strategy.encoder, fold, train)
                for fold, (train, _) in enumerate(folds[: config.transfer.finetune.folds])
            ]
            costs[protocol] = sum(run.flops() for run in runs)
            continue
        costs.setdefault("features", accounting.forward(model, size, len(model.encoder.groups)).model * images)
        settings = head_settings(config, protocol, objective)
        points = head_points(config)
        rows = sum(len(train) for train, _ in folds)
        if len(points) > 1:
            rows += len(points) * sum(
                len(task.inner(train, config.transfer.head.grid.val_fraction, seed)[0]) for train, _ in folds
            )
        costs[protocol] = (
            rows * settings.epochs * head_sweep.flops_per_image(model.encoder.features, settings.hidden, objective)
        )
    return costs


def show(config: Any, strategies: list[Strategy], corpora: Mapping[str, Dataset], tasks: list[Task]) -> None:
    """Prints a table per strategy and the comparison with full DAPT."""
    console = Console(width=None if Console().is_terminal else 150)
    seed = config.seeds[0]
    corpus_of = {strategy.name: corpora.get(strategy.corpus) for strategy in strategies}
    totals = {each.name: dapt_flops(config, each, seed, corpus_of[each.name]) for each in strategies}
    full = totals.get("full", 0)
    if not full and "" in corpora:
        full = halving.full_flops(config, seed, corpora[""])
    overview = Table(
        title=f"{config.title or config.name}: one seed of each strategy; the study has {len(config.seeds)}"
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
    lacking: list[str] = []
    for strategy in strategies:
        corpus = corpus_of[strategy.name]
        phases, largest = list[PhasePlan](), 0
        if corpus is not None and strategy.phases:
            run = dapt_run(config, strategy, seed, corpus)
            phases = of_run(run, config.parallel.fsdp)
            largest = largest_batch(run, phases, config.parallel.fsdp)
            lacking += [strategy.name] if largest < run.batch_size else []
            console.print(_phase_table(strategy.name, phases))
        spent = sum(sum(transfer_flops(config, task, strategy, seed).values()) for task in tasks)
        shapes, _ = strategy.encoder.abstract()
        overview.add_row(
            strategy.name,
            f"{phases[-1].trainable:,}" if phases else "0",
            f"{phases[-1].total:,}" if phases else f"{freezing.count(shapes):,}",
            f"{sum(phase.images for phase in phases):,}",
            f"{sum(phase.steps for phase in phases):,}",
            number(totals[strategy.name] / 1e12),
            f"{totals[strategy.name] / full:.3f}" if full else "-",
            number(spent / 1e12),
            f"{max((phase.peak_bytes for phase in phases), default=0) / 2**20:.0f}",
            f"{largest:,}" if phases else "-",
        )
    console.print(overview)
    console.print(_about_memory(config.adapt.batch_size, lacking), soft_wrap=True)
    target = checkpoint_scores.target(config, tasks)
    for strategy in strategies:
        if line := checkpoint_scores.score_cost_line(config, strategy, seed, corpus_of[strategy.name], target):
            console.print(line, soft_wrap=True)
    adapting = [dapt_run(config, each, seed, corpora[each.corpus]) for each in strategies if each.phases]
    if line := uncounted(adapting):
        console.print(line, soft_wrap=True)
    console.print(
        "FLOPs: a multiply-accumulate is 2; what is frozen is not counted because it is not computed; evaluation is "
        "not included. Each strategy is counted as if it ran alone; in the study, a prefix that two arms share is "
        "computed once.",
        soft_wrap=True,
    )


def _about_memory(batch_size: int, lacking: list[str]) -> str:
    """What fits, in a line."""
    devices, available = jax.device_count(), hardware.device_bytes()
    of = f"of {devices} devices" if devices > 1 else "of the device"
    line = f"memory: peak and largest batch are estimates for {available / 2**30:.1f} GiB {of}; "
    if lacking:
        return (
            f"{line}a batch of {batch_size} does NOT fit for {', '.join(lacking)}: cut it (adapt.accumulate), spread the state "
            "(parallel.fsdp), or compute activations again (model.remat)"
        )
    return f"{line}a batch of {batch_size} fits for every strategy"


def _phase_table(strategy: str, phases: list[PhasePlan]) -> Table:
    table = Table(title=strategy, title_justify="left")
    table.add_column("phase")
    for column in ("trainable", "total", "images", "steps", "MFLOP/image", "prefix TFLOP", "TFLOP", "peak MiB"):
        table.add_column(column, justify="right")
    table.add_column("frozen prefix")
    for phase in phases:
        table.add_row(
            phase.name,
            f"{phase.trainable:,}",
            f"{phase.total:,}",
            f"{phase.images:,}",
            f"{phase.steps:,}",
            f"{phase.flops_per_image / 1e6:,.2f}",
            number(phase.fill_flops / 1e12),
            number(phase.flops / 1e12),
            f"{phase.peak_bytes / 2**20:.0f}",
            ("cached: " if phase.place else "not cached: ") + phase.why,
        )
    return table
