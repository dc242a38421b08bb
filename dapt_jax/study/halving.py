"""Successive halving: the best adaptation that a FLOP budget allows, chosen among strategies by their scores.

The budget, a fraction of the FLOPs of full DAPT, is split evenly over the rounds, and in a round over the
remaining arms. Each trains until its part is spent; then the half with the better scores continues. The
winner receives the unspent budget. Jamieson and Talwalkar, "Non-stochastic best arm identification and
hyperparameter optimization", arXiv 1502.07943.
"""

import math
import shutil
from collections.abc import Collection, Mapping, Sequence

from dapt_jax.errors import UserError
from dapt_jax.records import competitions
from dapt_jax.records.competitions import Competition, Round
from dapt_jax.runtime import processes
from dapt_jax.study import balance
from dapt_jax.study.adapt import prepared
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.scorer import Plan, level_group
from dapt_jax.training.context import RunContext
from dapt_jax.transferability.registry import entry


def cost(study: Study, arm: Arm, plan: Plan, epochs: int) -> int:
    """Return the FLOPs of an arm's first epochs: of clusters, training and scores.

    Args:
        study: The study.
        arm: The arm.
        plan: Its scoring plan.
        epochs: Number of epochs.
    """
    run = study.run_of(arm)
    clusters = balance.flops(run, study.settings.adapt.balance_clusters)
    return clusters + run.flops(epochs) + plan.until(run, epochs)


def affordable(study: Study, arm: Arm, plan: Plan, flops: int) -> int:
    """Return the epochs of an arm whose cost fits a number of FLOPs."""
    longest = 0
    for epochs in range(1, study.run_of(arm).timeline.epochs + 1):
        if cost(study, arm, plan, epochs) > flops:
            break
        longest = epochs
    return longest


def first_score(plan: Plan) -> int:
    """Return the epochs until the first score, the minimum for comparing an arm."""
    return min(plan.epochs) + 1


def rounds_of(arms: int) -> int:
    """Return the rounds after which one arm is left."""
    return max(1, math.ceil(math.log2(arms)))


def round_budget(total: int, arms: int, survivors: int) -> float:
    """Return the FLOPs per surviving arm in a round, of `arms` arms in all."""
    return total / rounds_of(arms) / survivors


def entrants(study: Study, seed: int) -> list[Arm]:
    """Return the arms of a seed that compete: those that adapt."""
    return [arm for arm in study.arms_of(seed) if arm.strategy.phases]


def check(study: Study, seed: int) -> None:
    """Refuse a budget with which no arm reaches its first score in the first round.

    Args:
        study: The study, with a `compute_budget`.
        seed: The seed.

    Raises:
        UserError: The budget is too small; names the smallest sufficient one.
    """
    needed = {}
    for arm in entrants(study, seed):
        plan = _plan(study, arm)
        needed[arm.name] = cost(study, arm, plan, first_score(plan))
    full, budget = study.full_flops(seed), study.settings.compute_budget
    if int(round_budget(study.budget_flops(seed), len(needed), len(needed))) < min(needed.values()):
        parts = rounds_of(len(needed)) * len(needed)
        least, most = (
            math.ceil(1000 * flops * parts / full + 1) / 1000
            for flops in (min(needed.values()), max(needed.values()))
        )
        raise UserError(
            f"a compute_budget of {budget:g} of full DAPT brings none of {', '.join(needed)} to a first "
            "score; expected "
            f"{least:g} or more ({most:g} for all of them), fewer strategies, more epochs, or a smaller "
            "checkpoint_scoring.every"
        )


def unlike(study: Study) -> str:
    """Return a warning where the score of strategies that compete reads maps of different layer groups; else "".

    Distances of views depend on the depth of the map as much as on how the network was adapted: on blood cells the
    robustness of a cut network was worst by far, and its AUC outside best (docs/wbc.md).
    """
    settings = study.settings
    score = settings.checkpoint_selection.score
    if not settings.compute_budget or entry(score).needs not in ("views", "masks"):
        return ""
    read: dict[str, list[str]] = {}
    for arm in entrants(study, settings.seeds[0]):
        encoder = study.run_of(arm).model.encoder
        level = level_group(encoder, settings.checkpoint_scoring.level)
        read.setdefault(encoder.groups[level], []).append(arm.name)
    if len(read) < 2:
        return ""
    said = "; ".join(f"of {group!r} for {', '.join(names)}" for group, names in read.items())
    return (
        f"compute_budget: {score} reads the map {said}: scores at different depths do not compare, so that depth may "
        "decide who wins; expected strategies of one depth, or a score of pooled features such as 'knn'"
    )


