"""One run of domain-adaptive pre-training: weights in, phases, adapted weights out (arXiv 2204.13280)."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dapt_jax.data.augment import Augment
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.mix import Mix
from dapt_jax.data.splits import grouped_holdout
from dapt_jax.errors import UserError
from dapt_jax.losses import AnyObjective, Objective
from dapt_jax.losses.classification import of_classes
from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.runtime import atomic_files, processes
from dapt_jax.study.scorer import Scorer
from dapt_jax.study.strategies import Strategy
from dapt_jax.training import loop, optim
from dapt_jax.training.cache.policy import Caching
from dapt_jax.training.context import RunContext
from dapt_jax.training.early_stopping import EarlyStopping
from dapt_jax.training.phases import Phase
from dapt_jax.training.run import ModelT, RunTag, TrainData, TrainingRun
from dapt_jax.transferability.settings import Settings
from dapt_jax.weights import export, locate

ADAPTED = "adapted.safetensors"
"""Name of the file, in an arm's folder, that says its adaptation is finished."""

VAL_FRACTION = 0.1
"""Share of a corpus on which the loss is watched, where the config does not say another."""

LOSS_SETTINGS = ("loss", "focal_gamma", "focal_alpha", "gamma_positive", "gamma_negative", "margin")
"""Settings of a loss of classes, beside label smoothing."""

SCORED = "scored"
"""Folder, in an arm's, of the weights of scored epochs."""


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What adaptation hands on.

    Attributes:
        encoder: cut where the strategy cuts.
        params: of the encoder.
        batch_stats: of the encoder.
        source: what the weights were before, in words.
    """

    encoder: Encoder
    params: Tree
    batch_stats: Tree
    source: str


def objective_for(dataset: Dataset, settings: Any) -> Objective:
    """The loss of a corpus: `settings.single_logit` makes two classes one sigmoid output, as in the paper.

    Raises:
        UserError: the loss does not go with the set's labels.
    """
    try:
        return of_classes(
            len(dataset.classes),
            multi_label=dataset.multi_label,
            single_logit=bool(settings.get("single_logit", False)),
            smoothing=settings.label_smoothing,
            uncertain=dataset.uncertain,
            **{name: settings[name] for name in LOSS_SETTINGS},
        )
    except UserError as error:
        raise UserError(f"{dataset.name}: {error}") from error


def inverse_frequency_weights(dataset: Dataset, rows: np.ndarray) -> tuple[float, ...]:
    """Weights of rows by the inverse frequency of their class among them, 1 on average; multi-label rows weigh 1."""
    if dataset.multi_label:
        return ()
    labels = dataset.labels[rows]
    counts = np.bincount(labels, minlength=len(dataset.classes))
    return tuple(float(weight) for weight in len(rows) / (np.count_nonzero(counts) * counts[labels]))


def make_run(
    *,
    strategy: str,
    seed: int,
    stage: str,
    label: str,
    model: ModelT,
    objective: AnyObjective,
    phases: tuple[Phase, ...],
    dataset: Dataset,
    train_rows: np.ndarray,
    val_rows: np.ndarray,
    settings: Any,
    config: Any,
) -> TrainingRun[ModelT]:
    """Return a run from a config's settings: its `adapt`, its `transfer.finetune` or its `transfer.segmentation`."""
    weights = inverse_frequency_weights(dataset, train_rows) if settings.get("balance_classes", False) else ()
    return TrainingRun(
        model,
        phases,
        TrainData(dataset, train_rows, val_rows, weights),
        objective,
        optimizer=optim.Optimizer(**settings.optimizer.to_dict()),
        augment=Augment(**settings.augment.to_dict()),
        mix=Mix(**settings.get("mix", {})),
        plateau=optim.Plateau(**settings.get("plateau", {})),
        caching=Caching.of(config.cache),
        batch_size=settings.batch_size,
        grad_accum_steps=settings.accumulate,
        batch_norm_groups=jax.device_count() if config.model.batch_norm == "per_device" else 1,
        seed=seed,
        tag=RunTag(strategy, stage, label),
    )


def train_with_early_stopping(
    run: TrainingRun, params: Tree, batch_stats: Tree, context: RunContext, patience: int
) -> tuple[Tree, Tree]:
    """Train a run of a target task; with `patience`, until its validation loss falls no longer.

    Args:
        run: The run.
        params: Parameters before it.
        batch_stats: Batch-norm statistics before it.
        context: Surroundings.
        patience: Epochs in a row without a lower loss that are let pass; 0 to run all epochs.

    Returns:
        Parameters and statistics of the last epoch, or with `patience` of the best.
    """
    if not patience:
        trained = loop.train(run, params, batch_stats, context)
        return trained.params, trained.batch_stats
    folder = context.checkpoint_dir
    stop = EarlyStopping(patience, run, folder.with_name(f"{folder.name}-best.safetensors") if folder else None)
    last = loop.train(run, params, batch_stats, dataclasses.replace(context, callbacks=(*context.callbacks, stop)))
    context.reporter.skip(run.flops() - run.flops(stop.done))
    return stop.best_weights(last.params, last.batch_stats)


