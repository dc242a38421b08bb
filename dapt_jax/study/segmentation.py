"""Segmentation tasks: a decoder on a frozen or fine-tuned encoder.

Development scores are of held-out folds, as in `classification`; test and external images are segmented by
the network of each fold in turn, and a score is the mean over folds.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from dapt_jax import metrics
from dapt_jax.data import pipeline
from dapt_jax.data.augment import Augment
from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError
from dapt_jax.losses import SegmentationLoss
from dapt_jax.metrics import Score
from dapt_jax.models import registry
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.models.segmenter import Segmenter
from dapt_jax.parameters import BatchNormMode
from dapt_jax.records import case_scores
from dapt_jax.records.case_scores import CaseScores
from dapt_jax.records.vocabulary import BASELINE
from dapt_jax.runtime import sharding
from dapt_jax.settings import StudySettings
from dapt_jax.settings.training import FROZEN
from dapt_jax.statistics import Aggregation
from dapt_jax.study import adapt
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.overlays import Overlays
from dapt_jax.study.runs import run_options, segmentation_loss
from dapt_jax.study.target_models import Keeper
from dapt_jax.study.tasks import ArmKey, ResultRow, Task, result_rows
from dapt_jax.training import windows
from dapt_jax.training.context import RunContext
from dapt_jax.training.evaluate import ShardedForward
from dapt_jax.training.phases import ByGroup, Phase
from dapt_jax.training.run import RunTag, TrainData, TrainingRun

PIXEL_COLOUR = "pixel_colour"
OVERLAYS = 4
"""Images of each set whose masks the report shows."""


def fold_run(
    study: Study, arm: Arm, task: Task, encoder: Encoder, label: str, train_rows: np.ndarray
) -> TrainingRun[Segmenter]:
    """Return the training of one fold.

    `frozen`: the decoder alone, for all epochs. `finetune`: the decoder alone for the first of them, then all
    layers, each side at a learning rate of its own: what is new learns at `decoder_lr` for as long as it
    trains. The decoder's norms are new and always train.

    Args:
        study: The study.
        arm: The arm.
        task: The task.
        encoder: The arm's encoder.
        label: PROTOCOL/FOLD.
        train_rows: Training rows of the fold.
    """
    settings = study.settings.transfer_of(task.name).segmentation
    train_rows, val_rows = task.watched_split(train_rows, settings.val_fraction, arm.seed)
    loss = segmentation_loss(task.development, settings.loss)
    encoder = registry.for_masks(encoder, settings.drop_path)
    model = Segmenter(encoder, loss.outputs, settings.decoder, study.settings.model.dtype)
    if settings.drop_path > 0 and not model.is_stochastic:
        raise UserError(
            f"transfer.segmentation.drop_path is {settings.drop_path:g}, but neither model {encoder.name!r} nor decoder "
            f"{settings.decoder!r} has residual branches that it could skip; expected 0 or -1"
        )
    # Steps that resize, of decoders on transformers, have no parameters.
    behind = tuple(
        group
        for group in model.groups[len(model.encoder.groups) :]
        if any(path.startswith(f"{group}/") for path in model.kinds)
    )
    train_decoder: ByGroup[BatchNormMode] = tuple((group, "train") for group in behind)
    schedule, views = settings.schedule, settings.num_fixed_views

    def decoder(epochs: int) -> Phase:
        return Phase(
            "decoder",
            epochs,
            behind,
            settings.decoder_lr,
            batch_norm=(*of_frozen, *train_decoder),
            schedule=schedule,
            views=views,
        )

    of_frozen: ByGroup[BatchNormMode] = ()
    if label.partition("/")[0] == FROZEN:
        if settings.frozen_batch_norm == "stats":
            of_frozen = tuple((group, "stats") for group in model.encoder.groups)
        phases: tuple[Phase, ...] = (decoder(settings.decoder_epochs + settings.epochs),)
    else:
        encoder_groups = model.encoder.groups
        whole = Phase(
            "all",
            settings.epochs,
            ("*",),
            settings.lr,
            batch_norm=(*((group, settings.batch_norm) for group in encoder_groups), *train_decoder),
            layer_norm=tuple((group, settings.layer_norm) for group in encoder_groups),
            schedule=schedule,
            views=views,
            lr_multipliers=tuple((group, settings.decoder_lr / settings.lr) for group in behind),
        )
        phases = (decoder(settings.decoder_epochs), whole) if settings.decoder_epochs else (whole,)
    data = TrainData(task.development, train_rows, val_rows)
    tag = RunTag(arm.name, "transfer", f"{task.name}/{label}/")
    options = run_options(study.settings, settings)
    options["augment"] = _reaching(options["augment"], task.development.images.size, settings.overlap)
    return TrainingRun(model, phases, data, loss, seed=arm.seed, tag=tag, **options)


def _reaching(augment: Augment, side: int, overlap: float) -> Augment:
    """Return augmentation whose patches reach beyond images as sliding windows do, for edges to train as well.

    They reach as far as a patch is smaller than the image, at most: where they are nearly of one size, every
    position covers the edges' neighbourhood, and more would be mirror images alone.
    """
    room = side - augment.patch if augment.patch else 0
    return dataclasses.replace(augment, overhang=max(0, min(windows.border(augment.patch, overlap), room)))


def fold_runs(
    study: Study, arm: Arm, task: Task, encoder: Encoder, protocol: str
) -> Iterator[tuple[TrainingRun[Segmenter], np.ndarray]]:
    """Yield the run of every fold that is run, and the rows that it is scored on.

    Args:
        study: The study.
        arm: The arm.
        task: The task.
        encoder: The arm's encoder.
        protocol: `frozen` or `finetune`.
    """
    settings = study.settings.transfer_of(task.name)
    folds = task.folds(settings.folds, arm.seed)[: settings.segmentation.folds]
    for fold, (train_rows, held_rows) in enumerate(folds):
        yield fold_run(study, arm, task, encoder, f"{protocol}/fold{fold}", train_rows), held_rows


def transfer(
    study: Study, arm: Arm, task: Task, adapted: adapt.Adapted, context: RunContext
) -> list[ResultRow]:
    """Measure an encoder on a task of masks; arguments and result are those of `classification.transfer`."""
    settings = study.settings.transfer_of(task.name).segmentation
    rows: list[ResultRow] = []
    workdir = context.study_folder()
    keeper = Keeper(study, arm, task, adapted, context)
    for protocol in settings.protocols:
        state = arm.folder(workdir) / f"{protocol}-{task.name}"
        scores = _Scores(task)
        for fold, (run, held_rows) in enumerate(fold_runs(study, arm, task, adapted.encoder, protocol)):
            model = run.model
            params, batch_stats = model.init(arm.seed)
            params, batch_stats = (
                model.adopt(params, adapted.params),
                model.adopt(batch_stats, adapted.batch_stats),
            )
            own = dataclasses.replace(context, checkpoint_dir=state / f"fold{fold}")
            params, batch_stats = adapt.train_with_early_stopping(
                run, params, batch_stats, own, settings.early_stopping_patience
            )
            keeper.decoder(protocol, run, params, batch_stats, fold, held_rows)
            predict = _predictor(run, params, batch_stats, settings.overlap, context.mesh)
            context.reporter.advance(0, f"{run.title}: segmenting")
            is_shown = fold == 0 and arm.seed == study.settings.seeds[0]
            for split, scored in _in_one_unit(task, held_rows).items():
                overlays = Overlays(scored, OVERLAYS if is_shown else 0)
                found = _scored(scored, predict, run.batch_size, overlays, settings.metrics)
                scores.add(split, scored, found)
                overlays.write(workdir, task.name, split, arm.name, protocol)
        rows += scores.rows(arm.key, protocol)
        scores.write_cases(workdir, arm, protocol)
        shutil.rmtree(state)
    return rows


Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
"""Images uint8 [k, h, w, 3] to masks uint8 [k, h, w], and probabilities float32 [k, h, w, outputs] if known."""


def _predictor(run: TrainingRun, params: Tree, batch_stats: Tree, overlap: float, mesh: Mesh) -> Predict:
    """Return the segmentation function: on whole images, or by windows of the training size."""
    program = run.programs[-1]
    assert isinstance(program.objective, SegmentationLoss)
    forward = ShardedForward(
        windows.probabilities_of(program.model, program.objective), params, batch_stats, mesh
    )
    own = sharding.local_slice(run.batch_size, mesh)
    decide = windows.decide(program.objective)

    def predict(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        side = program.augment.size(images.shape[1])
        if side == images.shape[1]:
            found = forward(images[own])
        else:
            found = windows.sliding(lambda part: forward(part[own]), images, side, overlap, run.batch_size)
        return np.asarray(decide(found)), np.asarray(found)

    return predict


def _in_one_unit(task: Task, rows: np.ndarray) -> dict[str, Dataset]:
    """Return what a fold is scored on by split, with distances in the unit of the task.

    Args:
        task: The task.
        rows: Development rows that the fold is scored on.
    """
    return {
        split: dataset if task.distance_unit == "mm" else dataclasses.replace(dataset, spacing=None)
        for split, dataset in task.scored_sets(rows).items()
    }


class _Scores:
    """Scores of every fold by split: of images, and of the units that they form, if any."""

    def __init__(self, task: Task):
        """Start without folds."""
        self._task = task
        self._scores: dict[Aggregation | None, dict[str, list[list[Score]]]] = {
            level: {split: [] for split in (task.scored, *task.held_out)}
            for level in (None, task.aggregation)
        }
        self._cases: dict[str, list[CaseScores]] = {split: [] for split in (task.scored, *task.held_out)}

    def add(self, split: str, dataset: Dataset, scored: metrics.Segmentation) -> None:
        """Add the images that a fold is scored on."""
        for level, by_split in self._scores.items():
            by_split[split].append((scored.of_units(self._task.units(dataset)) if level else scored).scores())
        images = np.asarray([Path(name).name for name in dataset.images.names])
        dice = scored.per_image()["dice"].astype(np.float32)
        self._cases[split].append(CaseScores(dice, np.asarray(dataset.groups).astype(str), images))

    def write_cases(self, workdir: Path, arm: Arm, protocol: str) -> None:
        """Write the Dice of every image: of held-out folds one after another, of other splits the folds' mean."""
        for split, folds in self._cases.items():
            if not folds:  # a task with train and test, and nothing held out
                continue
            cases = folds[0]
            if split == self._task.scored:
                parts = ([getattr(each, name) for each in folds] for name in ("dice", "groups", "images"))
                cases = CaseScores(*(np.concatenate(part) for part in parts))
            elif len(folds) > 1:
                cases = case_scores.mean_of(folds)
            path = case_scores.path_of(workdir, arm.name, arm.seed, self._task.name, split, protocol)
            case_scores.write(path, cases)

    def rows(self, key: ArmKey, protocol: str) -> Iterator[ResultRow]:
        """Yield lines for `results.jsonl`."""
        for level, by_split in self._scores.items():
            name = level.protocol(protocol) if level else protocol
            yield from result_rows(self._task, key, name, self._task.development.segments, by_split)