def _plan(study: Study, arm: Arm) -> Plan:
    plan = study.scoring_plan(arm)
    assert plan is not None  # the settings name a score, and the arm adapts
    return plan


def keep(scores: Mapping[str, float | None], higher_is_better: bool, number: int) -> list[str]:
    """Return the names with the best scores; those without a score come last.

    Args:
        scores: Scores by name.
        higher_is_better: Whether higher scores are better.
        number: Number of names to keep.
    """
    sign = -1 if higher_is_better else 1
    undefined = math.inf
    return sorted(scores, key=lambda name: undefined if (s := scores[name]) is None else sign * s)[:number]


def outcome_line(reach: Collection[str], scores: Collection[str], survivors: Sequence[str]) -> str:
    """Return the outcome of a round in words.

    >>> outcome_line(["a", "b", "c", "d"], ["a", "b", "c"], ["c", "a"])
    'c, a of 4 go on; the budget of the round pays for no first score of d: not trained'

    Args:
        reach: Names of the strategies of the round.
        scores: Names of those that reached a score.
        survivors: Names of those that go on.
    """
    line = f"{', '.join(survivors)} of {len(reach)} go on"
    short = ", ".join(name for name in reach if name not in scores)
    return (
        f"{line}; the budget of the round pays for no first score of {short}: not trained" if short else line
    )


def run(study: Study, seed: int, context: RunContext) -> Competition:
    """Run successive halving, or read its result; the winner stops where its budget ends.

    Args:
        study: The study, with a `compute_budget`.
        seed: Seed of all arms.
        context: Surroundings of runs.
    """
    workdir = context.study_folder()
    record = competitions.path_of(workdir, seed)
    if processes.sync_file(record):
        return competitions.read(record)
    competitors = {arm.name: Competitor(study, arm, context) for arm in entrants(study, seed)}
    score = study.settings.checkpoint_selection.score
    total = study.budget_flops(seed)
    survivors = list(competitors)
    history: list[Round] = []
    allowed = 0.0
    for number in range(rounds_of(len(competitors))):
        allowed += round_budget(total, len(competitors), len(survivors))
        reach = {name: competitors[name].affordable(int(allowed)) for name in survivors}
        eligible = [name for name in survivors if reach[name] >= first_score(competitors[name].plan)]
        scores = {name: competitors[name].advance(reach[name])[score] for name in eligible}
        spent = {name: competitor.spent for name, competitor in competitors.items()}
        history.append(Round(reach, scores, spent))
        survivors = keep(scores, entry(score).higher_is_better, max(1, math.ceil(len(survivors) / 2)))
        context.reporter.say(
            f"halving seed {seed}, round {number + 1}: {outcome_line(reach, scores, survivors)}"
        )
    winner = survivors[0]
    left = total - sum(competitor.spent for name, competitor in competitors.items() if name != winner)
    epochs = competitors[winner].affordable(left)
    for name, competitor in competitors.items():
        if name != winner:
            shutil.rmtree(competitor.arm.folder(workdir), ignore_errors=True)
    decided = Competition(winner, epochs, total, history)
    competitions.write(record, decided)
    return decided


class Competitor:
    """An arm in the competition.

    Attributes:
        arm: The arm.
        plan: Scoring plan.
        spent: FLOPs of its clusters, training and scoring up to the round.
    """

    def __init__(self, study: Study, arm: Arm, context: RunContext):
        """Start without spent FLOPs.

        Args:
            study: The study.
            arm: The arm.
            context: Surroundings of runs.
        """
        self.arm, self.plan, self.spent = arm, _plan(study, arm), 0
        self._study, self._context = study, context

    def affordable(self, flops: int) -> int:
        """Return how many epochs of training and scoring fit a number of FLOPs."""
        return affordable(self._study, self.arm, self.plan, flops)

    def advance(self, epochs: int) -> dict[str, float | None]:
        """Continue training to a number of epochs, and return the last scores until then by name.

        A run that a later round has taken further before a restart stays there: nothing that it did since
        counts here.
        """
        adaptation = prepared(self._study, self.arm, self._context, epochs)
        scorer = adaptation.scorer
        assert scorer is not None  # the settings name a score
        adaptation.train()
        self.spent = cost(self._study, self.arm, self.plan, min(epochs, scorer.done))
        return next(point["scores"] for point in reversed(scorer.points) if point["epoch"] < epochs)
