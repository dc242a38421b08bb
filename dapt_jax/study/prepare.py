"""A study before it runs: images, weights and strategies read, resolved and checked; what cannot work is refused here."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from dapt_jax.data import sources
from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError, nearest
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Tree
from dapt_jax.records.vocabulary import SPLITS
from dapt_jax.runtime import sharding, storage
from dapt_jax.settings import checks
from dapt_jax.study import checkpoint_scores, classification, halving, leakage, segmentation
from dapt_jax.study import strategies as named
from dapt_jax.study.adapt import VAL_FRACTION, corpus_settings, dapt_run
from dapt_jax.study.strategies import Strategy
from dapt_jax.study.tasks import Arm, Task
from dapt_jax.weights import locate
from dapt_jax.weights.merge import MergeReport


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
    classification.check(config)
    segmentation.check(config)
    encoder = locate.fitted(config.weights, registry.of_config(config.model))
    strategies = tuple(named.resolve(name, encoder, config) for name in config.strategies)
    sharding.make_mesh(fsdp=config.parallel.fsdp)
    with _about("adapt."):
        sharding.check_batch(config.adapt.batch_size, config.adapt.accumulate)
    if classification.FINETUNE in config.transfer.protocols:
        with _about("transfer.finetune."):
            sharding.check_batch(config.transfer.finetune.batch_size, config.transfer.finetune.accumulate)
    params, _, merged = locate.load(config.weights, Classifier(encoder, 1), seed=0)
    print(f"weights: {merged}", flush=True)
    _check_weights(config, strategies)
    adapting = [strategy for strategy in strategies if strategy.phases]
    if not config.tasks:
        raise UserError("the config names no target task; expected tasks.NAME.development and so on")
    corpora = _corpora(config, adapting)
    tasks = tuple(_task(config, name) for name in config.tasks)
    study = Study(config, strategies, corpora, tasks, _about_weights(params, merged))
    leakage.check_leakage(study.tasks, study.corpora)
    if config.budget and not (config.select and "" in corpora):
        raise UserError(
            "budget is for strategies that adapt, compared by a score; expected select='robustness', or budget=0"
        )
    if config.budget and (images := checkpoint_scores.target(config, tasks)):
        for seed in config.seeds:
            halving.check(config, adapting, seed, corpora, images)
    for strategy in adapting:
        corpus = corpora[strategy.corpus]
        checkpoint_scores.plan(config, strategy, config.seeds[0], corpus, checkpoint_scores.target(config, tasks))
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
            sharding.check_batch(settings.batch_size, settings.accumulate)
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


def fingerprints(study: Study) -> dict[str, str]:
    """What identifies the images of a study."""
    found = {
        f"{task.name}/{split}": data.fingerprint() for task in study.tasks for split, data in task.datasets.items()
    }
    return found | {name or "corpus": corpus.fingerprint() for name, corpus in study.corpora.items()}
