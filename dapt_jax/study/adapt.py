"""One run of domain-adaptive pre-training: weights in, phases, adapted weights out (arXiv 2204.13280)."""

import dataclasses
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from dapt_jax.losses import ClassificationLoss
from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.objectives import SUPERVISED
from dapt_jax.objectives.network import Pretext
from dapt_jax.runtime import atomic_files, processes
from dapt_jax.study import balance, collapse
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.scorer import Scorer
from dapt_jax.training import freezing, label_free, loop
from dapt_jax.training.callbacks import Callback
from dapt_jax.training.context import RunContext
from dapt_jax.training.early_stopping import EarlyStopping
from dapt_jax.training.run import TrainingRun
from dapt_jax.transferability import registry
from dapt_jax.weights import export, locate
from dapt_jax.weights.run_reference import ABOUT, ADAPTED, EPOCHS, epoch_file

BEST = "best.safetensors"
"""File, in an arm's folder while it trains, of the epoch of the lowest held-out loss."""

SCORED = "scored"
"""Folder, in an arm's, of the weights of scored epochs."""


class EpochKeeper(Callback):
    """Callback that writes the encoder after each epoch that is kept, and its scores where it has any."""

    def __init__(
        self,
        folder: Path,
        kept: Collection[int],
        encoder: Encoder,
        origin: Mapping[str, Any],
        scorer: Scorer | None,
    ):
        """Write nothing yet.

        Args:
            folder: Folder of the files; see `run_reference.epoch_file`.
            kept: Numbers of epochs after which the encoder is kept.
            encoder: The encoder as it is trained.
            origin: Where it comes from: strategy, seed, source weights, image size.
            scorer: Callback before this one that scores epochs; None where nothing is scored.
        """
        self.folder, self.kept, self.encoder, self.origin, self.scorer = folder, kept, encoder, origin, scorer

    def after_epoch(
        self, phase: int, epoch: int, params: Tree, batch_stats: Tree, metrics: Mapping[str, float]
    ) -> bool:
        """Write the encoder when due: see `Callback`."""
        if epoch + 1 in self.kept:
            points = self.scorer.points if self.scorer else []
            scores: Mapping[str, float | None] = next(
                (point["scores"] for point in points if point["epoch"] == epoch), {}
            )
            origin = {**self.origin, "epoch": epoch + 1, **metrics, "scores": scores}
            params, batch_stats = jax.device_get((params, batch_stats))
            if self.origin.get("objective", SUPERVISED) != SUPERVISED:
                params = without_head(params)
            file = self.folder / epoch_file(epoch + 1)
            export.write(file, self.encoder.merged(params), batch_stats, self.encoder.base, origin)
        return False


@dataclasses.dataclass(frozen=True)
class Adapted:
    """An adapted encoder.

    Attributes:
        encoder: The encoder, cut where the strategy cuts.
        params: Its parameters.
        batch_stats: Its batch-norm statistics.
        source: Description of the source weights.
    """

    encoder: Encoder
    params: Tree
    batch_stats: Tree
    source: str


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """The run that adapts an arm, and what watches it.

    Attributes:
        run: The run.
        start: Parameters and batch-norm statistics that it starts from.
        context: Its surroundings: callbacks, and checkpoints in the arm's folder.
        origin: What is written beside its weights: strategy, seed, source weights, image size.
        scorer: Callback that scores epochs; None where nothing is scored.
        alarm: Callback that watches the rank of the features; None with labels.
        stop: Callback that ends the run early; None where it always ends with its phases.
    """

    run: TrainingRun[Classifier]
    start: tuple[Tree, Tree]
    context: RunContext
    origin: dict[str, Any]
    scorer: Scorer | None
    alarm: collapse.CollapseAlarm | None
    stop: EarlyStopping | None

    def train(self) -> loop.TrainResult:
        """Run all phases, or the remaining ones, until they or a callback end."""
        return loop.train(self.run, *self.start, self.context)


def train_with_early_stopping(
    run: TrainingRun, params: Tree, batch_stats: Tree, context: RunContext, patience: int
) -> tuple[Tree, Tree]:
    """Train a run of a target task, and return its parameters and batch-norm statistics.

    Args:
        run: The run.
        params: Parameters to start from.
        batch_stats: Batch-norm statistics to start from.
        context: Surroundings of the run.
        patience: Epochs without a lower validation loss before the run stops at its best epoch; 0 to disable.
    """
    if not patience:
        trained = loop.train(run, params, batch_stats, context)
        return trained.params, trained.batch_stats
    folder = context.checkpoint_dir
    stop = EarlyStopping(
        patience, run, folder.with_name(f"{folder.name}-best.safetensors") if folder else None
    )
    last = loop.train(
        run, params, batch_stats, dataclasses.replace(context, callbacks=(*context.callbacks, stop))
    )
    context.reporter.skip(run.flops() - run.flops(stop.done))
    return stop.best_weights(last.params, last.batch_stats)


