"""A study: strategies x seeds, each adapted and evaluated on every target task."""

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from dapt_jax import report
from dapt_jax.cost import hardware
from dapt_jax.data import stalls
from dapt_jax.monitoring.heartbeat import Heartbeat
from dapt_jax.monitoring.metric_writer import Writer
from dapt_jax.monitoring.profiler import PROFILE, Profiler
from dapt_jax.monitoring.progress import Reporter
from dapt_jax.monitoring.writers import open_writers
from dapt_jax.records import intensities
from dapt_jax.records.ledger import Ledger
from dapt_jax.records.study_records import FEW_SAMPLES, LEAKS, Records
from dapt_jax.records.vocabulary import BASELINE
from dapt_jax.runtime import atomic_files, home, lock, processes, sharding, streams
from dapt_jax.runtime.preemption import PreemptionHandler, Stopped
from dapt_jax.settings import StudySettings
from dapt_jax.study import budgets, checkpoint_scores, classification, halving, plan, samples, target_models
from dapt_jax.study.adapt import adapt
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.prepare import prepare
from dapt_jax.study.tasks import ResultRow, Task
from dapt_jax.study.workdir import claim
from dapt_jax.training.cache.store import ActivationCache
from dapt_jax.training.context import RunContext
from dapt_jax.training.recovery import NAN

CACHE = "cache"
"""Folder of cached activations in a workdir."""


def run(settings: StudySettings, workdir: Path, preemption_handler: PreemptionHandler | None = None) -> None:
    """Run the remaining arms of a study, and write its report.

    Killed at any moment and started again with the same command, it ends with the same `results.jsonl`.

    Args:
        settings: Settings of the study.
        workdir: Folder of its files.
        preemption_handler: Says when to save and stop; None for never.

    Raises:
        UserError: The study cannot run; one line gives the reason.
        Stopped: The preemption handler has received a signal.
    """
    with _prepared(settings, workdir, preemption_handler or PreemptionHandler()) as (study, context, results):
        for seed in settings.seeds:
            if settings.transfer.baseline and not results.has(BASELINE, seed):
                results.add(
                    [row for task in study.tasks for row in classification.baseline(settings, task, seed)]
                )
            for arm, max_epochs in _arms_to_evaluate(study, seed, context):
                context.heartbeat.arms(*results.progress(study, arm))
                if results.has(arm.name, seed):
                    context.reporter.skip(results.planned_flops[arm.title])
                    continue
                adapted = adapt(study, arm, context, max_epochs)
                rows = [
                    row
                    for task in study.tasks
                    for row in classification.transfer(study, arm, task, adapted, context)
                ]
                if settings.checkpoint_scoring.downstream and study.corpus_of(arm) is not None:
                    rows += checkpoint_scores.measure_scored(study, arm, context)
                results.add(rows)
                if not study.tasks:
                    results.finished.add((arm.name, arm.seed))
                context.reporter.reach(results.planned_done(study))
                context.reporter.say(results.line(study, arm))
        context.heartbeat.arms(*results.progress(study))
        context.reporter.reach(context.reporter.total)
    if not settings.cache.dir:
        shutil.rmtree(workdir / CACHE, ignore_errors=True)
    if processes.is_primary():
        for folder in target_models.finish(study, workdir):
            streams.say(f"target models: {folder}")
        report.build(workdir)
        streams.say(f"report: {workdir / 'report.html'}")
    processes.all_reduce_max(0)  # the others wait, since JAX would not wait for long at the end of a process


