"""A study before it runs: images, weights and strategies are read, resolved and checked."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from clu import parameter_overview

from dapt_jax.data import decode, facts, findings, intensity, limits, near_duplicates, sources
from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import MissingLabelsError, UserError, nearest, one_line
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.objectives import LABEL_FREE
from dapt_jax.runtime import sharding, storage, streams
from dapt_jax.settings import StudySettings
from dapt_jax.settings.schema import ReportSettings
from dapt_jax.settings.sources import Sources
from dapt_jax.settings.training import FINETUNE
from dapt_jax.statistics import PIXELS, Aggregation, too_few_seeds
from dapt_jax.study import (
    budgets,
    divided,
    few_samples,
    halving,
    leakage,
    recomputation,
    segmentation,
    stated,
    strategies,
)
from dapt_jax.study.arms import Study
from dapt_jax.study.strategies import Strategy
from dapt_jax.study.tasks import Task
from dapt_jax.training.early_stopping import EarlyStopping
from dapt_jax.weights import locate
from dapt_jax.weights.merge import MergeReport

LISTED_CLASSES = 20
"""Classes that the line on a set lists with their numbers of images."""


def prepare(settings: StudySettings) -> Study:
    """Read images and weights, resolve every strategy, and return the study.

    Args:
        settings: Settings of the study.

    Raises:
        UserError: The settings, the data or the weights are invalid.
    """
    settings = strategies.expanded(settings)
    settings = budgets.for_this_device(budgets.resolved(settings))
    if settings.mode == "plan":
        streams.say(budgets.stated(settings))
    encoder = settings.model.encoder()
    has_weights = settings.mode not in stated.WITHOUT_IMAGES or locate.is_here(settings.weights, encoder.name)
    encoder = locate.fitted(settings.weights, encoder, settings.model.preprocess, has_weights)
    resolved = tuple(strategies.resolve(name, encoder, settings) for name in settings.strategies)
    sharding.make_mesh(fsdp=settings.runtime.fsdp)
    with _about("adapt."):
        sharding.check_batch(settings.adapt.batch_size, settings.adapt.grad_accum_steps)
    for transfer in {name: settings.transfer_of(name) for name in ("", *settings.tasks)}.values():
        if FINETUNE in transfer.protocols:
            with _about("transfer.finetune."):
                sharding.check_batch(transfer.finetune.batch_size, transfer.finetune.grad_accum_steps)
    about, reports = _weights(settings, encoder, resolved) if has_weights else ("", {})
    if not has_weights:
        streams.say(f"weights: {settings.weights}, not here and not read: nothing is trained")
    loaded = {}
    sets = named_sets(settings, resolved)
    for line in stated.check_names(settings, [named.title for named in sets]):
        streams.say(f"warning: {line}")
    for named in sets:
        loaded[named] = read = read_set(settings, named)
        streams.say(read.line)
        for line in read.warnings:
            streams.say(f"warning: {line}")
    corpora = corpora_of(loaded)
    tasks = tuple(task_of(settings, loaded, name) for name in settings.tasks)
    apart = leakage.resolve(tasks, corpora, settings.data.leaks)
    for line in (*apart.notes, *different_scales([task for task in apart.tasks if is_here(task)])):
        streams.say(f"warning: {line}")
    for task in apart.tasks:
        for line in check_folds(settings, task):
            streams.say(f"warning: {line}")
    if settings.tasks and (line := too_few_seeds(len(settings.seeds))):
        streams.say(f"warning: {line}")
    study = Study(settings, resolved, apart.corpora, apart.tasks, about, apart.marks, reports)
    for fitting in (budgets.with_fitting_dtype, recomputation.with_fitting_activations):
        study, line = fitting(study)
        if line:
            streams.say(line)
    check_study(study)
    if study.scores and study.scores.selects_by_labels and settings.tasks:
        of = study.scores.task or study.tasks[0].name
        streams.say(
            f"warning: checkpoint_selection.score={study.scores.select} reads labels of {of} development, whose scores "
            "are then those of images that chose the checkpoint; other splits have no say"
        )
    if line := halving.unlike(study):
        streams.say(f"warning: {line}")
    return study


def check_study(study: Study) -> None:
    """Run the checks of sets against settings that would otherwise fail during a study.

    Args:
        study: The study; its weights need not be read.

    Raises:
        UserError: Budget, scores, cache, decoder, devices or report do not suit the sets.
    """
    _check_report(study)
    _check_adaptation(study)
    _check_segmentation(study)


def _check_report(study: Study) -> None:
    """Refuse a primary metric or protocol of no task: each task's report would quietly be of another.

    The default metric is not refused, since a study of masks alone need not name its own.
    """
    settings, tasks = study.settings, study.tasks
    transfers = [(task, settings.transfer_of(task.name)) for task in tasks]
    metrics = [name for task, transfer in transfers for name in task.metrics(transfer)]
    protocols = [
        name
        for task, transfer in transfers
        for name in (transfer.segmentation if task.is_segmentation else transfer).protocols
    ]
    if not all(map(is_here, tasks)):  # a stated set has no names of classes
        metrics.append(settings.report.metric)
    for name, known, default in (
        ("metric", metrics, ReportSettings.metric),
        ("protocol", protocols, ReportSettings.protocol),
    ):
        if tasks and (value := getattr(settings.report, name)) not in {*known, default}:
            choices = list(dict.fromkeys(known))
            raise UserError(f"report.{name} is {value!r}, which no task has; {nearest(value, choices)}")


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
                if patience := settings.adapt.early_stopping_patience:
                    EarlyStopping(patience, run)  # refuses a run without images to watch
                if run.teacher_weights:
                    run.teacher_weights()


def _check_segmentation(study: Study) -> None:
    """Run the checks of decoder, cache and devices that would otherwise fail during a study."""
    for task in (task for task in study.tasks if task.is_segmentation):
        settings = study.settings.transfer_of(task.name).segmentation
        with _about("transfer.segmentation."):
            sharding.check_batch(settings.batch_size, settings.grad_accum_steps)
        for arm, protocol in itertools.product(study.arms_of(study.settings.seeds[0]), settings.protocols):
            with _about(f"tasks.{task.name}: "):
                for run, _ in segmentation.fold_runs(study, arm, task, arm.strategy.encoder, protocol):
                    run.check_cache()


@dataclasses.dataclass(frozen=True, eq=False)
class NamedSet:
    """A set of images that the settings of a study name.

    Attributes:
        title: Name in messages: "corpus", "corpora.NAME" or "TASK SPLIT".
        source: Description of the set.
        loss: Name of the loss that decides whether its classes are grades.
        corpus: Name in `corpora`, empty for the main corpus; None for a set of a task.
        task: Name of its task; empty for a corpus.
        split: Split of its task; empty for a corpus.
        supervised: Name of a strategy that needs labels of a corpus; empty where none does, and no label is
            read.
        part: `corpus` or `target` for a part of one set that `data.split` divides; empty for a whole set.
    """

    title: str
    source: Sources
    loss: str
    corpus: str | None = None
    task: str = ""
    split: str = ""
    supervised: str = ""
    part: str = ""

    @property
    def has_labels(self) -> bool:
        """Whether its labels are read."""
        return bool(self.task or self.supervised)

    @property
    def is_divided(self) -> bool:
        """Whether the study divides the set into folds."""
        return self.split == "development"

    @property
    def is_trained_on(self) -> bool:
        """Whether heads are trained on the set, or on parts of it."""
        return self.split in ("development", "train")


@dataclasses.dataclass(frozen=True)
class ReadSet:
    """A set of images as read, and what a study says of it.

    Attributes:
        dataset: The images.
        line: Its size, classes and patients in one line.
        warnings: Its irregularities, one per line.
    """

    dataset: Dataset
    line: str
    warnings: list[str]


def named_sets(settings: StudySettings, resolved: Sequence[Strategy]) -> list[NamedSet]:
    """Return the sets that a study reads, in that order: corpora, then those of each task.

    Args:
        settings: Settings of the study.
        resolved: Its strategies, which say what corpora are needed.

    Raises:
        UserError: A strategy adapts to a corpus that the settings do not describe, or there is neither a task
            nor anything to adapt.
    """
    if not settings.tasks and (idle := [each.name for each in resolved if not each.phases]):
        raise UserError(
            f"the config names no target task, and {', '.join(idle)} adapts nothing; expected "
            "tasks.NAME.development and so on, or strategies that adapt alone"
        )
    found: dict[str, NamedSet] = {}
    halved = divided.task_of(settings)
    adapting = [part for each in resolved if each.phases for part in each.parts]
    supervised = {each.corpus: each.name for each in reversed(adapting) if not each.is_label_free}
    for strategy in adapting:
        if strategy.corpus in found:
            continue
        source: Sources = settings.corpus_named(strategy.corpus).source
        if halved and not strategy.corpus:
            source = settings.tasks[halved].sources["development"]
        elif not strategy.corpus and not settings.corpus.source.get("kind"):
            raise UserError(
                f"strategy {strategy.name!r} adapts, but the config names no corpus; expected corpus.kind "
                "and so on, or data.split='corpus=.5,target=.5' to divide the development set"
            )
        title = f"corpora.{strategy.corpus}" if strategy.corpus else "corpus"
        found[strategy.corpus] = NamedSet(
            title,
            source,
            settings.adapt.loss.name,
            corpus=strategy.corpus,
            supervised=supervised.get(strategy.corpus, ""),
            part="corpus" if halved and not strategy.corpus else "",
        )
    return [*found.values()] + [
        NamedSet(
            f"{name} {split}",
            source,
            _loss_of(settings, name),
            task=name,
            split=split,
            part="target" if name == halved and split == "development" else "",
        )
        for name, task in settings.tasks.items()
        for split, source in task.sources.items()
    ]


def _loss_of(settings: StudySettings, task: str) -> str:
    """Return the name of the loss that makes grades of a task's classes; empty where there is none."""
    transfer = settings.transfer_of(task)
    return "ordinal" if "ordinal" in {transfer.head.loss.name, transfer.finetune.loss.name} else ""


