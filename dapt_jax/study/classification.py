"""Classification tasks: heads on frozen features, or fine-tuning.

See `segmentation` for tasks with masks. Development scores come from held-out folds, stratified and split by
patient. Test and external images are scored by the heads of each fold without refitting; a score is the mean
over folds.
"""

import dataclasses
import functools
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dapt_jax import metrics
from dapt_jax.cost import flops
from dapt_jax.data import crops, pipeline
from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError
from dapt_jax.losses import ClassificationLoss
from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.records.ledger import Row
from dapt_jax.records.vocabulary import BASELINE
from dapt_jax.runtime import processes, sharding
from dapt_jax.settings import StudySettings
from dapt_jax.settings.training import DECAYS, FINETUNE, HeadSettings
from dapt_jax.statistics import Units
from dapt_jax.study import adapt, head_curves, saliency, samples, segmentation
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.predictions import FoldPredictions, Predictions, classes_outside
from dapt_jax.study.runs import classification_loss, run_options
from dapt_jax.study.target_models import Keeper
from dapt_jax.study.tasks import ArmKey, ResultRow, Task, result_rows
from dapt_jax.training import approximations, freezing, head_sweep, linear_head
from dapt_jax.training.cache import store
from dapt_jax.training.cache.fill import Filling
from dapt_jax.training.context import RunContext
from dapt_jax.training.cost_meter import CostMeter
from dapt_jax.training.evaluate import ShardedForward, forward_fn
from dapt_jax.training.phases import Phase
from dapt_jax.training.run import RunTag, TrainData, TrainingRun


def transfer(
    study: Study, arm: Arm, task: Task, adapted: adapt.Adapted, context: RunContext
) -> list[ResultRow]:
    """Evaluate an encoder on a target task.

    Args:
        study: The study.
        arm: The arm.
        task: The task, of classes or of masks.
        adapted: The arm's encoder.
        context: Surroundings of runs.

    Returns:
        Lines for `results.jsonl`.
    """
    if task.is_segmentation:
        return segmentation.transfer(study, arm, task, adapted, context)
    settings = study.settings.transfer_of(task.name)
    rows: list[ResultRow] = []
    predictions = Predictions(task)
    keeper = Keeper(study, arm, task, adapted, context)
    protocols = [name for name in settings.protocols if name != FINETUNE]
    shown = study.settings.report.primary_of(settings.protocols)
    explainer: saliency.Explainer | None = None
    is_shown = arm.seed == study.settings.seeds[0] and not arm.epochs and processes.is_primary()
    if protocols:
        model = Classifier(adapted.encoder, len(task.development.classes), study.settings.model.dtype)
        features = _features(model, adapted, task, arm, context)
        if context.workdir and is_shown:
            samples.write_feature_map(context.workdir, arm, task, features)
        for protocol in protocols:
            context.reporter.advance(0, f"{arm.title}  {task.name} {protocol}")
            heads = HeadRun(study.settings.of_task(task.name), task, arm.key, protocol)
            keep: list[Keep] = [functools.partial(keeper.heads, protocol)]
            if context.workdir and is_shown and protocol == shown:
                of_heads = explainer = saliency.HeadExplainer(adapted, task, model, context)
                keep.append(of_heads.hold)
            rows += heads.measure(features, context, predictions, keep)
    if FINETUNE in settings.protocols:
        networks = None
        if context.workdir and is_shown and shown == FINETUNE and not task.development.multi_label:
            networks = explainer = saliency.NetworkExplainer(task, context)
        rows += _finetune(keeper, predictions, networks)
    if context.workdir:
        predictions.write(context.workdir, arm.name, arm.seed)
        if is_shown:
            samples.write_examples(context.workdir, arm, task, shown, predictions.by_split, explainer)
            if explainer:
                explainer.account(arm)
    return rows


