"""Training runs made from settings: losses, options, and the run that adapts an encoder."""

import functools
from collections.abc import Callable
from typing import Literal, TypedDict

import jax
import numpy as np

from dapt_jax import losses
from dapt_jax.data.augment import Augment
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.mix import Mix
from dapt_jax.data.splits import grouped_holdout
from dapt_jax.errors import UserError
from dapt_jax.losses import ClassificationLoss, SegmentationLoss
from dapt_jax.models import registry
from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.models.trunk import Trunk
from dapt_jax.objectives import LABEL_FREE, Distil, Objective, SelfDistillation
from dapt_jax.settings import StudySettings
from dapt_jax.settings.losses import LossSettings
from dapt_jax.settings.training import AdaptSettings, ClassifierTrainSettings, TrainSettings
from dapt_jax.study.strategies import Strategy
from dapt_jax.training import label_free, patterns
from dapt_jax.training.cache.policy import Caching
from dapt_jax.training.optim import Optimizer, Plateau
from dapt_jax.training.run import RunTag, TrainData, TrainingRun
from dapt_jax.weights import locate

TeacherWeights = Callable[[], tuple[Tree, Tree]]
"""Function that returns parameters and batch-norm statistics of a frozen teacher."""


def classification_loss(
    dataset: Dataset, loss: LossSettings, single_logit: bool = False
) -> ClassificationLoss:
    """Return the loss of a data set of classes.

    Args:
        dataset: The data set.
        loss: Settings of the loss.
        single_logit: Whether two classes have one sigmoid output, as in arXiv 2204.13280.

    Raises:
        UserError: The loss does not support the labels of the set.
    """
    try:
        return losses.make(
            loss.name,
            loss.values(),
            classes=len(dataset.classes),
            multi_label=dataset.multi_label,
            single_logit=single_logit,
            uncertain=dataset.uncertain,
        )
    except UserError as error:
        raise UserError(f"{dataset.name}: {error}") from error


def segmentation_loss(dataset: Dataset, loss: LossSettings) -> SegmentationLoss:
    """Return the loss of a data set of masks.

    Args:
        dataset: The data set.
        loss: Settings of the loss.
    """
    return losses.make_segmentation(
        loss.name, loss.values(), classes=dataset.segments, multi_label=dataset.overlapping
    )


def inverse_frequency_weights(dataset: Dataset, rows: np.ndarray) -> tuple[float, ...]:
    """Return weights of rows by the inverse frequency of their class, 1 on average.

    Where an image has several labels there are none.

    Args:
        dataset: The data set.
        rows: Rows of it.
    """
    if dataset.multi_label:
        return ()
    labels = dataset.labels[rows]
    counts = np.bincount(labels, minlength=len(dataset.classes))
    return tuple(float(weight) for weight in len(rows) / (np.count_nonzero(counts) * counts[labels]))


class RunOptions(TypedDict):
    """Arguments of a `TrainingRun` that depend only on settings."""

    optimizer: Optimizer
    augment: Augment
    mix: Mix
    plateau: Plateau
    caching: Caching
    batch_size: int
    grad_accum_steps: int
    batch_norm_groups: int
    view_seed: int


def run_options(settings: StudySettings, train: TrainSettings) -> RunOptions:
    """Return the arguments of a `TrainingRun` that depend only on settings.

    Args:
        settings: Settings of the study, of which those of the model and of the cache count.
        train: Settings of the training: `adapt`, `transfer.finetune` or `transfer.segmentation`.
    """
    return RunOptions(
        optimizer=train.optimizer,
        augment=train.augment,
        mix=train.mix if isinstance(train, ClassifierTrainSettings) else Mix(),
        plateau=train.plateau,
        caching=settings.cache.policy(),
        batch_size=train.batch_size,
        grad_accum_steps=train.grad_accum_steps,
        batch_norm_groups=jax.device_count() if settings.model.batch_norm_statistics == "per_device" else 1,
        view_seed=train.view_seed if isinstance(train, AdaptSettings) else -1,
    )


def adaptation_run(
    settings: StudySettings, strategy: Strategy, seed: int, corpus: Dataset
) -> TrainingRun[Classifier]:
    """Return the run that adapts an encoder to a corpus, split by patient.

    Args:
        settings: Settings of the study.
        strategy: Strategy of the arm.
        seed: Seed of the arm.
        corpus: In-domain images.
    """
    if strategy.is_label_free:
        return label_free_run(settings, strategy, seed, corpus)
    adapt = settings.adapt
    loss = classification_loss(corpus, adapt.loss, adapt.single_logit)
    train_rows, val_rows = np.arange(len(corpus)), np.arange(0)
    if fraction := settings.corpus_named(strategy.corpus).val_fraction:
        train_rows, val_rows = grouped_holdout(corpus.labels, corpus.groups, fraction, seed)
    encoder = _with_updates(strategy, adapt)
    model = Classifier(encoder, loss.outputs, settings.model.dtype)
    weights = inverse_frequency_weights(corpus, train_rows) if adapt.balance_classes else ()
    data = TrainData(corpus, train_rows, val_rows, weights)
    options = run_options(settings, adapt)
    tag = RunTag(strategy.name, label=f"{strategy.part}/" if strategy.part else "")
    return TrainingRun(model, strategy.phases, data, loss, seed=seed, tag=tag, **options)