def corpora_of(loaded: Mapping[NamedSet, ReadSet]) -> dict[str, Dataset]:
    """Return the corpora among the sets that were read, by name in `corpora`."""
    return {named.corpus: read.dataset for named, read in loaded.items() if named.corpus is not None}


def task_of(settings: StudySettings, loaded: Mapping[NamedSet, ReadSet], name: str) -> Task:
    """Return a task of sets that were read; those that its heads are trained on must be among them.

    Raises:
        UserError: The sets of the task do not go together, or its units need an order of the classes that no
            description gives.
    """
    sets = {named.split: read.dataset for named, read in loaded.items() if named.task == name}
    seed = settings.transfer_of(name).split_seed
    own = settings.tasks[name]
    aggregation = own.aggregation
    if aggregation and not own.aggregate and any(data.segments for data in sets.values()):
        aggregation = Aggregation(own.unit, PIXELS)
    task = Task.of(name, sets, None if seed < 0 else seed, own.auc_classes, aggregation)
    described = itertools.chain(
        *([each] if isinstance(each, Mapping) else each for each in own.sources.values())
    )
    if not any(each.get("classes") for each in described):  # all sets of a task have one order
        task.check_order_not_needed()
    return task


def _weights(
    settings: StudySettings, encoder: Encoder, resolved: Sequence[Strategy]
) -> tuple[str, dict[str, MergeReport]]:
    """Read the weights of the study and of its strategies; return what is said of the former, and all reports."""
    params, _, merged = locate.load(settings.weights, Classifier(encoder, 1), seed=0)
    streams.say(f"weights: {merged}")
    return _about_weights(params, merged), {"": merged, **_own_weights(settings, resolved)}


