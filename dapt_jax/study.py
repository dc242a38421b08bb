"""A study: strategies x seeds, each adapted and measured on every target task; resumable, one ledger, one report."""

import contextlib
import dataclasses
import itertools
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dapt_jax import (
    checks,
    halving,
    jsonl,
    leaks,
    parallel,
    plan,
    processes,
    report,
    scoring,
    segmentation,
    storage,
    transfer,
)
from dapt_jax import strategies as named
from dapt_jax.adapt import ADAPTED, VAL_FRACTION, adapt, corpus_settings, dapt_run
from dapt_jax.claim import claim
from dapt_jax.config import BASELINE, SPLITS
from dapt_jax.cost import hardware
from dapt_jax.cost.ledger import Ledger
from dapt_jax.data import sources, stalls
from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError, nearest
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Tree
from dapt_jax.preemption import Notice, Stopped
from dapt_jax.progress import Reporter
from dapt_jax.report.records import Records
from dapt_jax.strategies import Strategy
from dapt_jax.tasks import Arm, Task
from dapt_jax.training.caching import Caching
from dapt_jax.training.diverged import NAN
from dapt_jax.training.features import Store
from dapt_jax.training.run import Debug, Tools
from dapt_jax.watch.profiler import PROFILE, Profiler
from dapt_jax.watch.watcher import Watcher
from dapt_jax.watch.writers import open_writers
from dapt_jax.weights import locate
from dapt_jax.weights.merge import MergeReport

CACHE = "cache"
"""Folder of cached activations in a workdir."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that a study needs, read and checked before anything is trained.

    Attributes:
        config: its settings.
        strategies: resolved against the model.
        corpora: in-domain images that strategies adapt to: "" names `config.corpus`, all else is of `config.corpora`.
        tasks: target tasks.
        weights: what was loaded into the whole encoder, what was newly drawn, what was left over, and every parameter.
    """

    config: Any
    strategies: tuple[Strategy, ...]
    corpora: Mapping[str, Dataset]
    tasks: tuple[Task, ...]
    weights: str

    def corpus_of(self, strategy: Strategy) -> Dataset | None:
        """What a strategy is adapted to; None where nothing is."""
        return self.corpora.get(strategy.corpus) if strategy.phases else None


def prepare(config: Any) -> Study:
    """Reads images and weights and resolves every strategy.

    Raises:
        UserError: anything in the config, the data or the weights that cannot work.
    """
    checks.check(config)
    transfer.check(config)
    segmentation.check(config)
    encoder = locate.fitted(config.weights, registry.of_config(config.model))
    strategies = tuple(named.resolve(name, encoder, config) for name in config.strategies)
    parallel.make_mesh(fsdp=config.parallel.fsdp)
    with _about("adapt."):
        parallel.check_batch(config.adapt.batch_size, config.adapt.accumulate)
    if transfer.FINETUNE in config.transfer.protocols:
        with _about("transfer.finetune."):
            parallel.check_batch(config.transfer.finetune.batch_size, config.transfer.finetune.accumulate)
    params, _, merged = locate.load(config.weights, Classifier(encoder, 1), seed=0)
    print(f"weights: {merged}", flush=True)
    _check_weights(config, strategies)
    adapting = [strategy for strategy in strategies if strategy.phases]
    if not config.tasks:
        raise UserError("the config names no target task; expected tasks.NAME.development and so on")
    corpora = _corpora(config, adapting)
    tasks = tuple(_task(config, name) for name in config.tasks)
    study = Study(config, strategies, corpora, tasks, _about_weights(params, merged))
    leaks.check(study.tasks, study.corpora)
    if config.budget and not (config.select and "" in corpora):
        raise UserError(
            "budget is for strategies that adapt, compared by a score; expected select='robustness', or budget=0"
        )
    for strategy in adapting:
        corpus = corpora[strategy.corpus]
        scoring.plan(config, strategy, config.seeds[0], corpus, scoring.target(config, tasks))
        run = dapt_run(config, strategy, config.seeds[0], corpus)
        run.check_cache()
    _check_masks(study)
    return study