def _features(
    model: Classifier, adapted: adapt.Adapted, task: Task, arm: Arm, context: RunContext
) -> dict[str, np.ndarray]:
    """Return pooled features of a task's images by split; arms of the same weights share them."""
    meter = CostMeter(context.hardware)
    features, made = {}, []
    filling = Filling(clock=meter.clock, mesh=context.mesh)
    with meter.clock.span("cache"):
        for split, dataset in task.datasets.items():
            features[split], activations = store.pooled(
                context.cache, model, adapted.params, adapted.batch_stats, dataset.images, filling
            )
            made.append(activations)
    spent = sum(each.ran for each in made)
    reused = [each for each in made if each.reused]
    row = Row(
        arm.name,
        arm.seed,
        "transfer",
        f"{task.name}/features",
        images=sum(len(dataset) for dataset in task.datasets.values()),
        total_params=freezing.count(model.encoder.abstract()[0]),
        model_flops=spent,
        hardware_flops=spent,
        cached="filled" if spent else "reused",
        reused_flops=sum(each.flops for each in reused),
        reused_s=sum(each.seconds for each in reused),
        approximations=approximations.of_cache(
            "features",
            store.pooled_prefix(model),
            task.development.images.size,
            context.cache.dtype,
            max(each.rounding_error for each in made),
        ),
    )
    context.ledger.put(meter.finalize(row))
    context.reporter.advance(spent, f"{arm.title}  {task.name} features")
    return features


def sweep_settings(head: HeadSettings, protocol: str, loss: ClassificationLoss) -> head_sweep.HeadSettings:
    """Return the training settings of the perceptrons of a protocol.

    Args:
        head: Settings of heads.
        protocol: A protocol of `head_sweep.HIDDEN`.
        loss: Loss of the task.
    """
    return head_sweep.HeadSettings(
        head_sweep.HIDDEN[protocol], loss, head.epochs, head.batch_size, head.standardise, head.early_stopping
    )


def hyper_params(head: HeadSettings) -> list[head_sweep.HyperParams]:
    """Return the grid of learning rates and weight decays of every perceptron."""
    decays = head.grid.weight_decay or (DECAYS if head.grid.nested else (head.weight_decay,))
    rates = head.grid.lr or (head.lr,)
    return [head_sweep.HyperParams(rate, decay) for rate, decay in itertools.product(rates, decays)]


