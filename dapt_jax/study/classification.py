"""One target task: heads on frozen features, or fine-tuning; scored on development, test and external images.

Tasks of masks are `segmentation`'s; of classes this is the whole of it.

Development scores are of held-out folds, stratified and split by patient. Test and external images are scored by the
same heads, never refitted, each fold's in turn; a score is the mean over folds.
"""

import dataclasses
import functools
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dapt_jax import metrics
from dapt_jax.data import crops, pipeline
from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError, nearest
from dapt_jax.losses import Objective
from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.records.ledger import Row
from dapt_jax.runtime import sharding
from dapt_jax.settings.defaults import BASELINE
from dapt_jax.study import adapt, segmentation
from dapt_jax.study.predictions import Predictions
from dapt_jax.study.tasks import Arm, Task, check_protocols, result_rows
from dapt_jax.training import freezing, head_sweep
from dapt_jax.training.cache import store
from dapt_jax.training.cache.fill import Filling
from dapt_jax.training.context import RunContext
from dapt_jax.training.cost_meter import CostMeter
from dapt_jax.training.evaluate import ShardedForward, forward_fn
from dapt_jax.training.phases import Phase
from dapt_jax.training.run import TrainingRun

FINETUNE = "finetune"
PROTOCOLS = (*head_sweep.HIDDEN, FINETUNE)


def check(config: Any) -> None:
    """Refuses protocols and a baseline that there are not."""
    check_protocols(config.transfer.protocols, PROTOCOLS, "transfer")
    if config.transfer.baseline and config.transfer.baseline not in BASELINES:
        raise UserError(
            f"unknown transfer.baseline {config.transfer.baseline!r}; {nearest(config.transfer.baseline, BASELINES)}"
        )


def transfer(
    config: Any, task: Task, arm: Arm, adapted: adapt.Adapted, context: RunContext, folder: Path
) -> list[dict[str, Any]]:
    """Measures what an encoder is worth on a task.

    Args:
        config: the study's.
        task: the task.
        arm: for the results.
        adapted: the encoder.
        context: what runs need.
        folder: of the arm, for the checkpoints of fine-tuning.

    Returns:
        Lines for `results.jsonl`.
    """
    if task.is_segmentation:
        return segmentation.transfer(config, task, arm, adapted, context, folder)
    model = Classifier(adapted.encoder, len(task.development.classes), config.model.dtype)
    rows: list[dict[str, Any]] = []
    keep = Predictions(task)
    protocols = [name for name in config.transfer.protocols if name != FINETUNE]
    if protocols:
        found = _features(model, adapted, task, arm, context)
        for protocol in protocols:
            context.reporter.advance(0, f"{arm.strategy} seed {arm.seed}  {task.name} {protocol}")
            rows += on_features(config, task, arm, protocol, found, context, keep)
    if FINETUNE in config.transfer.protocols:
        rows += _finetune(config, task, arm, adapted, context, folder, keep)
    if context.workdir:
        keep.write(context.workdir, arm)
    return rows


def _features(
    model: Classifier, adapted: adapt.Adapted, task: Task, arm: Arm, context: RunContext
) -> dict[str, np.ndarray]:
    """Pooled features of all images of a task, and their entry in the ledger; arms of the same weights share them."""
    meter = CostMeter(context.hardware)
    found, made = {}, []
    with meter.clock.span("cache"):
        for split, dataset in task.datasets.items():
            filling = Filling(clock=meter.clock, mesh=context.mesh)
            found[split], activations = store.pooled(
                context.cache, model, adapted.params, adapted.batch_stats, dataset.images, filling
            )
            made.append(activations)
    images = sum(len(dataset) for dataset in task.datasets.values())
    spent = sum(each.ran for each in made)
    reused = [each for each in made if each.reused]
    total = freezing.count(model.encoder.abstract()[0])
    row = Row(
        arm.strategy, arm.seed, "transfer", f"{task.name}/features", images=images, total_params=total,
        model_flops=spent, hardware_flops=spent, cached="filled" if spent else "reused",
        reused_flops=sum(each.flops for each in reused), reused_s=sum(each.seconds for each in reused),
    )  # fmt: skip
    context.ledger.put(meter.finalize(row))
    context.reporter.advance(spent, f"{arm.strategy} seed {arm.seed}  {task.name} features")
    return found


