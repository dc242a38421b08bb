"""One target task of masks: a decoder on the encoder, frozen or fine-tuned; scored on development, test and external images.

Development scores are of held-out folds, as `transfer` has them; test and external images are segmented by the network of
each fold in turn, and a score is the mean over folds.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from sklearn.linear_model import LogisticRegression

from dapt_jax import metrics
from dapt_jax.data import pipeline
from dapt_jax.data.dataset import Dataset
from dapt_jax.losses.segmentation import MaskObjective, of_segments
from dapt_jax.metrics import Score
from dapt_jax.models.encoder import Encoder
from dapt_jax.models.segmenter import Segmenter
from dapt_jax.records.overlays import Overlays
from dapt_jax.runtime import sharding
from dapt_jax.settings.defaults import BASELINE
from dapt_jax.study import adapt
from dapt_jax.study.tasks import Arm, Task, check_protocols, result_rows
from dapt_jax.training import windows
from dapt_jax.training.context import RunContext
from dapt_jax.training.evaluate import ShardedForward
from dapt_jax.training.phases import Norm, Phase
from dapt_jax.training.run import TrainingRun

FROZEN, FINETUNE = "frozen", "finetune"
PROTOCOLS = (FROZEN, FINETUNE)
PIXEL_COLOUR = "pixel_colour"
Norms = tuple[tuple[str, Norm], ...]


def check(config: Any) -> None:
    """Refuses settings of segmentation that cannot work, whether or not a task needs them."""
    settings = config.transfer.segmentation
    check_protocols(settings.protocols, PROTOCOLS, "transfer.segmentation")
    MaskObjective(1, loss=settings.loss, batchwise=settings.batchwise, smooth=settings.smooth)


def objective_for(config: Any, task: Task) -> MaskObjective:
    """The loss of a task's masks."""
    settings = config.transfer.segmentation
    return of_segments(
        task.development.segments,
        overlapping=task.development.overlapping,
        loss=settings.loss,
        batchwise=settings.batchwise,
        smooth=settings.smooth,
    )


def run_of(
    config: Any, task: Task, arm: Arm, encoder: Encoder, protocol: str, fold: int, train_rows: np.ndarray
) -> TrainingRun[Segmenter]:
    """The training of one fold.

    `frozen`: the decoder alone, for all epochs. `finetune`: the decoder alone for the first of them, then all layers, each
    side at a rate of its own: what is new learns at `decoder_lr` for as long as it trains. The decoder's batch norm is new and
    trains always.
    """
    settings = config.transfer.segmentation
    val_rows = np.arange(0)
    if settings.val_fraction:
        train_rows, val_rows = task.inner(train_rows, settings.val_fraction, arm.seed)
    objective = objective_for(config, task)
    model = Segmenter(encoder, objective.outputs, settings.decoder, config.model.dtype)
    behind = model.groups[len(model.encoder.groups) :]
    train_decoder: Norms = tuple((group, "train") for group in behind)
    shared = {"schedule": settings.schedule, "views": settings.views}

    def decoder(epochs: int) -> Phase:
        return Phase("decoder", epochs, behind, settings.decoder_lr, norm=train_decoder, **shared)

    if protocol == FROZEN:
        phases: tuple[Phase, ...] = (decoder(settings.decoder_epochs + settings.epochs),)
    else:
        norm: Norms = (*((group, settings.norm) for group in model.encoder.groups), *train_decoder)
        rates = tuple((group, settings.decoder_lr / settings.lr) for group in behind)
        whole = Phase("all", settings.epochs, ("*",), settings.lr, norm=norm, rates=rates, **shared)
        phases = (decoder(settings.decoder_epochs), whole) if settings.decoder_epochs else (whole,)
    return adapt.make_run(
        strategy=arm.strategy,
        seed=arm.seed,
        stage="transfer",
        label=f"{task.name}/{protocol}/fold{fold}/",
        model=model,
        objective=objective,
        phases=phases,
        dataset=task.development,
        train_rows=train_rows,
        val_rows=val_rows,
        settings=settings,
        config=config,
    )


def runs(
    config: Any, task: Task, arm: Arm, encoder: Encoder, protocol: str
) -> Iterator[tuple[TrainingRun[Segmenter], np.ndarray]]:
    """The run of every fold that is run, and the rows that it is scored on."""
    folds = task.folds(config.transfer.folds, arm.seed)[: config.transfer.segmentation.folds]
    for fold, (train_rows, held_rows) in enumerate(folds):
        yield run_of(config, task, arm, encoder, protocol, fold, train_rows), held_rows


