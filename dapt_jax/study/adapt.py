"""One run of domain-adaptive pre-training: weights in, phases, adapted weights out (arXiv 2204.13280)."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.runtime import atomic_files, processes
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.scorer import Scorer
from dapt_jax.training import loop
from dapt_jax.training.context import RunContext
from dapt_jax.training.early_stopping import EarlyStopping
from dapt_jax.training.run import TrainingRun
from dapt_jax.weights import export, locate

ADAPTED = "adapted.safetensors"
"""Name of the file, in an arm's folder, that says its adaptation is finished."""

ABOUT = "adapted.json"
"""Name of the file beside it that says how it came about."""

SCORED = "scored"
"""Folder, in an arm's, of the weights of scored epochs."""


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
        return load_adapted(arm, strategy.weights, dtype)
    folder = arm.folder(context.study_folder())
    run = study.run_of(arm)
    if processes.sync_file(folder / ADAPTED):
        context.reporter.skip(run.flops())
        return dataclasses.replace(
            load_adapted(arm, str(folder / ADAPTED), dtype), source=read_about(folder)["source"]
        )
    params, batch_stats, merged = locate.load(strategy.weights, run.model, seed=arm.seed)
    scorer = scorer_for(study, arm, context, max_epochs)
    callbacks = (*context.callbacks, scorer) if scorer else context.callbacks
    own = dataclasses.replace(context, checkpoint_dir=folder / "state", callbacks=callbacks)
    trained = loop.train(run, params, batch_stats, own)
    params, batch_stats = trained.params, trained.batch_stats
    if scorer:
        params, batch_stats = scorer.chosen(params, batch_stats)
    about = {
        "model": strategy.encoder.name,
        "groups": strategy.encoder.groups,
        "classes": run.dataset.classes,
        "images": len(run.dataset),
        "source": merged.source,
        "strategy": strategy.name,
        "seed": arm.seed,
        "image_size": study.settings.model.image_size,
        "scored": scorer.points if scorer else [],
    }
    atomic_files.write_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")
    export.write(folder / ADAPTED, params, batch_stats, strategy.encoder)
    shutil.rmtree(folder / "state")
    if not study.settings.checkpoint_scoring.downstream:
        shutil.rmtree(folder / SCORED, ignore_errors=True)
    return Adapted(strategy.encoder, without_head(params), batch_stats, merged.source)


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
    return Scorer(study.scores, study.run_of(arm), images, folder, context, max_epochs)


def without_head(params: Tree) -> Tree:
    """Return an encoder's parameters alone."""
    return {key: value for key, value in params.items() if key != HEAD}