def adapt(study: Study, arm: Arm, context: RunContext, max_epochs: int = 0) -> Adapted:
    """Load an arm's source weights and adapt them; a finished run is read instead of repeated.

    Args:
        study: The study.
        arm: The arm.
        context: Environment of the run; its workdir is required for an arm that is adapted.
        max_epochs: Epochs after which a scored run ends before the end of its phases; 0 for no limit.
    """
    strategy, dtype = arm.strategy, study.settings.model.dtype
    if not strategy.phases:
        params, batch_stats, merged = study.load_weights(arm, Classifier(strategy.encoder, 1, dtype))
        return Adapted(strategy.encoder, without_head(params), batch_stats, merged.source)
    arm = study.adapting(arm)
    folder = arm.folder(context.study_folder())
    if processes.sync_file(folder / ADAPTED):
        shutil.rmtree(folder / "state", ignore_errors=True)  # where a kill came between the two
        context.reporter.skip(sum(each.flops() for each in study.runs_of(arm)))
        return dataclasses.replace(
            load_adapted(arm, str(folder / ADAPTED), dtype), source=read_about(folder)["source"]
        )
    adaptation = prepared(study, arm, context, max_epochs)
    run, scorer, stop, origin = adaptation.run, adaptation.scorer, adaptation.stop, adaptation.origin
    trained = adaptation.train()
    params, batch_stats = trained.params, trained.batch_stats
    epochs = scorer.done if scorer else run.timeline.epochs
    chosen_epoch = scorer.chosen_epochs(epochs) if scorer else epochs
    if scorer:
        params, batch_stats = scorer.chosen(params, batch_stats)
    if stop:
        params, batch_stats = stop.best_weights(params, batch_stats)
        epochs, chosen_epoch = stop.done, stop.epoch + 1
        context.reporter.skip(run.flops() - run.flops(stop.done))
    params = run.model.encoder.merged(params)
    about = {
        "model": strategy.encoder.name,
        "groups": strategy.encoder.groups,
        "classes": run.dataset.classes,
        "images": len(run.dataset),
        **origin,
        "epochs": epochs,
        "chosen_epoch": chosen_epoch,
        "scored": scorer.points if scorer else [],
        "label_free": is_label_free(study, arm),
    }
    if alarm := adaptation.alarm:
        about["rankme_before"] = alarm.starts[-1]
        params = without_head(params)
    atomic_files.write_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")
    origin["epoch"] = about["chosen_epoch"]
    export.write(folder / ADAPTED, params, batch_stats, strategy.encoder, origin)
    shutil.rmtree(folder / "state")
    if stop and processes.is_primary():
        (folder / BEST).unlink(missing_ok=True)
    if not study.settings.checkpoint_scoring.downstream:
        shutil.rmtree(folder / SCORED, ignore_errors=True)
    return Adapted(strategy.encoder, without_head(params), batch_stats, origin["source"])


def prepared(study: Study, arm: Arm, context: RunContext, max_epochs: int = 0) -> Adaptation:
    """Return the adaptation of an arm, ready to train in its folder.

    Args:
        study: The study.
        arm: The arm, which is adapted.
        context: Environment of the run.
        max_epochs: Epochs after which a scored run pauses or ends; 0 for no limit.
    """
    strategy, settings, folder = arm.strategy, study.settings, arm.folder(context.study_folder())
    params, batch_stats, source = _start(study, arm, context)
    clusters = settings.adapt.balance_clusters
    run = balance.balanced(study.run_of(arm), clusters, (params, batch_stats), folder, context)
    is_last = not strategy.part
    scorer = scorer_for(study, arm, context, max_epochs) if is_last else None
    callbacks = (*context.callbacks, scorer) if scorer else context.callbacks
    origin: dict[str, Any] = {
        "strategy": strategy.name,
        "seed": arm.seed,
        "source": source,
        "image_size": settings.model.image_size,
        "resize": settings.model.resize,
        "objective": strategy.objective,
        "head": _kind_of_head(run),
    }
    if is_last and (kept := study.kept_epochs(arm)):
        callbacks = (*callbacks, EpochKeeper(folder / EPOCHS, kept, run.model.encoder, origin, scorer))
    alarm = None
    if strategy.is_label_free:
        alarm = collapse.alarm_for(run, params, batch_stats, settings.monitoring.collapse, context)
        callbacks = (*callbacks, alarm)
        if line := label_free.warning(strategy.name, run.programs[0]):
            context.reporter.say(line)
    stop = None
    if patience := settings.adapt.early_stopping_patience:
        stop = EarlyStopping(patience, run, folder / BEST)
        callbacks = (*callbacks, stop)
    own = dataclasses.replace(context, checkpoint_dir=folder / "state", callbacks=callbacks)
    return Adaptation(run, (params, batch_stats), own, origin, scorer, alarm, stop)