def transfer(
    config: Any, task: Task, arm: Arm, adapted: adapt.Adapted, context: RunContext, folder: Path
) -> list[dict[str, Any]]:
    """Measures what an encoder is worth on a task of masks; arguments and result are those of `transfer.transfer`."""
    settings = config.transfer.segmentation
    rows: list[dict[str, Any]] = []
    for protocol in settings.protocols:
        state = folder / f"{protocol}-{task.name}"
        found: dict[str, list[list[Score]]] = {split: [] for split in task.datasets}
        for fold, (run, held_rows) in enumerate(runs(config, task, arm, adapted.encoder, protocol)):
            model = run.model
            params, batch_stats = model.init(arm.seed)
            params, batch_stats = model.adopt(params, adapted.params), model.adopt(batch_stats, adapted.batch_stats)
            own = dataclasses.replace(context, checkpoint_dir=state / f"fold{fold}")
            params, batch_stats = adapt.train_with_early_stopping(run, params, batch_stats, own, settings.early_stop)
            predict = _predictor(run, params, batch_stats, settings, context.mesh)
            context.reporter.advance(0, f"{run.title}: segmenting")
            for split, dataset in _in_one_unit(task).items():
                scored = dataset.take(held_rows) if split == "development" else dataset
                overlays = Overlays(scored, settings.overlays if fold == 0 and arm.seed == config.seeds[0] else 0)
                found[split].append(_scores(scored, predict, run.batch_size, overlays))
                if context.workdir:
                    overlays.write(context.workdir, task.name, split, arm.strategy, protocol)
        rows += result_rows(task, arm, protocol, task.development.segments, found)
        shutil.rmtree(state)
    return rows


Predict = Callable[[np.ndarray], np.ndarray]
"""Images uint8 [k, h, w, 3] to masks uint8 [k, h, w]."""


def _predictor(run: TrainingRun, params: Any, batch_stats: Any, settings: Any, mesh: Mesh) -> Predict:
    """Segments images as they are, or through windows of the side that the network was trained on."""
    program = run.programs[-1]
    assert isinstance(program.objective, MaskObjective)
    spread = ShardedForward(windows.probabilities_of(program.model, program.objective), params, batch_stats, mesh)
    own = sharding.local_slice(run.batch_size, mesh)
    decide = windows.decide(program.objective)

    def predict(images: np.ndarray) -> np.ndarray:
        side = program.augment.size(images.shape[1])
        if side == images.shape[1]:
            return np.asarray(decide(spread(images[own])))
        found = windows.sliding(lambda part: spread(part[own]), images, side, settings.overlap, run.batch_size)
        return np.asarray(decide(found))

    return predict


def _in_one_unit(task: Task) -> dict[str, Dataset]:
    """The images by split; distances are in millimetres where the files of all of them say it, else in pixels for all."""
    known = all(dataset.spacing is not None for dataset in task.datasets.values())
    return {
        split: dataset if known else dataclasses.replace(dataset, spacing=None)
        for split, dataset in task.datasets.items()
    }


def _scores(dataset: Dataset, predict: Predict, batch_size: int, overlays: Overlays) -> list[Score]:
    scored = metrics.Segmentation(dataset.segments, dataset.overlapping)
    for images, rows in pipeline.in_order(dataset, np.arange(len(dataset)), batch_size):
        predicted = predict(images)[: len(rows)]
        scored.add(dataset.targets[rows], predicted, dataset.pixel_sizes(rows))
        overlays.add(rows, images, predicted)
    return scored.scores()


def baseline(config: Any, task: Task, seed: int) -> list[dict[str, Any]]:
    """Scores of telling every pixel by its own colour alone, through the same folds: what any network has to beat.

    A logistic regression on the three channels and their squares, fitted to at most 200 pixels of each training image.
    """
    rng = np.random.default_rng(seed)
    development = task.development
    found: dict[str, list[list[Score]]] = {split: [] for split in task.datasets}
    for train_rows, held_rows in task.folds(config.transfer.folds, seed)[: config.transfer.segmentation.folds]:
        places = rng.integers(development.images.size**2, size=(len(train_rows), 200))
        sampled, said = [], []
        for row, place in zip(train_rows, places, strict=True):
            sampled.append(_colours(development.images[row][None])[0].reshape(-1, 6)[place])
            said.append(development.targets[row].reshape(-1)[place])
        fitted = _fit(np.concatenate(sampled), np.concatenate(said))

        def predict(images: np.ndarray, fitted: Callable[[np.ndarray], np.ndarray] = fitted) -> np.ndarray:
            return fitted(_colours(images).reshape(-1, 6)).reshape(images.shape[:3])

        for split, dataset in _in_one_unit(task).items():
            scored = dataset.take(held_rows) if split == "development" else dataset
            found[split].append(_scores(scored, predict, 16, Overlays(scored, 0)))
    arm = Arm(BASELINE, seed, "none", "none")
    return list(result_rows(task, arm, PIXEL_COLOUR, development.segments, found))


def _colours(images: np.ndarray) -> np.ndarray:
    """Channels from 0 to 1 and their squares, float32 [k, h, w, 6]."""
    scaled = images.astype(np.float32) / 255
    return np.concatenate([scaled, scaled**2], -1)


def _fit(pixels: np.ndarray, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A classifier of the values of masks; where the sample holds one value alone, that value."""
    if len(np.unique(values)) == 1:
        only = values[0]
        return lambda asked: np.full(len(asked), only, np.uint8)
    fitted = LogisticRegression(max_iter=200).fit(pixels, values)
    return lambda asked: fitted.predict(asked).astype(np.uint8)
