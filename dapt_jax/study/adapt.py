"""One run of domain-adaptive pre-training: weights in, phases, adapted weights out (arXiv 2204.13280)."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dapt_jax import losses
from dapt_jax.data.augment import Augment
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.mix import Mix
from dapt_jax.data.splits import grouped_holdout
from dapt_jax.errors import UserError
from dapt_jax.losses import ClassificationLoss, Loss
from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.models.network import Network
from dapt_jax.runtime import atomic_files, processes
from dapt_jax.study.scorer import Scorer
from dapt_jax.study.strategies import Strategy
from dapt_jax.training import loop, optim, steps
from dapt_jax.training.cache.policy import Caching
from dapt_jax.training.early_stopping import EarlyStop
from dapt_jax.training.phases import Phase
from dapt_jax.training.run import Run, RunContext
from dapt_jax.transferability.settings import Settings
from dapt_jax.weights import export, locate

ADAPTED = "adapted.safetensors"
"""Name of the file, in an arm's folder, that says its adaptation is finished."""

VAL_FRACTION = 0.1
"""Share of a corpus on which the loss is watched, where the config does not say another."""

_LOSS_PARAMETERS = {
    "focal_gamma": "gamma",
    "focal_alpha": "alpha",
    "gamma_positive": "gamma_positive",
    "gamma_negative": "gamma_negative",
    "margin": "margin",
}
"""Names of losses' parameters by their names in the flat settings."""

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


def objective_for(dataset: Dataset, settings: Any) -> ClassificationLoss:
    """The loss of a corpus: `settings.single_logit` makes two classes one sigmoid output, as in the paper.

    Raises:
        UserError: the loss does not go with the set's labels.
    """
    try:
        return losses.make(
            settings.loss,
            {name: settings[flat] for flat, name in _LOSS_PARAMETERS.items()},
            classes=len(dataset.classes),
            multi_label=dataset.multi_label,
            single_logit=bool(settings.get("single_logit", False)),
            smoothing=settings.label_smoothing,
            uncertain=dataset.uncertain,
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
    model: Network,
    objective: Loss,
    phases: tuple[Phase, ...],
    dataset: Dataset,
    train_rows: np.ndarray,
    val_rows: np.ndarray,
    settings: Any,
    config: Any,
) -> Run:
    """A training run from a config's settings: its `adapt`, its `transfer.finetune` or its `transfer.segmentation`."""
    programs = steps.programs(
        model,
        phases,
        optim.Optimizer(**settings.optimizer.to_dict()),
        objective,
        Augment(**settings.augment.to_dict()),
        seed,
        -(-len(train_rows) // settings.batch_size),
        Mix(**settings.get("mix", {})),
        settings.accumulate,
        jax.device_count() if config.model.batch_norm == "per_device" else 1,
    )
    return Run(
        strategy=strategy,
        seed=seed,
        stage=stage,
        label=label,
        programs=tuple(programs),
        dataset=dataset,
        train_rows=train_rows,
        val_rows=val_rows,
        weights=inverse_frequency_weights(dataset, train_rows) if settings.get("balance_classes", False) else (),
        batch_size=settings.batch_size,
        caching=Caching.of(config.cache),
        plateau=optim.Plateau(**settings.get("plateau", {})),
    )


def train_with_early_stopping(
    run: Run, params: Tree, batch_stats: Tree, context: RunContext, patience: int
) -> tuple[Tree, Tree]:
    """Trains a run of a target task; with `patience`, until its watched loss falls no longer, and back to its best epoch."""
    if not patience:
        return loop.train(run, params, batch_stats, context)
    assert context.folder is not None
    stop = EarlyStop(patience, run, context.folder.with_name(f"{context.folder.name}-best.safetensors"))
    last = loop.train(run, params, batch_stats, dataclasses.replace(context, hook=stop))
    context.reporter.skip(run.flops() - run.flops(stop.done))
    return stop.chosen(*last)


def corpus_settings(config: Any, name: str) -> Any:
    """What a config says of a corpus by its name; "" is `config.corpus`."""
    return config.corpora[name] if name else config.corpus


def dapt_run(config: Any, strategy: Strategy, seed: int, corpus: Dataset) -> Run:
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
    assert corpus is not None
    run = dapt_run(config, strategy, seed, corpus)
    network = run.programs[0].model
    assert isinstance(network, Classifier)
    params, batch_stats, merged = locate.load(strategy.weights, network, seed=seed)
    scorer = scorer_for(config, run, target, context, folder, until)
    context = dataclasses.replace(context, folder=folder / "state", hook=scorer)
    params, batch_stats = loop.train(run, params, batch_stats, context)
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
    config: Any, run: Run, target: Dataset | None, context: RunContext, folder: Path, until: int = 0
) -> Scorer | None:
    """Who scores a run along the way, where the config wants scores: pausing after `until` epochs, if that is not 0."""
    settings = Settings.of(config)
    return Scorer(settings, run, target, folder / SCORED, context, until) if settings and target is not None else None


def without_head(params: Tree) -> Tree:
    """An encoder's parameters alone."""
    return {key: value for key, value in params.items() if key != HEAD}