def _with_updates(strategy: Strategy, adapt: AdaptSettings) -> Encoder:
    """Return the encoder of a strategy with the low-rank updates and rows that its patterns name."""
    encoder = patterns.with_lora(strategy.encoder, strategy.phases, adapt.lora)
    return patterns.with_rows(encoder, strategy.phases, adapt.rows)


def label_free_run(
    settings: StudySettings, strategy: Strategy, seed: int, corpus: Dataset
) -> TrainingRun[Classifier]:
    """Return the run that adapts an encoder to a corpus without its labels, split by patient.

    Of images with equal pixels, one counts.

    Args:
        settings: Settings of the study.
        strategy: Strategy of the arm.
        seed: Seed of the arm.
        corpus: In-domain images; their labels are not used.

    Raises:
        UserError: The objective does not fit the corpus or the settings, or its teacher does not load.
    """
    corpus = corpus.without_labels()
    rows = label_free.distinct_rows(corpus)
    if len(rows) < 2:
        raise UserError(
            f"{corpus.name}: {len(corpus)} images, pixel for pixel the same; expected two or more different ones"
            if len(corpus) > 1
            else f"{corpus.name}: 1 image; expected two or more different ones"
        )
    train_rows, val_rows = rows, np.arange(0)
    if fraction := settings.corpus_named(strategy.corpus).val_fraction:
        fit, held_out = grouped_holdout(corpus.labels[rows], corpus.groups[rows], fraction, seed)
        train_rows, val_rows = rows[fit], rows[held_out]
    if (clusters := settings.adapt.balance_clusters) > len(train_rows):
        raise UserError(
            f"{corpus.name}: adapt.balance_clusters is {clusters}, but it has {len(train_rows)} different "
            f"images to train on; expected up to {len(train_rows)}, or 0 to sample all images alike"
        )
    objective, teacher_weights = objective_of(settings, strategy)
    if isinstance(objective, SelfDistillation) and settings.adapt.early_stopping_patience:
        raise UserError(
            f"strategy {strategy.name!r}: the loss of objective {objective.name!r} has targets that move, and is lowest "
            "when it collapses; expected adapt.early_stopping_patience=0"
        )
    encoder = _with_updates(strategy, settings.adapt)
    model = label_free.pretext(encoder, objective, strategy.phases, settings.model.dtype)
    return TrainingRun(
        model,
        strategy.phases,
        TrainData(corpus, train_rows, val_rows),
        objective,
        seed=seed,
        tag=RunTag(strategy.name, label=f"{strategy.part}/" if strategy.part else ""),
        teacher_weights=teacher_weights,
        **run_options(settings, settings.adapt),
    )


def objective_of(settings: StudySettings, strategy: Strategy) -> tuple[Objective, TeacherWeights | None]:
    """Return the label-free objective of a strategy, and what loads its teacher's weights.

    Args:
        settings: Settings of the study.
        strategy: The strategy.

    Raises:
        UserError: `adapt.distil` names no teacher, or no such architecture.
    """
    objective = LABEL_FREE[strategy.objective]
    if objective is Distil:
        teacher, weights = _teacher(settings, strategy.name)
        return Distil(teacher, settings.adapt.distil), weights
    options = getattr(settings.adapt, objective.name, None)
    own = Trunk(strategy.encoder.base, dtype=settings.model.dtype) if objective.has_own_teacher else None
    return objective(own, options), None


def _teacher(settings: StudySettings, strategy: str) -> tuple[Trunk, TeacherWeights]:
    """Return the network that a strategy distils, and what loads its weights."""
    chosen = settings.adapt.distil
    if not chosen.teacher:
        raise UserError(
            f"strategy {strategy!r} distils, but adapt.distil.teacher names no weights; expected "
            f"{locate.EXPECTED}"
        )
    name = chosen.model or settings.model.name
    encoder = locate.fitted(chosen.teacher, registry.build(name))
    reads: Literal["pooled", "map"] = "map" if chosen.local else "pooled"
    teacher = Trunk(encoder, dtype=settings.model.dtype, reads=reads, side=chosen.image_size)

    def weights() -> tuple[Tree, Tree]:
        try:
            params, batch_stats, _ = locate.load(chosen.teacher, Classifier(encoder, 1), seed=0)
        except UserError as error:
            raise UserError(f"adapt.distil.teacher ({name}): {error}") from error
        return {key: value for key, value in params.items() if key != HEAD}, batch_stats

    return teacher, functools.cache(weights)
