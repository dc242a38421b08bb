"""A study: strategies x seeds, each adapted and measured on every target task; resumable, one ledger, one report."""

import shutil
import sys
from pathlib import Path
from typing import Any

from dapt_jax import report
from dapt_jax.cost import hardware
from dapt_jax.data import stalls
from dapt_jax.monitoring.heartbeat import Heartbeat
from dapt_jax.monitoring.profiler import PROFILE, Profiler
from dapt_jax.monitoring.progress import Reporter
from dapt_jax.monitoring.writers import open_writers
from dapt_jax.records.ledger import Ledger
from dapt_jax.records.study_records import Records
from dapt_jax.runtime import atomic_files, processes, sharding
from dapt_jax.runtime.preemption import PreemptionHandler, Stopped
from dapt_jax.settings.defaults import BASELINE
from dapt_jax.study import checkpoint_scores, classification, halving, plan
from dapt_jax.study.adapt import ADAPTED, adapt
from dapt_jax.study.prepare import Study, fingerprints, prepare
from dapt_jax.study.strategies import Strategy
from dapt_jax.study.tasks import Arm
from dapt_jax.study.workdir import check_workdir
from dapt_jax.training.cache.policy import Caching
from dapt_jax.training.cache.store import ActivationCache
from dapt_jax.training.context import NonFinitePolicy, RunContext
from dapt_jax.training.recovery import NAN
from dapt_jax.weights import locate

CACHE = "cache"
"""Folder of cached activations in a workdir."""


def run(config: Any, workdir: Path, preemption_handler: PreemptionHandler | None = None) -> None:
    """Runs what is left of a study and writes its report.

    Killed at any moment and started again with the same command, it ends with the same `results.jsonl`.

    Args:
        config: the study's.
        workdir: where its files are, or will be.
        preemption_handler: says when to save and stop; None for never.

    Raises:
        UserError: anything that cannot work, in one line.
        Stopped: by the notice.
    """
    with stalls.told(config.data.stall_s, lambda line: print(line, file=sys.stderr, flush=True)):
        _run(config, workdir, preemption_handler or PreemptionHandler())


def _run(config: Any, workdir: Path, preemption_handler: PreemptionHandler) -> None:
    with processes.barrier_or_raise():
        is_primary = processes.is_primary()
        writers = open_writers(config.watch, workdir, config.name) if is_primary else []
        study = prepare(config)
        total = {
            (strategy.name, seed): _flops(study, strategy, seed)
            for strategy in study.strategies
            for seed in config.seeds
        }
        check_workdir(config, fingerprints(study), workdir)
    atomic_files.write_text(workdir / "weights.txt", study.weights)
    ledger, results_file = Ledger(workdir / "ledger.jsonl"), workdir / "results.jsonl"
    results = processes.broadcast_from_primary(lambda: Records.read(workdir).results)
    heartbeat = Heartbeat(workdir if is_primary else None, writers)
    reporter = Reporter(sum(total.values()), quiet=not is_primary, heartbeat=heartbeat)
    mesh = sharding.make_mesh(fsdp=config.parallel.fsdp)
    context = RunContext(
        checkpoint_every_s=config.checkpoint.every_s,
        ledger=ledger,
        cache=_cache(config, workdir, reporter),
        mesh=mesh,
        hardware=hardware.describe(measure=config.measure_peak, watts=config.energy.watts, pue=config.energy.pue),
        reporter=reporter,
        threads=config.data.threads,
        heartbeat=heartbeat,
        profiler=Profiler(workdir / PROFILE if is_primary else None, config.profile.step, config.profile.steps),
        preemption_handler=preemption_handler,
        non_finite=NonFinitePolicy(config.debug.nan, config.debug.nan_factor, workdir / NAN),
        workdir=workdir,
    )
    ended = "failed"
    if context.hardware.note:
        reporter.say(f"hardware: {context.hardware.note}")
    try:
        for seed in config.seeds:
            if config.transfer.baseline and not _is_done(results, BASELINE, seed):
                for task in study.tasks:
                    results += classification.baseline(config, task, seed, config.transfer.baseline)
                atomic_files.write(results_file, results)
            for strategy, until in _arms_to_evaluate(study, seed, context, workdir):
                heartbeat.arms(*_arms(study, results, strategy.name, seed))
                if _is_done(results, strategy.name, seed):
                    reporter.skip(total[strategy.name, seed])
                    continue
                results += _arm(study, strategy, seed, context, workdir, until)
                atomic_files.write(results_file, results)
                reporter.say(_line(results, strategy.name, seed, study))
        ended = "done"
        heartbeat.arms(*_arms(study, results))
    except Stopped:
        ended = "stopped"
        raise
    finally:
        reporter.close()
        heartbeat.close(ended)
    if not config.cache.dir:
        shutil.rmtree(workdir / CACHE, ignore_errors=True)
    if is_primary:
        report.build(workdir)
        print(f"report: {workdir / 'report.html'}")
    processes.all_reduce_max(0)  # the others wait, since JAX would not wait for long at the end of a process