def head_settings(config: Any, protocol: str, objective: Objective) -> head_sweep.HeadSettings:
    """How heads of a protocol are trained."""
    head = config.transfer.head
    return head_sweep.HeadSettings(
        head_sweep.HIDDEN.get(protocol, ()), objective, head.epochs, head.batch_size, head.standardise
    )


def head_points(config: Any) -> list[head_sweep.HyperParams]:
    """The rates and decays that are tried for every head: those of the grid, or the one that the config names."""
    head = config.transfer.head
    rates, decays = head.grid.lr or (head.lr,), head.grid.weight_decay or (head.weight_decay,)
    return [head_sweep.HyperParams(rate, decay) for rate, decay in itertools.product(rates, decays)]


def on_features(
    config: Any,
    task: Task,
    arm: Arm,
    protocol: str,
    found: dict[str, np.ndarray],
    context: RunContext | None,
    keep: Predictions | None = None,
) -> list[dict[str, Any]]:
    """Trains a protocol's heads on features and scores them.

    Args:
        config: the study's.
        task: the task.
        arm: for the results.
        protocol: of `heads.HIDDEN`; any other name is a linear head.
        found: features by split name.
        context: for the ledger; None to keep the cost out of it.
        keep: takes what the heads say of every image; None for nobody.
    """
    development = task.development
    objective = adapt.objective_for(development, config.transfer.head)
    settings = head_settings(config, protocol, objective)
    folds = task.folds(config.transfer.folds, arm.seed)
    meter = CostMeter(context.hardware) if context else None
    labels = development.expected  # losses are linear in the targets
    training, points = [train for train, _ in folds], head_points(config)
    fraction = config.transfer.head.grid.val_fraction
    inner = [task.inner(rows, fraction, arm.seed) for rows in training] if len(points) > 1 else []
    splits = head_sweep.of_folds(training, arm.seed)
    trained = head_sweep.tune(found["development"], labels, splits, inner, settings, points)
    jax.block_until_ready(trained.params)
    if context and meter:
        seconds = meter.clock.wall
        inputs = found["development"].shape[1]
        size = freezing.count(head_sweep.parameter_shapes(inputs, settings.hidden, objective.outputs))
        row = Row(
            arm.strategy, arm.seed, "transfer", f"{task.name}/{protocol}", steps=trained.steps, images=trained.images,
            model_flops=trained.flops, hardware_flops=trained.flops, trainable_params=size, total_params=size,
            peak_flops=context.hardware.peak_for("float32"),
        )  # fmt: skip
        context.ledger.put(dataclasses.replace(meter.finalize(row), train_s=seconds))
        context.reporter.advance(trained.flops, f"{arm.strategy} seed {arm.seed}  {task.name} {protocol}")
    by_split = {split: trained.probabilities(values)[:, 0] for split, values in found.items()}
    held = [(by_split["development"][fold, rows], rows) for fold, (_, rows) in enumerate(folds)]
    others = {split: list(values) for split, values in by_split.items() if split != "development"}
    if keep:
        keep.add(protocol, held, others)
    return list(_score(task, arm, protocol, held, others))


def finetune_run(config: Any, task: Task, arm: Arm, encoder: Encoder, fold: int, train_rows: np.ndarray) -> TrainingRun:
    """Linear probing, then fine-tuning of all layers (LP-FT, arXiv 2202.10054) on one fold's training rows.

    Of these, `val_fraction` is watched instead.

    Raises:
        UserError: ten crops are wanted of images that are no larger than what is cut out of them.
    """
    settings = config.transfer.finetune
    side = task.development.images.size
    if settings.test_crops == 10 and not 0 < settings.augment.patch < side:
        raise UserError(
            f"transfer.finetune.test_crops=10 takes squares out of larger images; expected transfer.finetune.augment.patch "
            f"above 0 and below the side of the images of {task.name!r}, {side}"
        )
    val_rows = np.arange(0)
    if settings.val_fraction:
        train_rows, val_rows = task.inner(train_rows, settings.val_fraction, arm.seed)
    whole = Phase("all", settings.epochs, ("*",), settings.lr, settings.norm, settings.schedule)
    head: tuple[Phase, ...] = ()
    if settings.head_epochs:
        head = (Phase("head", settings.head_epochs, (HEAD,), settings.head_lr, augment=False),)
    objective = adapt.objective_for(task.development, settings)
    return adapt.make_run(
        strategy=arm.strategy,
        seed=arm.seed,
        stage="transfer",
        label=f"{task.name}/{FINETUNE}/fold{fold}/",
        model=Classifier(encoder, objective.outputs, config.model.dtype),
        objective=objective,
        phases=(*head, whole),
        dataset=task.development,
        train_rows=train_rows,
        val_rows=val_rows,
        settings=settings,
        config=config,
    )