@contextlib.contextmanager
def _prepared(
    settings: StudySettings, workdir: Path, preemption_handler: PreemptionHandler
) -> Iterator[tuple[Study, RunContext, "Results"]]:
    """Read and check a study, yield the environment of its runs, and record its final status."""
    is_primary = processes.is_primary()
    settings = budgets.resolved(settings, workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(stalls.told(settings.data.stall_s, _to_stderr))
        with processes.barrier_or_raise():
            if is_primary:
                stack.enter_context(lock.held(lock.LocalLockFile(workdir), str(workdir), _to_stderr))
            writers = _writers(settings, workdir) if is_primary else []
            study = prepare(settings)
            settings = study.settings
            planned_flops = {arm.title: plan.arm_flops(study, arm) for arm in study.arms}
            claim(study, workdir)
        intensities.write(workdir, study.intensities())
        if is_primary:
            samples.write_sheets(study, workdir)
        atomic_files.write_text(workdir / FEW_SAMPLES, json.dumps(study.few_samples(), indent=1) + "\n")
        if study.marks:
            atomic_files.write_text(workdir / LEAKS, json.dumps(study.marks, indent=1) + "\n")
        results = Results(workdir, planned_flops)
        heartbeat = Heartbeat(workdir if is_primary else None, writers)
        reporter = Reporter(sum(planned_flops.values()), quiet=not is_primary, heartbeat=heartbeat)
        context = _context(settings, workdir, reporter, heartbeat, preemption_handler)
        ended = "failed"
        if context.hardware.note:
            reporter.say(f"hardware: {context.hardware.note}")
        try:
            yield study, context, results
            ended = "done"
        except Stopped:
            ended = "stopped"
            raise
        finally:
            reporter.close()
            heartbeat.close(ended)


def _to_stderr(line: str) -> None:
    streams.say(line, sys.stderr)


def _writers(settings: StudySettings, workdir: Path) -> list[Writer]:
    chosen = settings.monitoring
    return open_writers(
        workdir,
        settings.name,
        tensorboard=chosen.tensorboard,
        wandb=chosen.wandb,
        prometheus=chosen.prometheus,
    )


def _context(
    settings: StudySettings,
    workdir: Path,
    reporter: Reporter,
    heartbeat: Heartbeat,
    preemption_handler: PreemptionHandler,
) -> RunContext:
    """Return the environment of a study's runs."""
    runtime, monitoring = settings.runtime, settings.monitoring
    mesh = sharding.make_mesh(fsdp=runtime.fsdp)
    caching, directory = settings.cache.policy(), settings.cache.dir
    return RunContext(
        checkpoint_every_s=runtime.checkpoint_every_s,
        ledger=Ledger(workdir / "ledger.jsonl"),
        cache=ActivationCache.open(
            caching.memory_bytes,
            0 if caching.mode == "off" else caching.disk_bytes,
            home.expanded(directory) if directory else workdir / CACHE,
            caching.dtype,
            reporter.say,
        ),
        mesh=mesh,
        hardware=hardware.describe(
            measure=runtime.measure_peak,
            watts=settings.energy.watts,
            pue=settings.energy.pue,
            memory_gb=settings.energy.memory_gb,
        ),
        reporter=reporter,
        threads=settings.data.threads,
        heartbeat=heartbeat,
        profiler=Profiler(
            workdir / PROFILE if processes.is_primary() else None,
            monitoring.profile_step,
            monitoring.profile_steps,
        ),
        preemption_handler=preemption_handler,
        non_finite=dataclasses.replace(settings.non_finite, folder=workdir / NAN),
        workdir=workdir,
    )


def _arms_to_evaluate(study: Study, seed: int, context: RunContext) -> list[tuple[Arm, int]]:
    """Return the arms that go to the target tasks, each with its largest number of epochs (0: no limit)."""
    arms = study.arms_of(seed)
    if not study.settings.compute_budget:
        return [(arm, 0) for arm in arms]
    outcome = halving.run(study, seed, context)
    return [(arm, 0) for arm in arms if not arm.strategy.phases] + [
        (arm, outcome.epochs) for arm in arms if arm.name == outcome.winner and arm.strategy.phases
    ]


class Results:
    """The lines of a study's `results.jsonl`, the same in all processes.

    Attributes:
        planned_flops: Planned model FLOPs of each arm by its title.
        finished: Arms, by name and seed, of a study without target tasks that are finished.
    """

    def __init__(self, workdir: Path, planned_flops: dict[str, int]):
        """Read the lines of an earlier start.

        Args:
            workdir: Folder of the study.
            planned_flops: Planned model FLOPs of each arm by its title.
        """
        self.planned_flops = planned_flops
        self.finished: set[tuple[str, int]] = set()
        self._file = workdir / "results.jsonl"
        self._rows: list[ResultRow] = processes.broadcast_from_primary(lambda: Records.read(workdir).results)

    def has(self, strategy: str, seed: int) -> bool:
        """Return whether an arm, by its name and seed, is finished."""
        return (strategy, seed) in self.finished or any(
            row["strategy"] == strategy and row["seed"] == seed for row in self._rows
        )

    def add(self, rows: list[ResultRow]) -> None:
        """Add the lines of an arm, and write all."""
        self._rows += rows
        atomic_files.write(self._file, self._rows)

    def planned_done(self, study: Study) -> int:
        """Return the planned model FLOPs of the finished arms."""
        return sum(self.planned_flops[arm.title] for arm in study.arms if self.has(arm.name, arm.seed))

    def progress(self, study: Study, running: Arm | None = None) -> tuple[list[str], str, list[str]]:
        """Return the names of finished, running and pending arms."""
        done = [arm.title for arm in study.arms if self.has(arm.name, arm.seed)]
        under_way = running.title if running and running.title not in done else ""
        left = [arm for arm in study.arms if arm.title not in (*done, under_way)]
        if study.settings.compute_budget:  # of those that competed with a seed, one has gone on
            adapting = [arm for arm in study.arms if arm.strategy.phases]
            decided = {arm.seed for arm in adapting if arm.title in (*done, under_way)}
            left = [arm for arm in left if not (arm.strategy.phases and arm.seed in decided)]
        return done, under_way, [arm.title for arm in left]

    def line(self, study: Study, arm: Arm) -> str:
        """Return one finished arm in a line."""
        if not study.tasks:
            kept = ", ".join(map(str, sorted(study.kept_epochs(arm))))
            return f"{arm.title}: adapted" + (f"; kept epochs {kept}" if kept else "")
        return f"{arm.title}: {'; '.join(self._of_task(study, arm, task) for task in study.tasks)}"

    def _of_task(self, study: Study, arm: Arm, task: Task) -> str:
        shown, transfer = study.settings.report, study.settings.transfer_of(task.name)
        protocols = transfer.segmentation.protocols if task.is_segmentation else transfer.protocols
        protocol = shown.protocol if shown.protocol in protocols else protocols[0]
        wanted = {"strategy": arm.name, "seed": arm.seed, "task": task.name, "protocol": protocol}
        rows = [row for row in self._rows if all(row[key] == value for key, value in wanted.items())]
        metrics = [row["metric"] for row in rows]
        metric = shown.metric if shown.metric in metrics else next(iter(metrics), shown.metric)
        values = [
            f"{row['split']} {row['value']:.3f}" if row["value"] is not None else f"{row['split']} undefined"
            for row in rows
            if row["metric"] == metric
        ]
        return f"{task.name} {protocol} {metric}: {', '.join(values)}"
