"""Successive halving: the best adaptation that a FLOP budget allows, chosen among strategies by their scores.

The budget, a share of what full DAPT takes, is split evenly over the rounds, and in a round over the arms that are left.
Each trains as far as its part reaches; then the half with the better scores goes on. What is left over is the winner's.
Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", arXiv 1502.07943.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.runtime import atomic_files, processes
from dapt_jax.study.adapt import dapt_run, scorer_for
from dapt_jax.study.scorer import Plan, Scorer
from dapt_jax.study.strategies import Strategy, resolve
from dapt_jax.training import loop
from dapt_jax.training.context import RunContext
from dapt_jax.training.run import TrainingRun
from dapt_jax.transferability.registry import entry
from dapt_jax.transferability.settings import Settings
from dapt_jax.weights import locate


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Who won, and how far the budget takes it.

    Attributes:
        winner: name of the strategy.
        epochs: of its run, head included.
    """

    winner: str
    epochs: int


def affordable(run: TrainingRun[Classifier], plan: Plan, flops: int) -> int:
    """Epochs of a run whose training and scoring fit a number of FLOPs."""
    most = 0
    for epochs in range(1, run.timeline.epochs + 1):
        if run.flops(epochs) + plan.until(run, epochs) > flops:
            break
        most = epochs
    return most


def first_change(plan: Plan) -> int:
    """Epochs until the first score: what an arm needs to be compared at all."""
    return min(plan.epochs) + 1


def rounds_of(arms: int) -> int:
    """Rounds after which one arm is left."""
    return max(1, math.ceil(math.log2(arms)))


def round_budget(total: int, arms: int, survivors: int) -> float:
    """FLOPs that a round of a competition among `arms` gives to each of those that are still in it."""
    return total / rounds_of(arms) / survivors


def check(
    config: Any, strategies: Sequence[Strategy], seed: int, corpora: Mapping[str, Dataset], target: Dataset
) -> None:
    """Refuses a budget that does not bring one arm to its first score in the first round, and says which one would.

    Args:
        config: the study's, with `budget` and `select`.
        strategies: that adapt.
        seed: of all of them.
        corpora: in-domain images, by name.
        target: images that are scored.

    Raises:
        UserError: it does not.
    """
    settings = Settings.of(config)
    assert settings is not None  # the config names a score
    needed = {}
    for strategy in strategies:
        own = dapt_run(config, strategy, seed, corpora[strategy.corpus])
        plan = Plan.of(settings, own, len(target))
        epochs = first_change(plan)
        needed[strategy.name] = own.flops(epochs) + plan.until(own, epochs)
    full = full_flops(config, seed, corpora[""])
    if int(round_budget(int(config.budget * full), len(needed), len(needed))) < min(needed.values()):
        parts = rounds_of(len(needed)) * len(needed)
        least, most = (
            math.ceil(1000 * flops * parts / full + 1) / 1000 for flops in (min(needed.values()), max(needed.values()))
        )
        raise UserError(
            f"a budget of {config.budget:g} of full DAPT brings none of {', '.join(needed)} to a first score; expected "
            f"{least:g} or more ({most:g} for all of them), fewer strategies, more epochs, or a smaller score.every"
        )


def keep(scores: Mapping[str, float | None], higher_is_better: bool, number: int) -> list[str]:
    """The names with the best scores; those without a score come last.

    Args:
        scores: by name.
        higher_is_better: which way the score goes.
        number: of names to keep.
    """
    sign = -1 if higher_is_better else 1
    undefined = math.inf
    return sorted(scores, key=lambda name: undefined if (s := scores[name]) is None else sign * s)[:number]


def full_flops(config: Any, seed: int, corpus: Dataset) -> int:
    """Model FLOPs of full DAPT, whether or not it is an arm."""
    encoder = registry.of_config(config.model)
    return dapt_run(config, resolve("full", encoder, config), seed, corpus).flops()


def run(
    config: Any,
    strategies: Sequence[Strategy],
    seed: int,
    corpora: Mapping[str, Dataset],
    target: Dataset,
    context: RunContext,
    workdir: Path,
) -> Outcome:
    """Lets the strategies compete, or reads how they did; the winner is left where its part of the budget ended.

    Args:
        config: the study's, with `budget` and `select`.
        strategies: that adapt.
        seed: of all of them.
        corpora: in-domain images, by name.
        target: images that are scored.
        context: what runs need.
        workdir: of the study.
    """
    record = workdir / "checkpoints" / f"halving-seed{seed}.json"
    if processes.sync_file(record):
        found = json.loads(record.read_text())
        return Outcome(found["winner"], found["epochs"])
    arms = {strategy.name: strategy for strategy in strategies}
    runs = {name: dapt_run(config, strategy, seed, corpora[strategy.corpus]) for name, strategy in arms.items()}
    folders = {name: workdir / "checkpoints" / f"{name}-seed{seed}" for name in arms}
    watchers = {name: _scorer(config, runs[name], target, context, folders[name], 0) for name in arms}
    total = int(config.budget * full_flops(config, seed, corpora[""]))
    survivors, spent = list(arms), dict.fromkeys(arms, 0)
    history: list[dict[str, Any]] = []
    allowed = 0.0
    for number in range(rounds_of(len(arms))):
        allowed += round_budget(total, len(arms), len(survivors))
        until = {name: affordable(runs[name], watchers[name].plan, int(allowed)) for name in survivors}
        eligible = [name for name in survivors if until[name] >= first_change(watchers[name].plan)]
        scores: dict[str, float | None] = {}
        for name in eligible:
            scorer = _advance(config, arms[name], runs[name], seed, target, context, folders[name], until[name])
            spent[name] = runs[name].flops(until[name]) + scorer.flops
            scores[name] = scorer.points[-1]["scores"][config.select]
        history.append({"round": number + 1, "epochs": until, "scores": scores, "flops": dict(spent)})
        survivors = keep(scores, entry(config.select).higher_is_better, max(1, math.ceil(len(survivors) / 2)))
        context.reporter.say(f"halving seed {seed}, round {number + 1}: {', '.join(survivors)} of {len(until)} go on")
    winner = survivors[0]
    left = total - sum(spent.values()) + spent[winner]
    epochs = affordable(runs[winner], watchers[winner].plan, left)
    for name in arms:
        if name != winner:
            shutil.rmtree(folders[name], ignore_errors=True)
    found = {"winner": winner, "epochs": epochs, "budget_flops": total, "rounds": history}
    atomic_files.write_text(record, json.dumps(found, indent=1) + "\n")
    return Outcome(winner, epochs)


def _scorer(
    config: Any, run: TrainingRun[Classifier], target: Dataset, context: RunContext, folder: Path, until: int
) -> Scorer:
    scorer = scorer_for(config, run, target, context, folder, until)
    assert scorer is not None  # the config names a score
    return scorer


def _advance(
    config: Any,
    strategy: Strategy,
    run: TrainingRun[Classifier],
    seed: int,
    target: Dataset,
    context: RunContext,
    folder: Path,
    until: int,
) -> Scorer:
    """Trains an arm further, from where it was paused, up to a number of epochs."""
    scorer = _scorer(config, run, target, context, folder, until)
    params, batch_stats, _ = locate.load(strategy.weights, scorer.model, seed=seed)
    loop.train(
        run,
        params,
        batch_stats,
        dataclasses.replace(context, checkpoint_dir=folder / "state", callbacks=(*context.callbacks, scorer)),
    )
    return scorer
