"""Scores in a study: which images they see, and what every scored checkpoint is truly worth."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError, nearest
from dapt_jax.models.classifier import Classifier
from dapt_jax.records.ledger import Row
from dapt_jax.runtime import processes
from dapt_jax.study import classification
from dapt_jax.study.adapt import SCORED, Adapted, dapt_run, without_head
from dapt_jax.study.scorer import Plan
from dapt_jax.study.strategies import Strategy
from dapt_jax.study.tasks import Arm, Task
from dapt_jax.training.context import RunContext
from dapt_jax.transferability.settings import Settings
from dapt_jax.weights import locate


def target(config: Any, tasks: Sequence[Task]) -> Dataset | None:
    """The images that are scored along adaptation: a task's development images; None where nothing is scored.

    Raises:
        UserError: `score.task` is no task, or a setting of the scores is wrong.
    """
    if Settings.of(config) is None:
        return None
    by_name = {task.name: task.development for task in tasks}
    name = config.score.task or tasks[0].name
    if name not in by_name:
        raise UserError(f"score.task {name!r} is not one of the tasks; {nearest(name, by_name)}")
    return by_name[name]


def plan(config: Any, strategy: Strategy, seed: int, corpus: Dataset | None, images: Dataset | None) -> Plan | None:
    """What scoring one arm would take; None where it is not scored.

    Raises:
        UserError: the budget does not reach, or the encoder has no such level.
    """
    settings = Settings.of(config)
    if settings is None or images is None or corpus is None or not strategy.phases:
        return None
    return Plan.of(settings, dapt_run(config, strategy, seed, corpus), len(images))


def score_cost_line(config: Any, strategy: Strategy, seed: int, corpus: Dataset | None, images: Dataset | None) -> str:
    """What scoring one arm would take, in a line; empty where it is not scored."""
    planned = plan(config, strategy, seed, corpus, images)
    if planned is None or corpus is None:
        return ""
    run = dapt_run(config, strategy, seed, corpus)
    scores, training = planned.until(run, run.timeline.epochs), run.flops()
    return (
        f"{strategy.name}: {planned.images} target images scored after {len(planned.epochs)} epochs, "
        f"{scores / 1e12:.3g} TFLOP, {scores / training:.2%} of its training"
    )


def measure_scored(
    config: Any, strategy: Strategy, seed: int, corpus: Dataset, tasks: Sequence[Task], arm: Arm,
    context: RunContext, folder: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measures every scored checkpoint of an arm on the target tasks, as an arm `STRATEGY@EPOCHS` of its own.

    In the ledger it has the training until there as work that another arm has done.
    """
    run = dapt_run(config, strategy, seed, corpus)
    rows: list[dict[str, Any]] = []
    processes.sync_file(folder / "adapted.json")
    for point in json.loads((folder / "adapted.json").read_text())["scored"]:
        epochs = point["epoch"] + 1
        path = folder / SCORED / f"epoch{epochs:04d}.safetensors"
        processes.sync_file(path)
        model = Classifier(strategy.encoder, 1, config.model.dtype)
        params, batch_stats, merged = locate.load(str(path), model, seed=seed)
        name = f"{strategy.name}@{epochs}"
        context.ledger.put(
            Row(
                name,
                seed,
                "dapt",
                f"until epoch {epochs}",
                cached="reused",
                reused_flops=run.flops(epochs),
                device=context.hardware.kind,
                devices=context.hardware.count,
            )
        )
        adapted = Adapted(strategy.encoder, without_head(params), batch_stats, merged.source)
        own = dataclasses.replace(arm, strategy=name)
        for task in tasks:
            rows += classification.transfer(config, task, own, adapted, context, folder / name)
    return rows
