"""Tables and lines of `mode=plan`: what a study costs, and whether it fits, before it runs."""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from dapt_jax.cost import hardware
from dapt_jax.cost.memory import tree_bytes
from dapt_jax.formatting import number
from dapt_jax.objectives import Objective
from dapt_jax.study import balance, budgets, checkpoint_scores, pace, plan, power, speed
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.workdir import arms_left
from dapt_jax.training import freezing, label_free
from dapt_jax.training import targets as training_targets
from dapt_jax.training.run import TrainingRun


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
    totals = {arm.name: plan.adaptation_flops(study, arm) for arm in arms}
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
        phases, largest = list[plan.PhasePlan](), 0
        if study.corpus_of(arm) is not None:
            runs = study.runs_of(arm)
            planned = [plan.of_run(run, fsdp) for run in runs]
            phases = [phase for each in planned for phase in each]
            largest = min(
                plan.largest_batch(run, each, fsdp) for run, each in zip(runs, planned, strict=True)
            )
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
            for name, said in plan.transfer_approximations(study, arm, task).items():
                line = f"{arm.name}: {task.name} {name} is approximate: {said}"
                console.print(line, soft_wrap=True)
        spent = plan.task_flops(study, arm)
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
    for line in _about_target_memory(study, arms):
        console.print(line, soft_wrap=True)
    for line in budgets.crop_lines(study):
        console.print(line, soft_wrap=True)
    work = plan.work_of(study, left)
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
        if more := plan.checkpoint_flops(study, arm):
            line = f"{arm.name}: the scored checkpoints of a seed go to the target tasks, too: {number(more / 1e12)} TFLOP"
            console.print(f"{line} (checkpoint_scoring.downstream)", soft_wrap=True)
    if line := plan.uncounted(run for arm in arms for run in study.runs_of(arm)):
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
    flops = plan.work_of(study, left)
    return f"{line}left are {', '.join(arm.title for arm in left)}: {number(flops / 1e12)} TFLOP"


def _about_seeds(study: Study, totals: dict[str, int]) -> str:
    """Return a line on the number of adaptations; empty where no strategy adapts."""
    settings = study.settings
    adapting, seeds = sum(flops > 0 for flops in totals.values()), len(settings.seeds)
    if not adapting:
        return ""
    if settings.compute_budget:
        most = sum(map(study.budget_flops, settings.seeds))
        return (
            f"adaptation: {number(most / 1e12)} TFLOP in all at most: with each of {seeds} seeds the strategies that adapt "
            f"compete within {settings.compute_budget:g} of full DAPT (compute_budget), scores included, and one goes on "
            "to the target tasks; the table has each at its own length"
        )
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


def _about_target_memory(study: Study, arms: Sequence[Arm]) -> list[str]:
    """Return a line on every protocol of a target task that trains an encoder or a decoder."""
    lines, of_arms = list[str](), [(arm.name, plan.target_memory(study, arm)) for arm in arms]
    for place in range(len(of_arms[0][1])):
        parts = [(name, found[place]) for name, found in of_arms]
        _, first = parts[0]
        too_large = [name for name, part in parts if part.largest_batch < part.batch_size]
        peak = max(part.peak_bytes for _, part in parts)
        line = f"memory of {first.task} {first.protocol}: {peak / 2**20:,.0f} MiB, "
        if too_large:
            line += (
                f"a batch of {first.batch_size} does NOT fit for {', '.join(too_large)}: lower {first.section}.batch_size, "
                f"split it ({first.section}.grad_accum_steps), or compute activations again (model.remat=fit)"
            )
        else:
            largest = min(part.largest_batch for _, part in parts)
            line += f"a batch of {first.batch_size} fits, and one of {largest:,} at most"
        lines.append(line)
    return lines


def _phase_table(strategy: str, phases: list[plan.PhasePlan]) -> Table:
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
