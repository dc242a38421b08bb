"""A study before it runs: images, weights and strategies are read, resolved and checked."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from clu import parameter_overview

from dapt_jax.data import findings, near_duplicates, sources
from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError, one_line
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Tree
from dapt_jax.runtime import sharding, storage
from dapt_jax.settings import Source, StudySettings
from dapt_jax.settings.training import FINETUNE
from dapt_jax.study import halving, leakage, segmentation, strategies
from dapt_jax.study.arms import Study
from dapt_jax.study.strategies import Strategy
from dapt_jax.study.tasks import Task
from dapt_jax.weights import locate
from dapt_jax.weights.merge import MergeReport


def prepare(settings: StudySettings) -> Study:
    """Read images and weights, resolve every strategy, and return the study.

    Args:
        settings: Settings of the study.

    Raises:
        UserError: The settings, the data or the weights are invalid.
    """
    settings = strategies.expanded(settings)
    encoder = locate.fitted(settings.weights, settings.model.encoder(), settings.model.preprocess)
    resolved = tuple(strategies.resolve(name, encoder, settings) for name in settings.strategies)
    sharding.make_mesh(fsdp=settings.runtime.fsdp)
    with _about("adapt."):
        sharding.check_batch(settings.adapt.batch_size, settings.adapt.grad_accum_steps)
    if FINETUNE in settings.transfer.protocols:
        finetune = settings.transfer.finetune
        with _about("transfer.finetune."):
            sharding.check_batch(finetune.batch_size, finetune.grad_accum_steps)
    params, _, merged = locate.load(settings.weights, Classifier(encoder, 1), seed=0)
    print(f"weights: {merged}", flush=True)
    _check_weights(settings, resolved)
    if not settings.tasks and (idle := [each.name for each in resolved if not each.phases]):
        raise UserError(
            f"the config names no target task, and {', '.join(idle)} adapts nothing; expected "
            "tasks.NAME.development and so on, or strategies that adapt alone"
        )
    corpora = _corpora(settings, [part for each in resolved if each.phases for part in each.parts])
    tasks = tuple(read_task(settings, name) for name in settings.tasks)
    apart = leakage.resolve(tasks, corpora, settings.data.leaks)
    for line in apart.notes:
        print(f"warning: {line}", flush=True)
    for task in apart.tasks:
        _check_folds(settings, task)
    study = Study(settings, resolved, apart.corpora, apart.tasks, _about_weights(params, merged), apart.marks)
    _check_adaptation(study)
    _check_segmentation(study)
    return study


def _check_adaptation(study: Study) -> None:
    """Run the checks of budget, scores and cache that would otherwise fail during a study."""
    settings = study.settings
    if settings.compute_budget:
        if "" not in study.corpora:
            raise UserError(
                "compute_budget is for strategies that adapt, compared by a score; expected "
                "checkpoint_selection.score='robustness', or compute_budget=0"
            )
        for arm in study.arms_of(settings.seeds[0]):
            if arm.strategy.before:
                raise UserError(
                    f"strategy {arm.name!r} has phases on several corpora, which a compute_budget does not "
                    "divide; expected one corpus, or compute_budget=0"
                )
        for seed in settings.seeds:
            halving.check(study, seed)
    for arm in study.arms_of(settings.seeds[0]):
        if arm.strategy.phases:
            study.kept_epochs(arm)
            study.scoring_plan(arm)
            for run in study.runs_of(arm):
                run.check_cache()


def _check_segmentation(study: Study) -> None:
    """Run the checks of decoder, cache and devices that would otherwise fail during a study."""
    settings = study.settings.transfer.segmentation
    for task in (task for task in study.tasks if task.is_segmentation):
        with _about("transfer.segmentation."):
            sharding.check_batch(settings.batch_size, settings.grad_accum_steps)
        for arm, protocol in itertools.product(study.arms_of(study.settings.seeds[0]), settings.protocols):
            with _about(f"tasks.{task.name}: "):
                for run, _ in segmentation.fold_runs(study, arm, task, arm.strategy.encoder, protocol):
                    run.check_cache()


def _corpora(settings: StudySettings, adapting: Sequence[Strategy]) -> dict[str, Dataset]:
    """Read the corpora of the strategies."""
    corpora: dict[str, Dataset] = {}
    for strategy in adapting:
        if strategy.corpus in corpora:
            continue
        corpus = settings.corpus_named(strategy.corpus)
        if not strategy.corpus and not corpus.source.get("kind"):
            raise UserError(
                f"strategy {strategy.name!r} adapts, but the config names no corpus; expected corpus.kind "
                "and so on"
            )
        what = f"corpora.{strategy.corpus}" if strategy.corpus else "corpus"
        corpora[strategy.corpus] = images = _load(settings, corpus.source, what, settings.adapt.loss.name)
        if corpus.val_fraction and len(np.unique(images.groups)) < 2:
            raise UserError(
                f"{what}: all {len(images)} images are of one patient ({images.groups[0]}), so no part can "
                "be held out by "
                f"patient; expected more patients, or {what}.val_fraction=0 to train on all"
            )
    return corpora


def _check_weights(settings: StudySettings, resolved: Sequence[Strategy]) -> None:
    """Read strategy-specific weights, so that an invalid file is refused before training."""
    own = {strategy.weights: strategy for strategy in resolved if strategy.weights != settings.weights}
    for strategy in own.values():
        with _about(f"custom_strategies.{strategy.name}: "):
            _, _, merged = locate.load(strategy.weights, Classifier(strategy.encoder, 1), seed=0)
        print(f"weights of {strategy.name}: {merged}", flush=True)


def _about_weights(params: Tree, merged: MergeReport) -> str:
    """Return the load report by name, and shape, mean and standard deviation of every parameter."""
    lists = {
        "newly drawn": merged.initialised,
        "left over in the file": merged.left_over,
        "loaded": merged.loaded,
    }
    named = [one_line(f"{title}: {', '.join(names) or 'nothing'}") for title, names in lists.items()]
    identity = (
        f"fingerprint: {merged.fingerprint or 'none'}\nsha256 of the source: {merged.source_sha256 or 'none'}"
    )
    return (
        "\n\n".join([str(merged), identity, *named, parameter_overview.get_parameter_overview(params)]) + "\n"
    )


def _load(settings: StudySettings, source: Source, what: str, loss: str, is_split: bool = False) -> Dataset:
    with _about(f"{what}: "):
        dataset = sources.load(
            source,
            data_dir=storage.data(settings.data_dir) or None,
            image_size=settings.model.image_size,
            on_bad_image=settings.data.on_bad_image,
            cache_bytes=settings.data.cache_mb << 20,
        )
        if loss == "ordinal":
            dataset = sources.ordered(dataset, source)
        if len(dataset.classes) < 2 and not dataset.multi_label and not dataset.segments:
            raise UserError(
                f"all {len(dataset)} images are {dataset.classes[0]!r}; expected two classes or more"
            )
    skipped = f", {dataset.skipped} unreadable images skipped" if dataset.skipped else ""
    counts = ", ".join(f"{name} {count}" for name, count in dataset.class_counts().items())
    several = ", several labels per image" if dataset.multi_label else ""
    several += f", masks of {', '.join(dataset.segments[1:])}" if dataset.segments else ""
    print(
        f"{what}: {len(dataset)} images ({counts}){several}, {_patients(dataset, is_split)}{skipped}",
        flush=True,
    )
    for line in findings.of_set(dataset, is_split=is_split):
        print(f"warning: {what}: {line}", flush=True)
    return dataset


def _patients(dataset: Dataset, is_split: bool) -> str:
    """Return the number of patients; an image without a patient counts as a separate one."""
    alone = np.asarray(dataset.groups) == np.asarray(dataset.images.names)
    named = "no patients named" if alone.all() else f"{len(np.unique(dataset.groups[~alone]))} patients"
    if alone.any() and not alone.all():
        named += f", {alone.sum()} images of unnamed ones"
    if is_split and (pairs := near_duplicates.merged(dataset).pairs):
        named += f", {len({row for pair in pairs for row in pair})} look-alikes merged"
    return named


def read_task(settings: StudySettings, name: str) -> Task:
    """Return a target task, its sets read and reported.

    Args:
        settings: Settings of the study.
        name: Name of the task.

    Raises:
        UserError: A set is invalid.
    """
    losses = {settings.transfer.head.loss.name, settings.transfer.finetune.loss.name}
    loss = "ordinal" if "ordinal" in losses else ""
    loaded = {
        split: _load(settings, source, f"{name} {split}", loss, is_split=split == "development")
        for split, source in settings.tasks[name].sources.items()
    }
    return Task(name, loaded.pop("development"), loaded)


def _check_folds(settings: StudySettings, task: Task) -> None:
    """Refuse classes without images and impossible folds; report classes missing from a training part."""
    what = f"{task.name} development"
    with _about(f"{what}: "):
        counts = task.development.class_counts()
        for label, count in counts.items():
            if not count and not task.development.multi_label:
                present = ", ".join(each for each in counts if counts[each])
                raise UserError(f"no image is {label!r}; expected images of every class, found {present}")
        try:
            folds = [task.folds(settings.transfer.folds, seed) for seed in settings.seeds]
        except UserError as error:
            pairs = near_duplicates.merged(task.development).pairs
            merged = (
                f", or merge_look_alikes=False: {len(pairs)} pairs of look-alikes were merged"
                if pairs
                else ""
            )
            raise UserError(
                f"{error}; expected fewer folds (transfer.folds) or more patients{merged}"
            ) from error
    lacking: dict[str, list[int]] = {}
    for seed, splits in zip(settings.seeds, folds, strict=True):
        for line in findings.of_folds(task.development, splits):
            lacking.setdefault(line, []).append(seed)
    for line, seeds in lacking.items():
        print(f"warning: {what}, seed {', '.join(map(str, seeds))}: {line}", flush=True)


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    """Prefix an error line with its subject."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}{error}") from error