def _check_masks(study: Study) -> None:
    """Lets the decoder, the cache and the devices refuse what they would refuse in the middle of a study."""
    config, seed = study.config, study.config.seeds[0]
    settings = config.transfer.segmentation
    for task in (task for task in study.tasks if task.is_segmentation):
        with _about("transfer.segmentation."):
            parallel.check_batch(settings.batch_size, settings.accumulate)
        for strategy, protocol in itertools.product(study.strategies, settings.protocols):
            with _about(f"tasks.{task.name}: "):
                for run, _ in segmentation.runs(
                    config, task, Arm(strategy.name, seed, "", ""), strategy.encoder, protocol
                ):
                    run.check_cache()


def _corpora(config: Any, adapting: Sequence[Strategy]) -> dict[str, Dataset]:
    """Reads what strategies adapt to."""
    corpora: dict[str, Dataset] = {}
    for strategy in adapting:
        if strategy.corpus in corpora:
            continue
        if not strategy.corpus and not config.corpus.kind:
            raise UserError(
                f"strategy {strategy.name!r} adapts, but the config names no corpus; expected corpus.kind and so on"
            )
        settings = corpus_settings(config, strategy.corpus)
        what = f"corpora.{strategy.corpus}" if strategy.corpus else "corpus"
        if isinstance(settings, Mapping | ConfigDict):
            fraction = settings.get("val_fraction", VAL_FRACTION)
            if not checks.is_like(fraction, VAL_FRACTION) or not 0 <= fraction < 1:
                raise UserError(f"{what}.val_fraction is {fraction!r}; expected 0 to less than 1")
            settings = {key: value for key, value in settings.items() if key != "val_fraction"}
        corpora[strategy.corpus] = _load(config, settings, what)
    return corpora


def _check_weights(config: Any, strategies: Sequence[Strategy]) -> None:
    """Reads the weights of strategies that have their own, so that a wrong file is told before anything is trained."""
    own = {strategy.weights: strategy for strategy in strategies if strategy.weights != config.weights}
    for strategy in own.values():
        with _about(f"phases.{strategy.name}: "):
            _, _, merged = locate.load(strategy.weights, Classifier(strategy.encoder, 1), seed=0)
        print(f"weights of {strategy.name}: {merged}", flush=True)


def _about_weights(params: Tree, merged: MergeReport) -> str:
    """The merge, name by name, and shape, mean and deviation of every parameter: what a wrong file shows first."""
    lists = {"newly drawn": merged.initialised, "left over in the file": merged.left_over, "loaded": merged.loaded}
    named = [f"{title}: {', '.join(names) or 'nothing'}" for title, names in lists.items()]
    return "\n\n".join([str(merged), *named, parameter_overview.get_parameter_overview(params)]) + "\n"


def _load(config: Any, settings: Any, what: str) -> Dataset:
    with _about(f"{what}: "):
        if not isinstance(settings, Mapping | ConfigDict):
            raise UserError(f"{settings!r}; expected settings such as kind='manifest', path='manifest.csv'")
        dataset = sources.load(
            dict(settings.items()),
            data_dir=storage.data(config.data_dir) or None,
            image_size=config.model.image_size,
            on_bad_image=config.data.on_bad_image,
            cache_bytes=config.data.cache_mb << 20,
        )
        if len(dataset.classes) < 2 and not dataset.multi_label and not dataset.segments:
            raise UserError(f"all {len(dataset)} images are {dataset.classes[0]!r}; expected two classes or more")
    skipped = f", {dataset.skipped} unreadable images skipped" if dataset.skipped else ""
    counts = ", ".join(f"{name} {count}" for name, count in dataset.class_counts().items())
    several = ", several labels per image" if dataset.multi_label else ""
    several += f", masks of {', '.join(dataset.segments[1:])}" if dataset.segments else ""
    print(f"{what}: {len(dataset)} images ({counts}){several}, {_patients(dataset)}{skipped}", flush=True)
    return dataset