def _finetune(
    config: Any, task: Task, arm: Arm, adapted: adapt.Adapted, context: RunContext, folder: Path, keep: Predictions
) -> list[dict[str, Any]]:
    settings = config.transfer.finetune
    folds = task.folds(config.transfer.folds, arm.seed)[: settings.folds]
    held: list[tuple[np.ndarray, np.ndarray]] = []
    others: dict[str, list[np.ndarray]] = {split: [] for split in task.held_out}
    state = folder / f"finetune-{task.name}"
    for fold, (train_rows, held_rows) in enumerate(folds):
        run = finetune_run(config, task, arm, adapted.encoder, fold, train_rows)
        model = run.programs[0].model
        shapes, _ = model.abstract()
        params = {**adapted.params, HEAD: {key: np.zeros(leaf.shape, leaf.dtype) for key, leaf in shapes[HEAD].items()}}
        own = dataclasses.replace(context, checkpoint_dir=state / f"fold{fold}")
        params, batch_stats = adapt.train_with_early_stopping(
            run, params, adapted.batch_stats, own, settings.early_stop
        )
        predict = functools.partial(predictions, run, params, batch_stats, settings.test_crops, context.mesh)
        held.append((predict(task.development.take(held_rows)), held_rows))
        for split, dataset in task.held_out.items():
            others[split].append(predict(dataset))
    keep.add(FINETUNE, held, others)
    rows = list(_score(task, arm, FINETUNE, held, others))
    shutil.rmtree(state)
    return rows


def predictions(
    run: TrainingRun, params: Tree, batch_stats: Tree, crop_number: int, mesh: Mesh, dataset: Dataset
) -> np.ndarray:
    """Probabilities of the squares that the network was trained on: the one in the middle, or the mean of ten."""
    objective = run.programs[0].objective
    forward = ShardedForward(forward_fn(run.programs[0].model, None), params, batch_stats, mesh)
    side = run.programs[-1].augment.size(dataset.images.size)
    rows = np.arange(len(dataset), dtype=np.int32)
    parts = []
    for images, part in pipeline.in_order(dataset, rows, run.batch_size, sharding.local_slice(run.batch_size, mesh)):
        squares = crops.ten(images, side) if crop_number == 10 else [crops.centre(images, side)]
        found = [np.asarray(objective.probabilities(jnp.asarray(forward(square)))) for square in squares]
        parts.append(np.mean(found, 0, dtype=found[0].dtype)[: len(part)] if len(found) > 1 else found[0][: len(part)])
    return np.concatenate(parts)


def _score(
    task: Task,
    arm: Arm,
    protocol: str,
    held: list[tuple[np.ndarray, np.ndarray]],
    others: dict[str, list[np.ndarray]],
) -> Iterator[dict[str, Any]]:
    """Result lines of predicted probabilities: of each fold's held-out rows, and of all rows of the other sets."""
    development = task.development
    labels, classes = development.truth, development.classes
    measure = functools.partial(metrics.classification, classes=classes, ordinal=development.ordinal)
    found = {"development": [measure(labels[rows], values) for values, rows in held]}
    for split, values_of_folds in others.items():
        truth = task.held_out[split].truth
        found[split] = [measure(truth, values) for values in values_of_folds]
    return result_rows(task, arm, protocol, classes, found)


def mean_gradient(dataset: Dataset) -> np.ndarray:
    """Mean absolute horizontal difference of the grey image, float32 [n, 1]: a scalar that knows no anatomy."""
    rows = np.arange(len(dataset))
    parts = [
        np.abs(np.diff(dataset.images.batch(part).astype(np.float32).mean(-1), axis=2)).mean((1, 2))
        for part in np.array_split(rows, max(1, len(rows) // 64))
    ]
    return np.concatenate(parts)[:, None]


BASELINES = {"mean_gradient": mean_gradient}


def baseline(config: Any, task: Task, seed: int, name: str) -> list[dict[str, Any]]:
    """Scores of one scalar per image, or of each pixel by itself, through the same folds: what any encoder has to beat."""
    if task.is_segmentation:
        return segmentation.baseline(config, task, seed)
    found = {split: BASELINES[name](dataset) for split, dataset in task.datasets.items()}
    return on_features(config, task, Arm(BASELINE, seed, "none", "none"), name, found, None)