def inner_parts(
    task: Task, splits: Sequence[np.ndarray], head: HeadSettings, seed: int
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Return the rows to fit on and to validate on that choose settings and epochs of each fold's perceptrons.

    Args:
        task: The task.
        splits: Training rows of each fold.
        head: Settings of heads.
        seed: Seed of the run.
    """
    choices = len(hyper_params(head)) + head.early_stopping
    if choices == 1 or head.grid.nested or head.early_stopping:
        return task.inner_folds(splits, choices, seed)
    return [[task.inner_split(rows, head.grid.val_fraction, seed)] for rows in splits]


Keep = Callable[[head_sweep.Heads | linear_head.LinearHeads, np.ndarray, FoldPredictions], None]


@dataclasses.dataclass(frozen=True)
class HeadRun:
    """The heads of one protocol on one task's features.

    Attributes:
        settings: Settings of the study.
        task: The task.
        key: Key of the results.
        protocol: A protocol of perceptrons (`head_sweep.HIDDEN`); any other name is a linear head.
    """

    settings: StudySettings
    task: Task
    key: ArmKey
    protocol: str

    def measure(
        self,
        features: dict[str, np.ndarray],
        context: RunContext | None,
        predictions: Predictions | None = None,
        keep: Sequence[Keep] = (),
    ) -> list[ResultRow]:
        """Train the heads on features and score them.

        Args:
            features: Features by split.
            context: Environment with the ledger for their cost; None to omit it.
            predictions: Receiver of the probabilities of every image; None to discard them.
            keep: Receivers of the heads, the development features and the out-of-fold probabilities.

        Returns:
            Lines for `results.jsonl`.
        """
        folds = self.task.folds(self.settings.transfer.folds, self.key.seed)
        meter = CostMeter(context.hardware) if context else None
        trained = self._train(features, [train for train, _ in folds])
        if context and meter:
            self._account(trained, context, meter)
        if isinstance(trained, linear_head.LinearHeads) and (line := trained.not_converged()):
            line = f"{self.key.strategy} seed {self.key.seed}, {self.task.name} {self.protocol}: {line}"
            (context.reporter.say if context else print)(line)
        by_split = {split: trained.probabilities(values) for split, values in features.items()}
        out_of_fold = [(by_split["development"][fold, rows], rows) for fold, (_, rows) in enumerate(folds)]
        held_out = {split: list(values) for split, values in by_split.items() if split != "development"}
        if predictions:
            predictions.add(self.protocol, out_of_fold, held_out)
        for each in keep:
            each(trained, features["development"], out_of_fold)
        return [
            *score(self.task, self.key, self.protocol, out_of_fold, held_out),
            *self._curves(trained, folds, context),
        ]

    def _curves(
        self,
        trained: head_sweep.Heads | linear_head.LinearHeads,
        folds: list[tuple[np.ndarray, np.ndarray]],
        context: RunContext | None,
    ) -> list[ResultRow]:
        """Write the scores after every epoch, if any were kept, and return their lines."""
        if isinstance(trained, linear_head.LinearHeads):
            return []
        kept = {split: trained.probabilities_by_epoch(split) for split in trained.logits_by_epoch}
        found = head_curves.curves(self.task, folds, kept)
        if context and context.workdir:
            head_curves.write(context.workdir, self.key, self.task, self.protocol, found)
        return list(head_curves.rows(self.task, self.key, self.protocol, found))

    def _train(
        self, features: Mapping[str, np.ndarray], splits: list[np.ndarray]
    ) -> head_sweep.Heads | linear_head.LinearHeads:
        """Return a head for each fold, by the features of each split and the training rows of all folds."""
        own = features["development"]
        development, head, seed = self.task.development, self.settings.transfer.head, self.key.seed
        loss = classification_loss(development, head.loss)
        labels = development.expected  # losses are linear in the targets
        if self.protocol not in head_sweep.HIDDEN:
            inner = self.task.inner_folds(splits, len(head.strengths), seed)
            return linear_head.fit(own, labels, splits, inner, loss, head.strengths, head.standardise)
        settings, grid = sweep_settings(head, self.protocol, loss), hyper_params(head)
        parts = inner_parts(self.task, splits, head, seed)
        watched = features if head.score_every_epoch else None
        seeded = head_sweep.of_folds(splits, seed)
        trained = head_sweep.tune(own, labels, seeded, parts, settings, grid, watched)
        jax.block_until_ready(trained.params)
        return trained

    def _account(
        self, trained: head_sweep.Heads | linear_head.LinearHeads, context: RunContext, meter: CostMeter
    ) -> None:
        """Enter the cost of the heads into the ledger."""
        phase = f"{self.task.name}/{self.protocol}"
        bare = Row(
            self.key.strategy,
            self.key.seed,
            "transfer",
            phase,
            steps=trained.steps,
            images=trained.images,
            model_flops=trained.flops,
            hardware_flops=trained.flops,
            trainable_params=trained.size,
            total_params=trained.size,
            peak_flops=context.hardware.peak_for("float32"),
        )
        row = meter.finalize(bare)
        context.ledger.put(dataclasses.replace(row, train_s=row.wall_s))
        title = f"{self.key.strategy} seed {self.key.seed}  {self.task.name} {self.protocol}"
        context.reporter.advance(trained.flops, title)


def finetune_run(
    study: Study, arm: Arm, task: Task, encoder: Encoder, fold: int, train_rows: np.ndarray
) -> TrainingRun[Classifier]:
    """Return linear probing, then fine-tuning (LP-FT, arXiv 2202.10054), on one fold's training rows.

    Of these, `val_fraction` is held out for validation.

    Args:
        study: The study.
        arm: The arm.
        task: The task.
        encoder: The arm's encoder.
        fold: Number of the fold.
        train_rows: Its training rows.

    Raises:
        UserError: Ten crops are requested, but the images are not larger than the crops.
    """
    settings = study.settings.transfer_of(task.name).finetune
    side = task.development.images.size
    if settings.test_crops == 10 and not 0 < settings.augment.patch < side:
        raise UserError(
            "transfer.finetune.test_crops=10 takes squares out of larger images; expected "
            "transfer.finetune.augment.patch "
            f"above 0 and below the side of the images of {task.name!r}, {side}"
        )
    train_rows, val_rows = task.watched_split(train_rows, settings.val_fraction, arm.seed)
    whole = Phase(
        "all",
        settings.epochs,
        ("*",),
        settings.lr,
        settings.batch_norm,
        settings.layer_norm,
        settings.schedule,
    )
    head: tuple[Phase, ...] = ()
    if settings.head_epochs:
        head = (Phase("head", settings.head_epochs, (HEAD,), settings.head_lr, augment=False),)
    loss = classification_loss(task.development, settings.loss)
    model = Classifier(encoder, loss.outputs, study.settings.model.dtype)
    data = TrainData(task.development, train_rows, val_rows)
    tag = RunTag(arm.name, "transfer", f"{task.name}/{FINETUNE}/fold{fold}/")
    options = run_options(study.settings, settings)
    return TrainingRun(model, (*head, whole), data, loss, seed=arm.seed, tag=tag, **options)


def _finetune(
    keeper: Keeper, predictions: Predictions, explainer: saliency.NetworkExplainer | None
) -> list[ResultRow]:
    """Fine-tune on every fold, and return the scores; the keeper says what of which arm.

    The explainer, if any, receives the network of each fold.
    """
    study, arm, task, adapted, context = (
        keeper.study,
        keeper.arm,
        keeper.task,
        keeper.adapted,
        keeper.context,
    )
    transfer = study.settings.transfer_of(task.name)
    settings = transfer.finetune
    folds = task.folds(transfer.folds, arm.seed)[: settings.folds]
    out_of_fold: FoldPredictions = []
    held_out: dict[str, list[np.ndarray]] = {split: [] for split in task.held_out}
    state = arm.folder(context.study_folder()) / f"finetune-{task.name}"
    for fold, (train_rows, held_rows) in enumerate(folds):
        run = finetune_run(study, arm, task, adapted.encoder, fold, train_rows)
        shapes, _ = run.model.abstract()
        params = {
            **adapted.params,
            HEAD: {key: np.zeros(leaf.shape, leaf.dtype) for key, leaf in shapes[HEAD].items()},
        }
        own = dataclasses.replace(context, checkpoint_dir=state / f"fold{fold}")
        params, batch_stats = adapt.train_with_early_stopping(
            run, params, adapted.batch_stats, own, settings.early_stopping_patience
        )
        predict = functools.partial(
            probabilities, run, params, batch_stats, settings.test_crops, context.mesh
        )
        held = predict(task.development.take(held_rows)) if len(held_rows) else np.zeros((0, 0), np.float32)
        out_of_fold.append((held, held_rows))
        keeper.finetuned(run, params, batch_stats, fold, held, held_rows)
        if explainer:
            explainer.hold(_fold_network(run, params, batch_stats, settings.test_crops), held_rows)
        for split, dataset in task.held_out.items():
            held_out[split].append(predict(dataset))
    predictions.add(FINETUNE, out_of_fold, held_out)
    rows = list(score(task, arm.key, FINETUNE, out_of_fold, held_out))
    shutil.rmtree(state)
    return rows


def _fold_network(run: TrainingRun, params: Tree, batch_stats: Tree, num_crops: int) -> saliency.FoldNetwork:
    """Return the network of a fold, which the host keeps, as a function of any number of images."""
    params, batch_stats = jax.device_get(params), jax.device_get(batch_stats)
    side = run.programs[-1].augment.size(run.dataset.images.size)
    model = run.programs[0].model
    image = jax.ShapeDtypeStruct((1, side, side, model.encoder.channels), np.uint8)

    def predict(images: np.ndarray, mesh: Mesh) -> np.ndarray:
        forward = _forward(run, params, batch_stats, num_crops, mesh)
        size = -(-run.batch_size // mesh.size) * mesh.size
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        filled = (np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)]) for part in parts)
        return np.concatenate([forward(each) for each in filled])[: len(images)]

    spent = flops.count(forward_fn(model, None), params, batch_stats, image).hardware * num_crops
    return saliency.FoldNetwork(predict, spent, freezing.count(params))


def probabilities(
    run: TrainingRun, params: Tree, batch_stats: Tree, num_crops: int, mesh: Mesh, dataset: Dataset
) -> np.ndarray:
    """Return probabilities over crops of the training size, float [images, classes].

    Args:
        run: The run that trained it.
        params: Its parameters.
        batch_stats: Its batch-norm statistics.
        num_crops: 1 for the centre crop, 10 for the mean over corners and centre, each also mirrored.
        mesh: Devices to compute on.
        dataset: The images.
    """
    forward = _forward(run, params, batch_stats, num_crops, mesh)
    rows, own = np.arange(len(dataset), dtype=np.int32), sharding.local_slice(run.batch_size, mesh)
    batches = pipeline.in_order(dataset, rows, run.batch_size, own)
    return np.concatenate([forward(images)[: len(part)] for images, part in batches])


def _forward(
    run: TrainingRun, params: Tree, batch_stats: Tree, num_crops: int, mesh: Mesh
) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from a batch of images to probabilities over crops: see `probabilities`."""
    objective = run.programs[0].objective
    assert isinstance(objective, ClassificationLoss)
    network = ShardedForward(forward_fn(run.programs[0].model, None), params, batch_stats, mesh)
    side = run.programs[-1].augment.size(run.dataset.images.size)

    def forward(images: np.ndarray) -> np.ndarray:
        squares = crops.seen(images, side, num_crops)
        of_crops = [np.asarray(objective.probabilities(jnp.asarray(network(square)))) for square in squares]
        return np.mean(of_crops, 0, dtype=of_crops[0].dtype) if len(of_crops) > 1 else of_crops[0]

    return forward


def score(
    task: Task,
    key: ArmKey,
    protocol: str,
    out_of_fold: FoldPredictions,
    held_out: dict[str, list[np.ndarray]],
) -> Iterator[ResultRow]:
    """Yield result lines of predicted probabilities: of images, then of the units that they form, if any.

    Args:
        task: The task.
        key: Key of the results.
        protocol: The protocol.
        out_of_fold: Probabilities of the development rows that each fold holds out.
        held_out: Probabilities of all images of the other splits, by each fold.
    """
    development, classes = task.development, task.development.classes
    seen = [classes_outside(development, rows) for _, rows in out_of_fold]
    truth, units = development.truth, task.units(development)
    by_split = {
        task.scored: [
            (truth[rows], units[rows], values, known)
            for (values, rows), known in zip(out_of_fold, seen, strict=True)
            if len(rows)
        ]
    }
    for split, of_folds in held_out.items():
        truth, units = task.held_out[split].truth, task.units(task.held_out[split])
        by_split[split] = [
            (truth, units, values, known) for values, known in zip(of_folds, seen, strict=True)
        ]
    measure = functools.partial(
        metrics.classification, classes=classes, ordinal=development.ordinal, subset=task.auc_classes
    )
    for level in dict.fromkeys((None, task.aggregation)):
        scores: dict[str, list[list[metrics.Score]]] = {split: [] for split in by_split}
        for split, parts in by_split.items():
            for labels, names, values, known in parts:
                if level:
                    of = Units.of(names)
                    values = of.probabilities(values, level.rule, development.multi_label)
                    labels = of.labels(labels, len(classes))
                try:
                    scores[split].append(measure(labels, values, seen=known))
                except UserError as error:
                    where = f"{key.strategy} seed {key.seed}, {task.name} {split} {protocol}"
                    raise UserError(f"{where}: {error}") from error
        yield from result_rows(task, key, level.protocol(protocol) if level else protocol, classes, scores)


def mean_gradient(dataset: Dataset) -> np.ndarray:
    """Return the mean absolute horizontal difference of each grey image, float32 [n, 1]."""
    rows = np.arange(len(dataset))
    parts = [
        np.abs(np.diff(dataset.images.batch(part).astype(np.float32).mean(-1), axis=2)).mean((1, 2))
        for part in np.array_split(rows, max(1, len(rows) // 64))
    ]
    return np.concatenate(parts)[:, None]


BASELINES = {"mean_gradient": mean_gradient}


def baseline(settings: StudySettings, task: Task, seed: int) -> list[ResultRow]:
    """Return scores of one scalar per image, or of each pixel alone, over the encoders' folds.

    Args:
        settings: Settings of the study.
        task: The task.
        seed: Seed of the folds.
    """
    if task.is_segmentation:
        return segmentation.baseline(settings, task, seed)
    settings = settings.of_task(task.name)
    name = settings.transfer.baseline
    features = {split: BASELINES[name](dataset) for split, dataset in task.datasets.items()}
    return HeadRun(settings, task, ArmKey(BASELINE, seed, "none", "none"), name).measure(features, None)