def _own_weights(settings: StudySettings, resolved: Sequence[Strategy]) -> dict[str, MergeReport]:
    """Read strategy-specific weights, so that an invalid file is refused before training.

    Returns:
        The load report of each strategy that has its own weights, by its name.
    """
    own = [strategy for strategy in resolved if strategy.weights != settings.weights]
    reports: dict[tuple[str, tuple[str, ...]], MergeReport] = {}
    for strategy in own:
        key = strategy.weights, strategy.encoder.groups
        if key in reports or (
            settings.mode == "plan" and not locate.is_here(strategy.weights, strategy.encoder.name)
        ):
            continue
        with _about(f"custom_strategies.{strategy.name}: "):
            _, _, reports[key] = locate.load(strategy.weights, Classifier(strategy.encoder, 1), seed=0)
        streams.say(f"weights of {strategy.name}: {reports[key]}")
    keys = {each.name: (each.weights, each.encoder.groups) for each in own}
    return {name: reports[key] for name, key in keys.items() if key in reports}


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


def read_set(settings: StudySettings, named: NamedSet) -> ReadSet:
    """Read a set, and look for irregularities in it.

    Raises:
        UserError: The set cannot be read, or a study cannot be made of it.
    """
    what = named.title
    limits.set_decoded_bytes(settings.data.max_image_mb << 20)
    with _about(f"{what}: "):
        read = functools.partial(
            sources.load,
            named.source,
            data_dir=storage.data(settings.data_dir) or None,
            image_size=settings.model.image_size,
            resize=settings.model.resize,
            on_bad_image=settings.data.on_bad_image,
            cache_bytes=max(0, settings.data.cache_bytes - decode.cached_bytes()),
            labels=named.has_labels or bool(named.part),
        )
        try:
            stated_as = what if named.part != "corpus" else f"{next(iter(settings.tasks))} development"
            dataset = stated.read_or_stated(read, settings, stated_as, named.source)
            if named.has_labels and not dataset.is_labelled:
                raise MissingLabelsError("kind 'images' reads no labels")
        except MissingLabelsError as error:
            raise _needs_labels(named, str(error)) from error
        if named.part:
            part = divided.part(settings, named.part, dataset)
            dataset = part if named.has_labels else part.without_labels()
        if named.loss == "ordinal" and named.has_labels:
            dataset = sources.ordered(dataset, named.source)
        if named.has_labels and len(dataset.classes) < 2 and not (dataset.multi_label or dataset.segments):
            raise UserError(
                f"all {len(dataset)} images are {dataset.classes[0]!r}; expected two classes or more"
            )
    if named.corpus is not None:
        _check_corpus(settings, named, dataset)
    skipped = f", {dataset.skipped} unreadable images skipped" if dataset.skipped else ""
    counts = _counts(dataset)
    several = ", several labels per image" if dataset.multi_label else ""
    several += f", masks of {', '.join(dataset.segments[1:])}" if dataset.segments else ""
    is_stated = isinstance(dataset.images, stated.StatedImages)
    patients = "no patients named" if is_stated else _patients(dataset, named.is_divided)
    share = f", by data.split={settings.data.split!r}" if named.part else ""
    found = [] if is_stated else findings.of_set(dataset, is_split=named.is_divided)
    return ReadSet(
        dataset,
        f"{what}: {len(dataset)} images ({counts}){several}, {patients}{skipped}{share}",
        [f"{what}: {line}" for line in found],
    )