def _cache(config: Any, workdir: Path, reporter: Reporter) -> ActivationCache:
    """The cache of frozen prefixes: in memory, and on disk where the config says."""
    caching = Caching.of(config.cache)
    folder = Path(config.cache.dir).expanduser() if config.cache.dir else workdir / CACHE
    disk = 0 if caching.mode == "off" else caching.disk_bytes
    return ActivationCache.open(caching.memory_bytes, disk, folder, caching.dtype, reporter.say)


def _arms_to_evaluate(study: Study, seed: int, context: RunContext, workdir: Path) -> list[tuple[Strategy, int]]:
    """The strategies that go to the target tasks, and after how many epochs each has to end (0: none has to)."""
    images = checkpoint_scores.target(study.config, study.tasks)
    adapting = [strategy for strategy in study.strategies if strategy.phases]
    if not study.config.budget or images is None:
        return [(strategy, 0) for strategy in study.strategies]
    outcome = halving.run(study.config, adapting, seed, study.corpora, images, context, workdir)
    still = [(strategy, 0) for strategy in study.strategies if not strategy.phases]
    return still + [(strategy, outcome.epochs) for strategy in adapting if strategy.name == outcome.winner]


def _arm(
    study: Study, strategy: Strategy, seed: int, context: RunContext, workdir: Path, until: int = 0
) -> list[dict[str, Any]]:
    """Adapts by one strategy with one seed, and measures the result on every task."""
    config = study.config
    corpus = study.corpus_of(strategy)
    folder = workdir / "checkpoints" / f"{strategy.name}-seed{seed}"
    if processes.sync_file(folder / ADAPTED):
        context.reporter.skip(plan.dapt_flops(config, strategy, seed, corpus))
    target = checkpoint_scores.target(config, study.tasks)
    adapted = adapt(config, strategy, seed, corpus, context, folder, target, until)
    spec = strategy.weights
    init = spec if spec in (locate.IMAGENET, locate.RANDOM) else Path(spec).name
    arm = Arm(strategy.name, seed, init, strategy.encoder.name)
    rows = [row for task in study.tasks for row in classification.transfer(config, task, arm, adapted, context, folder)]
    if config.score.downstream and corpus is not None:
        rows += checkpoint_scores.measure_scored(config, strategy, seed, corpus, study.tasks, arm, context, folder)
    return rows


def _flops(study: Study, strategy: Strategy, seed: int) -> int:
    """Planned model FLOPs of one arm: the unit in which progress is told."""
    costs = [plan.transfer_flops(study.config, task, strategy, seed) for task in study.tasks]
    return plan.dapt_flops(study.config, strategy, seed, study.corpus_of(strategy)) + sum(
        sum(cost.values()) for cost in costs
    )


def _arms(
    study: Study, results: list[dict[str, Any]], strategy: str = "", seed: int = 0
) -> tuple[list[str], str, list[str]]:
    """Names of the arms that are done, the one under way, and those to come."""
    arms = [(each.name, number) for number in study.config.seeds for each in study.strategies]
    titles = {arm: f"{arm[0]} seed {arm[1]}" for arm in arms}
    done = [arm for arm in arms if _is_done(results, *arm)]
    running = (strategy, seed) if strategy and (strategy, seed) not in done else None
    left = [titles[arm] for arm in arms if arm not in done and arm != running]
    return [titles[arm] for arm in done], titles[running] if running else "", left


def _is_done(results: list[dict[str, Any]], strategy: str, seed: int) -> bool:
    return any(row["strategy"] == strategy and row["seed"] == seed for row in results)


def _line(results: list[dict[str, Any]], strategy: str, seed: int, study: Study) -> str:
    """One finished arm in a line."""
    told = []
    for task in study.tasks:
        report, settings = study.config.report, study.config.transfer
        protocols = settings.segmentation.protocols if task.is_segmentation else settings.protocols
        wanted = {
            "strategy": strategy,
            "seed": seed,
            "task": task.name,
            "protocol": report.protocol if report.protocol in protocols else protocols[0],
        }
        rows = [row for row in results if all(row[key] == value for key, value in wanted.items())]
        metrics = [row["metric"] for row in rows]
        metric = report.metric if report.metric in metrics else next(iter(metrics), report.metric)
        shown = [
            f"{row['split']} {row['value']:.3f}" if row["value"] is not None else f"{row['split']} undefined"
            for row in rows
            if row["metric"] == metric
        ]
        told.append(f"{task.name} {wanted['protocol']} {metric}: {', '.join(shown)}")
    return f"{strategy} seed {seed}: {'; '.join(told)}"
