"""How strategies competed for compute: rounds, scores and FLOPs of successive halving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dapt_jax.formatting import NONE, number, percent
from dapt_jax.records.competitions import Competition, read_all
from dapt_jax.records.study_records import Records
from dapt_jax.report import selection
from dapt_jax.report.columns import Column, Table


def table(workdir: Path, records: Records) -> Table | None:
    """Return a row for each strategy that competed; None where none did."""
    found = read_all(workdir, records.seeds)
    if not found:
        return None
    share = records.config.get("compute_budget") or 0.0
    score = str((records.config.get("checkpoint_selection") or {}).get("score") or "the score")
    names = [name for name in records.strategies if any(name in _entrants(each) for each in found)]
    columns = [Column[str]("strategy", lambda name: name)]
    for place in range(max(len(each.rounds) for each in found)):
        columns += _columns(found, place, score.replace("_", " "))
    columns += [
        Column(
            "won", lambda name: _of_seeds(sum(each.winner == name for each in found), found), "in the end"
        ),
        Column(
            "TFLOP where it lost", lambda name: _mean([each.lost.get(name) for each in found]), "in the end"
        ),
    ]
    return Table.of("The competition for compute", columns, names, _note(records, found, share, score))


def _entrants(competition: Competition) -> Sequence[str]:
    return list(competition.rounds[0].flops) if competition.rounds else [competition.winner]


def _columns(found: Sequence[Competition], place: int, score: str) -> list[Column[str]]:
    """Return the columns of one round."""
    rounds = [each.rounds[place] for each in found if place < len(each.rounds)]
    group = f"round {place + 1}"
    return [
        Column("seeds", lambda name: _of_seeds(sum(name in one.scores for one in rounds), found), group),
        Column("epochs", lambda name: _range([one.epochs.get(name) for one in rounds], "g"), group),
        Column(score, lambda name: _range([one.scores.get(name) for one in rounds], ".3f"), group),
    ]


def _of_seeds(count: int, found: Sequence[Competition]) -> str:
    return f"{count} of {len(found)}"


def _range(values: Sequence[float | None], form: str) -> str:
    """Return the mean, and of several values the least and the greatest.

    >>> _range([12, 12], "g"), _range([0.25, None, 0.75], ".2f"), _range([None], "g")
    ('12', '0.50 (0.25 to 0.75)', '–')
    """
    known = [value for value in values if value is not None]
    if not known:
        return NONE
    mean, least, greatest = (f"{of(known):{form}}" for of in (np.mean, min, max))
    return mean if least == greatest else f"{mean} ({least} to {greatest})"


def _mean(flops: Sequence[float | None]) -> str:
    known = [value for value in flops if value is not None]
    return number(float(np.mean(known)) / 1e12) if known else NONE


def _note(records: Records, found: Sequence[Competition], share: float, score: str) -> str:
    """Return what the strategies competed for, and what choosing cost."""
    directions = {
        curve.higher_is_better(score) for curve in selection.curves(records) if curve.series(score)
    } - {None}
    better = f", {'higher' if directions == {True} else 'lower'} is better" if len(directions) == 1 else ""
    budget, lost = (
        number(float(np.mean(each)) / 1e12)
        for each in (
            [one.budget_flops for one in found],
            [sum(one.lost.values()) for one in found],
        )
    )
    return (
        f"Strategies shared {percent(share)} of what full adaptation takes, {budget} TFLOP a seed, and competed by "
        f"{score.replace('_', ' ')}{better} (successive halving, arXiv 1502.07943). Those that lost go to no target "
        f"task and have no scores below. What they took, {lost} TFLOP a seed, is a cost of the choice and not in that "
        "of the winner below."
    )
