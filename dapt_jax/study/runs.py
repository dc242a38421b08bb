"""Training runs made from settings: losses, options, and the run that adapts an encoder."""

from typing import TypedDict

import jax
import numpy as np

from dapt_jax import losses
from dapt_jax.data.augment import Augment
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.mix import Mix
from dapt_jax.data.splits import grouped_holdout
from dapt_jax.errors import UserError
from dapt_jax.losses import ClassificationLoss, SegmentationLoss
from dapt_jax.models.classifier import Classifier
from dapt_jax.settings import StudySettings
from dapt_jax.settings.losses import LossSettings
from dapt_jax.settings.training import ClassifierTrainSettings, TrainSettings
from dapt_jax.study.strategies import Strategy
from dapt_jax.training import patterns
from dapt_jax.training.cache.policy import Caching
from dapt_jax.training.optim import Optimizer, Plateau
from dapt_jax.training.run import RunTag, TrainData, TrainingRun


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
    train_rows, val_rows = np.arange(len(corpus)), np.arange(0)
    if fraction := settings.corpus_named(strategy.corpus).val_fraction:
        train_rows, val_rows = grouped_holdout(corpus.labels, corpus.groups, fraction, seed)
    adapt = settings.adapt
    loss = classification_loss(corpus, adapt.loss, adapt.single_logit)
    encoder = patterns.with_lora(strategy.encoder, strategy.phases, adapt.lora)
    model = Classifier(encoder, loss.outputs, settings.model.dtype)
    weights = inverse_frequency_weights(corpus, train_rows) if adapt.balance_classes else ()
    data = TrainData(corpus, train_rows, val_rows, weights)
    options = run_options(settings, adapt)
    tag = RunTag(strategy.name, label=f"{strategy.part}/" if strategy.part else "")
    return TrainingRun(model, strategy.phases, data, loss, seed=seed, tag=tag, **options)