def _scored(
    dataset: Dataset, predict: Predict, batch_size: int, overlays: Overlays, names: Sequence[str]
) -> metrics.Segmentation:
    scored = metrics.Segmentation(dataset.segments, dataset.overlapping, names=names)
    foreground = len(dataset.segments) - 1
    is_ranked = not {"auc_pooled", "ap_pooled"}.isdisjoint(names)
    for images, rows in pipeline.in_order(dataset, np.arange(len(dataset)), batch_size):
        masks, probabilities = predict(images)
        predicted = dataset.without_padding(masks[: len(rows)], rows)
        ranked = None
        if is_ranked and probabilities is not None:
            ranked = probabilities[: len(rows), ..., -foreground:]
        inside = np.array([dataset.images.inside(int(row)) for row in rows])
        scored.add(dataset.targets[rows], predicted, dataset.pixel_sizes(rows), ranked, inside)
        overlays.add(rows, images, predicted)
    return scored


def baseline(settings: StudySettings, task: Task, seed: int) -> list[ResultRow]:
    """Return scores of a per-pixel colour classifier, over the folds of the networks.

    A logistic regression on the three channels and their squares, fitted to at most 200 pixels of each image.

    Args:
        settings: Settings of the study.
        task: The task.
        seed: Seed of the folds and of the sample.
    """
    rng = np.random.default_rng(seed)
    development = task.development
    scores = _Scores(task)
    transfer = settings.transfer_of(task.name)
    for train_rows, held_rows in task.folds(transfer.folds, seed)[: transfer.segmentation.folds]:
        places = rng.integers(development.images.size**2, size=(len(train_rows), 200))
        sampled, said = [], []
        for row, place in zip(train_rows, places, strict=True):
            sampled.append(_colours(development.images[row][None])[0].reshape(-1, 6)[place])
            said.append(development.targets[row].reshape(-1)[place])
        fitted = _fit(np.concatenate(sampled), np.concatenate(said))

        def predict(
            images: np.ndarray, fitted: Callable[[np.ndarray], np.ndarray] = fitted
        ) -> tuple[np.ndarray, None]:
            return fitted(_colours(images).reshape(-1, 6)).reshape(images.shape[:3]), None

        for split, scored in _in_one_unit(task, held_rows).items():
            names = transfer.segmentation.metrics
            scores.add(split, scored, _scored(scored, predict, 16, Overlays(scored, 0), names))
    return list(scores.rows(ArmKey(BASELINE, seed, "none", "none"), PIXEL_COLOUR))


def _colours(images: np.ndarray) -> np.ndarray:
    """Channels from 0 to 1 and their squares, float32 [k, h, w, 6]."""
    scaled = images.astype(np.float32) / 255
    return np.concatenate([scaled, scaled**2], -1)


def _fit(pixels: np.ndarray, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A classifier of the values of masks; where the sample holds one value alone, that value."""
    if len(np.unique(values)) == 1:
        only = values[0]
        return lambda asked: np.full(len(asked), only, np.uint8)
    from sklearn.linear_model import LogisticRegression  # a second to import, which a plan does not need

    fitted = LogisticRegression(max_iter=200).fit(pixels, values)
    return lambda asked: fitted.predict(asked).astype(np.uint8)
