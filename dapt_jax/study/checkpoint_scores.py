"""Scored checkpoints of a study: cost of their scores, and their downstream scores."""

import dataclasses

from dapt_jax.models.classifier import Classifier
from dapt_jax.records.ledger import Row
from dapt_jax.runtime import processes
from dapt_jax.study import classification
from dapt_jax.study.adapt import SCORED, Adapted, read_about, without_head
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.tasks import ResultRow
from dapt_jax.training.context import RunContext
from dapt_jax.weights import locate


def score_cost_line(study: Study, arm: Arm) -> str:
    """Return a line on the cost of scoring an arm; empty where it is not scored."""
    planned = study.scoring_plan(arm)
    if planned is None:
        return ""
    run = study.run_of(arm)
    scores, training = planned.until(run, run.timeline.epochs), run.flops()
    return (
        f"{arm.name}: {planned.images} target images scored after {len(planned.epochs)} epochs, "
        f"{scores / 1e12:.3g} TFLOP, {scores / training:.2%} of its training"
    )


def measure_scored(study: Study, arm: Arm, context: RunContext) -> list[ResultRow]:
    """Evaluate every scored checkpoint of an arm on the target tasks, as a separate arm.

    It is named `STRATEGY@EPOCHS`. In the ledger, the training up to the checkpoint counts as reused work.

    Args:
        study: The study.
        arm: The arm, which is finished.
        context: Environment of the runs.

    Returns:
        Lines for `results.jsonl`.
    """
    run, encoder = study.run_of(arm), arm.strategy.encoder
    rows: list[ResultRow] = []
    folder = study.adapting(arm).folder(context.study_folder())
    for point in read_about(folder)["scored"]:
        checkpoint = dataclasses.replace(arm, epochs=point["epoch"] + 1)
        path = folder / SCORED / f"epoch{checkpoint.epochs:04d}.safetensors"
        processes.sync_file(path)
        model = Classifier(encoder, 1, study.settings.model.dtype)
        params, batch_stats, merged = locate.load(str(path), model, seed=arm.seed)
        context.ledger.put(
            Row(
                checkpoint.name,
                arm.seed,
                "dapt",
                f"until epoch {checkpoint.epochs}",
                cached="reused",
                reused_flops=run.flops(checkpoint.epochs),
                device=context.hardware.kind,
                devices=context.hardware.count,
            )
        )
        adapted = Adapted(encoder, without_head(params), batch_stats, merged.source)
        for task in study.tasks:
            rows += classification.transfer(study, checkpoint, task, adapted, context)
    return rows