def corpus_settings(config: Any, name: str) -> Any:
    """What a config says of a corpus by its name; "" is `config.corpus`."""
    return config.corpora[name] if name else config.corpus


def dapt_run(config: Any, strategy: Strategy, seed: int, corpus: Dataset) -> TrainingRun[Classifier]:
    """The run that adapts an encoder to a corpus: split by patient, phases as the strategy says."""
    if fraction := corpus_settings(config, strategy.corpus).get("val_fraction", VAL_FRACTION):
        train_rows, val_rows = grouped_holdout(corpus.labels, corpus.groups, fraction, seed)
    else:
        train_rows, val_rows = np.arange(len(corpus)), np.arange(0)
    objective = objective_for(corpus, config.adapt)
    return make_run(
        strategy=strategy.name,
        seed=seed,
        stage="dapt",
        label="",
        model=Classifier(strategy.encoder, objective.outputs, config.model.dtype),
        objective=objective,
        phases=strategy.phases,
        dataset=corpus,
        train_rows=train_rows,
        val_rows=val_rows,
        settings=config.adapt,
        config=config,
    )


def adapt(
    config: Any,
    strategy: Strategy,
    seed: int,
    corpus: Dataset | None,
    context: RunContext,
    folder: Path,
    target: Dataset | None = None,
    until: int = 0,
) -> Adapted:
    """Loads the source weights and trains them further; a finished run is read back instead of run again.

    Args:
        config: the study's.
        strategy: what is trained when.
        seed: of the run.
        corpus: the in-domain images; not needed by strategies without phases.
        context: what the run needs of its surroundings.
        folder: of this arm, under `checkpoints/`.
        target: images that are scored along the way, where the config says so: see `transferability.scorer`.
        until: epochs after which a scored run ends, though its phases go on; 0 for all of them.
    """
    finished = folder / ADAPTED
    if not strategy.phases:
        model = Classifier(strategy.encoder, 1, config.model.dtype)
        params, batch_stats, merged = locate.load(strategy.weights, model, seed=seed)
        return Adapted(strategy.encoder, without_head(params), batch_stats, merged.source)
    if processes.sync_file(finished):
        processes.sync_file(folder / "adapted.json")
        params, batch_stats, _ = locate.load(
            str(finished), Classifier(strategy.encoder, 1, config.model.dtype), seed=seed
        )
        source = json.loads((folder / "adapted.json").read_text())["source"]
        return Adapted(strategy.encoder, without_head(params), batch_stats, source)
    if corpus is None:
        raise ValueError(f"strategy {strategy.name!r} has phases; expected a corpus to train them on")
    run = dapt_run(config, strategy, seed, corpus)
    params, batch_stats, merged = locate.load(strategy.weights, run.model, seed=seed)
    scorer = scorer_for(config, run, target, context, folder, until)
    callbacks = (*context.callbacks, scorer) if scorer else context.callbacks
    own = dataclasses.replace(context, checkpoint_dir=folder / "state", callbacks=callbacks)
    trained = loop.train(run, params, batch_stats, own)
    params, batch_stats = trained.params, trained.batch_stats
    if scorer:
        params, batch_stats = scorer.chosen(params, batch_stats)
    about = {
        "model": strategy.encoder.name,
        "groups": strategy.encoder.groups,
        "classes": corpus.classes,
        "images": len(corpus),
        "source": merged.source,
        "strategy": strategy.name,
        "seed": seed,
        "image_size": config.model.image_size,
        "scored": scorer.points if scorer else [],
    }
    atomic_files.write_text(folder / "adapted.json", json.dumps(about, indent=1) + "\n")
    export.write(finished, params, batch_stats)
    shutil.rmtree(folder / "state")
    if not config.score.downstream:
        shutil.rmtree(folder / SCORED, ignore_errors=True)
    return Adapted(strategy.encoder, without_head(params), batch_stats, merged.source)


def scorer_for(
    config: Any, run: TrainingRun[Classifier], target: Dataset | None, context: RunContext, folder: Path, until: int = 0
) -> Scorer | None:
    """Who scores a run along the way, where the config wants scores: pausing after `until` epochs, if that is not 0."""
    settings = Settings.of(config)
    return Scorer(settings, run, target, folder / SCORED, context, until) if settings and target is not None else None


def without_head(params: Tree) -> Tree:
    """An encoder's parameters alone."""
    return {key: value for key, value in params.items() if key != HEAD}