def _counts(dataset: Dataset) -> str:
    """Return the number of images of each class, of many classes the first ones."""
    counts = [f"{name} {count}" for name, count in dataset.class_counts().items()]
    more = len(counts) - LISTED_CLASSES
    listed = ", ".join(counts[:LISTED_CLASSES]) or "no labels read"
    return listed + (f" and {more:,} classes more" if more > 0 else "")


def _needs_labels(named: NamedSet, why: str) -> UserError:
    if named.task:
        return UserError(f"{why}; a target task needs labels")
    return UserError(
        f"{why}; strategy {named.supervised!r} is supervised: expected labels, or adapt.objective="
        f"{' or '.join(map(repr, LABEL_FREE))}, which need none"
    )


def _check_corpus(settings: StudySettings, named: NamedSet, images: Dataset) -> None:
    """Refuse a corpus of one image, or of one patient of which a part is to be held out."""
    if len(images) == 1:
        raise UserError(f"{named.title}: 1 image; expected two or more different ones")
    if settings.corpus_named(named.corpus or "").val_fraction and len(np.unique(images.groups)) < 2:
        raise UserError(
            f"{named.title}: all {len(images)} images are of one patient ({images.groups[0]}), so no part "
            f"can be held out by patient; expected more patients, or {named.title}.val_fraction=0 to train "
            "on all"
        )


def _patients(dataset: Dataset, is_split: bool) -> str:
    """Return the number of patients; an image without a patient counts as a separate one."""
    alone = facts.unnamed(dataset)
    named = f"{len(np.unique(dataset.groups[~alone]))} patients"
    if alone.all():
        named = f"no patients named: {facts.nobody_named(dataset)}"
    if alone.any() and not alone.all():
        named += f", {alone.sum()} images of unnamed ones"
    if is_split and (pairs := near_duplicates.merged(dataset).pairs):
        named += f", {len({row for pair in pairs for row in pair})} look-alikes merged"
    return named


def different_scales(tasks: Sequence[Task]) -> list[str]:
    """Return a line for each kind of image that the sets of a task scale by different black and white."""
    return [
        f"{task.name}: {line}"
        for task in tasks
        for line in intensity.disagreements(
            {split: dataset.intensity_summary() for split, dataset in task.parts.items()}
        )
    ]


def is_here(task: Task) -> bool:
    """Return whether all sets of a task were read, and none has but a stated size."""
    return not any(isinstance(dataset.images, stated.StatedImages) for dataset in task.parts.values())


def check_folds(settings: StudySettings, task: Task) -> list[str]:
    """Refuse classes without images and impossible folds, and return what training parts lack, in lines.

    Of a set of stated size nothing is said: its patients are not known.

    Args:
        settings: Settings of the study.
        task: The task.

    Raises:
        UserError: A class has no image, or the folds are more than the patients.
    """
    what = f"{task.name} {'train' if task.official else 'development'}"
    seeds = settings.seeds if task.split_seed is None else settings.seeds[:1]
    with _about(f"{what}: "):
        counts = (task.official or (task.development,))[0].class_counts()
        for label, count in counts.items():
            if not count and not task.development.multi_label:
                present = ", ".join(each for each in counts if counts[each])
                raise UserError(f"no image is {label!r}; expected images of every class, found {present}")
        try:
            number = settings.transfer_of(task.name).folds
            folds = [task.folds(number, seed) for seed in seeds]
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
    if not is_here(task):
        return []
    lacking: dict[str, list[int]] = {}
    for seed, splits in zip(seeds, folds, strict=True):
        for line in findings.of_folds(task.development, splits):
            lacking.setdefault(line, []).extend([seed] if task.split_seed is None else settings.seeds)
    lines = [f"{what}, seed {', '.join(map(str, found))}: {line}" for line, found in lacking.items()]
    return lines + [f"{task.name}: {line}" for line in few_samples.of_task(task.datasets, folds)]


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    """Prefix an error line with its subject."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}{error}") from error