def _patients(dataset: Dataset) -> str:
    """How many patients a set has; an image that names none is a group of its own."""
    alone = np.asarray(dataset.groups) == np.asarray(dataset.images.names)
    if alone.all():
        return "no patients named"
    named = f"{len(np.unique(dataset.groups[~alone]))} patients"
    return f"{named}, {alone.sum()} images of unnamed ones" if alone.any() else named


def _task(config: Any, name: str) -> Task:
    splits = config.tasks[name]
    if not isinstance(splits, ConfigDict):
        raise UserError(
            f"tasks.{name} is {splits!r}; expected its sets: development, and test or external if there are"
        )
    for split in splits:
        if split not in SPLITS:
            hint = nearest(split, SPLITS)
            raise UserError(f"tasks.{name} has no split {split!r}; {hint}")
    if "development" not in splits:
        raise UserError(f"tasks.{name} has no development images")
    loaded = {split: _load(config, splits[split], f"{name} {split}") for split in splits}
    task = Task(name, loaded.pop("development"), loaded)
    with _about(f"{name} development: "):
        counts = task.development.class_counts()
        for label, count in counts.items():
            if not count and not task.development.multi_label:
                found = ", ".join(each for each in counts if counts[each])
                raise UserError(f"no image is {label!r}; expected images of every class, found {found}")
        try:
            task.folds(config.transfer.folds, config.seeds[0])
        except UserError as error:
            raise UserError(f"{error}; expected fewer folds (transfer.folds) or more patients") from error
    return task


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    """Puts before an error line what it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}{error}") from error


def run(config: Any, workdir: Path, notice: Notice | None = None) -> None:
    """Runs what is left of a study and writes its report.

    Killed at any moment and started again with the same command, it ends with the same `results.jsonl`.

    Args:
        config: the study's.
        workdir: where its files are, or will be.
        notice: says when to save and stop; None for never.

    Raises:
        UserError: anything that cannot work, in one line.
        Stopped: by the notice.
    """
    with stalls.told(config.data.stall_s, lambda line: print(line, file=sys.stderr, flush=True)):
        _run(config, workdir, notice or Notice())


def _run(config: Any, workdir: Path, notice: Notice) -> None:
    with processes.together():
        is_primary = processes.is_primary()
        writers = open_writers(config.watch, workdir, config.name) if is_primary else []
        study = prepare(config)
        total = {
            (strategy.name, seed): _flops(study, strategy, seed)
            for strategy in study.strategies
            for seed in config.seeds
        }
        claim(config, _fingerprints(study), workdir)
    jsonl.write_text(workdir / "weights.txt", study.weights)
    ledger, results_file = Ledger(workdir / "ledger.jsonl"), workdir / "results.jsonl"
    results = processes.told(lambda: Records.read(workdir).results)
    watcher = Watcher(workdir if is_primary else None, writers)
    reporter = Reporter(sum(total.values()), quiet=not is_primary, watcher=watcher)
    mesh = parallel.make_mesh(fsdp=config.parallel.fsdp)
    tools = Tools(
        folder=None,
        every_s=config.checkpoint.every_s,
        ledger=ledger,
        store=_store(config, workdir, reporter, mesh),
        mesh=mesh,
        hardware=hardware.describe(measure=config.measure_peak, watts=config.energy.watts, pue=config.energy.pue),
        reporter=reporter,
        threads=config.data.threads,
        watcher=watcher,
        profiler=Profiler(workdir / PROFILE if is_primary else None, config.profile.step, config.profile.steps),
        notice=notice,
        debug=Debug(config.debug.nan, config.debug.nan_factor, workdir / NAN),
        workdir=workdir,
    )
    ended = "failed"
    if tools.hardware.note:
        reporter.say(f"hardware: {tools.hardware.note}")
    try:
        for seed in config.seeds:
            if config.transfer.baseline and not _is_done(results, BASELINE, seed):
                for task in study.tasks:
                    results += transfer.baseline(config, task, seed, config.transfer.baseline)
                jsonl.write(results_file, results)
            for strategy, until in _entrants(study, seed, tools, workdir):
                watcher.arms(*_arms(study, results, strategy.name, seed))
                if _is_done(results, strategy.name, seed):
                    reporter.skip(total[strategy.name, seed])
                    continue
                results += _arm(study, strategy, seed, tools, workdir, until)
                jsonl.write(results_file, results)
                reporter.say(_line(results, strategy.name, seed, study))
        ended = "done"
        watcher.arms(*_arms(study, results))
    except Stopped:
        ended = "stopped"
        raise
    finally:
        reporter.close()
        watcher.close(ended)
    if not config.cache.dir:
        shutil.rmtree(workdir / CACHE, ignore_errors=True)
    if is_primary:
        report.build(workdir)
        print(f"report: {workdir / 'report.html'}")
    processes.most(0)  # the others wait, since JAX would not wait for long at the end of a process


def _store(config: Any, workdir: Path, reporter: Reporter, mesh: Mesh) -> Store:
    """The cache of frozen prefixes: in memory, and on disk where the config says."""
    caching = Caching.of(config.cache)
    folder = Path(config.cache.dir).expanduser() if config.cache.dir else workdir / CACHE
    disk = 0 if caching.mode == "off" else caching.disk_bytes
    return Store.open(caching.memory_bytes, disk, folder, caching.dtype, reporter.say, mesh)


def _entrants(study: Study, seed: int, tools: Tools, workdir: Path) -> list[tuple[Strategy, int]]:
    """The strategies that go to the target tasks, and after how many epochs each has to end (0: none has to)."""
    images = scoring.target(study.config, study.tasks)
    adapting = [strategy for strategy in study.strategies if strategy.phases]
    if not study.config.budget or images is None:
        return [(strategy, 0) for strategy in study.strategies]
    outcome = halving.run(study.config, adapting, seed, study.corpora, images, tools, workdir)
    still = [(strategy, 0) for strategy in study.strategies if not strategy.phases]
    return still + [(strategy, outcome.epochs) for strategy in adapting if strategy.name == outcome.winner]


def _arm(
    study: Study, strategy: Strategy, seed: int, tools: Tools, workdir: Path, until: int = 0
) -> list[dict[str, Any]]:
    """Adapts by one strategy with one seed, and measures the result on every task."""
    config = study.config
    corpus = study.corpus_of(strategy)
    folder = workdir / "checkpoints" / f"{strategy.name}-seed{seed}"
    if processes.bring(folder / ADAPTED):
        tools.reporter.skip(plan.dapt_flops(config, strategy, seed, corpus))
    target = scoring.target(config, study.tasks)
    adapted = adapt(config, strategy, seed, corpus, tools, folder, target, until)
    spec = strategy.weights
    init = spec if spec in (locate.IMAGENET, locate.RANDOM) else Path(spec).name
    arm = Arm(strategy.name, seed, init, strategy.encoder.name)
    rows = [row for task in study.tasks for row in transfer.transfer(config, task, arm, adapted, tools, folder)]
    if config.score.downstream and corpus is not None:
        rows += scoring.measure_scored(config, strategy, seed, corpus, study.tasks, arm, tools, folder)
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


def _fingerprints(study: Study) -> dict[str, str]:
    """What identifies the images of a study."""
    found = {
        f"{task.name}/{split}": data.fingerprint() for task in study.tasks for split, data in task.datasets.items()
    }
    return found | {name or "corpus": corpus.fingerprint() for name, corpus in study.corpora.items()}