def start(study: Study, arm: Arm, model: Classifier) -> tuple[Tree, Tree, str]:
    """Return the source weights of an arm for the model of its run, and a description of their source.

    Args:
        study: The study.
        arm: The arm.
        model: Model of the run; its low-rank updates start at zero.
    """
    params, batch_stats, merged = study.load_weights(arm, _loader(model))
    return _with_updates(model, params, arm.seed), batch_stats, merged.source


def _with_updates(model: Classifier, params: Tree, seed: int) -> Tree:
    """Return parameters for a model with low-rank updates, which start at zero; unchanged without any.

    The head of a label-free objective is drawn.
    """
    if isinstance(model, Pretext):
        return freezing.overlay(model.init(seed)[0], without_head(params))
    return params if model.base is model else freezing.overlay(model.init(seed)[0], params)


def _loader(model: Classifier) -> Classifier:
    """Return the model that receives the source weights of a run's model."""
    return Classifier(model.encoder.base, 1, model.dtype) if isinstance(model, Pretext) else model.base


def _kind_of_head(run: TrainingRun) -> str:
    """Return softmax where the head gives probabilities of exclusive classes; empty otherwise."""
    loss = run.loss
    is_softmax = (
        isinstance(loss, ClassificationLoss)
        and not loss.multi_label
        and loss.outputs > 1
        and loss.name != "ordinal"
    )
    return "softmax" if is_softmax else ""


def _start(study: Study, arm: Arm, context: RunContext) -> tuple[Tree, Tree, str]:
    """Return the parameters and statistics that an arm's run starts from, and their origin in words.

    They are the source weights, or the encoder of the phases on another corpus before, with a new head.
    """
    model = study.run_of(arm).model
    if arm.before is None:
        return start(study, arm, model)
    adapted = adapt(study, arm.before, context)
    file = arm.before.folder(context.study_folder()) / ADAPTED
    params, batch_stats, _ = locate.load(str(file), _loader(model), seed=arm.seed, head="new")
    return _with_updates(model, params, arm.seed), batch_stats, adapted.source


def is_label_free(study: Study, arm: Arm) -> bool:
    """Return whether no label touched an arm's training, stopping or choice of a checkpoint."""
    scores = study.scores
    chooses = registry.entry(scores.select).needs if scores and scores.select else ""
    budget = study.settings.compute_budget
    return arm.strategy.is_label_free and not budget and chooses in ("", "nothing", "views")


def load_adapted(arm: Arm, weights: str, dtype: str) -> Adapted:
    """Return an arm's encoder with unadapted weights, without its head.

    Args:
        arm: The arm.
        weights: Weights, as the setting `weights` names them.
        dtype: Dtype of activations.
    """
    encoder = arm.strategy.encoder
    params, batch_stats, merged = locate.load(weights, Classifier(encoder, 1, dtype), seed=arm.seed)
    return Adapted(encoder, without_head(params), batch_stats, merged.source)


def read_about(folder: Path) -> dict[str, Any]:
    """Return the metadata of an arm's finished weights.

    Args:
        folder: Folder of the arm.
    """
    processes.sync_file(folder / ABOUT)
    return json.loads((folder / ABOUT).read_text(encoding="utf-8"))


def scorer_for(study: Study, arm: Arm, context: RunContext, max_epochs: int = 0) -> Scorer | None:
    """Return the scorer of an arm; None where nothing is scored.

    Args:
        study: The study.
        arm: The arm.
        context: Surroundings of the run.
        max_epochs: Epochs after which the run pauses; 0 for none.
    """
    images = study.scored_images
    if study.scores is None or images is None:
        return None
    folder = arm.folder(context.study_folder()) / SCORED
    run, kept = study.run_of(arm), study.kept_epochs(arm)
    return Scorer(study.scores, run, images, folder, context, max_epochs, kept)


def without_head(params: Tree) -> Tree:
    """Return an encoder's parameters alone."""
    return {key: value for key, value in params.items() if key != HEAD}
