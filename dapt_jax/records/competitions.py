"""Which strategy won the compute that strategies compete for: `WORKDIR/checkpoints/halving-seed0.json` of each seed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dapt_jax.errors import UserError
from dapt_jax.records import typed
from dapt_jax.runtime import atomic_files

_FILE = {
    "winner": typed.TEXT,
    "epochs": typed.COUNT,
    "budget_flops": typed.COUNT,
    "rounds": typed.list_of(typed.OBJECT),
}
_ROUND = {"epochs": typed.COUNT, "scores": typed.MEASURED.or_null, "flops": typed.AMOUNT}
"""What a round has of each strategy."""


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of a competition; every value is by strategy.

    Attributes:
        epochs: Epochs, head included, that the strategies still in it could afford.
        scores: Scores of those that were compared; None where undefined.
        flops: FLOPs that every strategy had taken by its end, scores included.
    """

    epochs: Mapping[str, int]
    scores: Mapping[str, float | None]
    flops: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Competition:
    """The competition of the strategies of a seed, by successive halving.

    Attributes:
        winner: Name of the strategy that won.
        epochs: Epochs, head included, of the winner's run.
        budget_flops: FLOPs that all strategies share.
        rounds: The rounds, first to last.
    """

    winner: str
    epochs: int
    budget_flops: int
    rounds: Sequence[Round]

    @property
    def lost(self) -> dict[str, float]:
        """FLOPs of each strategy that lost."""
        flops = self.rounds[-1].flops if self.rounds else {}
        return {name: taken for name, taken in flops.items() if name != self.winner}


def path_of(workdir: Path, seed: object) -> Path:
    """Return the path of the competition of a seed."""
    return workdir / "checkpoints" / f"halving-seed{seed}.json"


def write(path: Path, competition: Competition) -> None:
    """Write one file atomically."""
    rounds = [
        {"round": number, **dataclasses.asdict(each)}
        for number, each in enumerate(competition.rounds, start=1)
    ]
    found = {**dataclasses.asdict(competition), "rounds": rounds}
    atomic_files.write_text(path, json.dumps(found, indent=1) + "\n")


def read(path: Path) -> Competition:
    """Read one file.

    Raises:
        UserError: The file is damaged; names the round, the key and the value.
    """
    found = typed.read_object(path)
    typed.check(str(path), found, _FILE, required=_FILE)
    rounds = [_round(f"{path}: round {number}", each) for number, each in enumerate(found["rounds"], start=1)]
    if rounds and found["winner"] not in rounds[-1].scores:
        named = typed.shortened(found["winner"])
        raise UserError(f"{path}: winner is {named}; expected a strategy of the last round")
    return Competition(found["winner"], found["epochs"], found["budget_flops"], rounds)


def _round(where: str, found: Mapping[str, Any]) -> Round:
    typed.check(where, found, dict.fromkeys(_ROUND, typed.OBJECT), required=_ROUND)
    for key, kind in _ROUND.items():
        typed.check(f"{where}: {key}", found[key], dict.fromkeys(found[key], kind))
    return Round(**{key: found[key] for key in _ROUND})


def read_all(workdir: Path, seeds: Sequence[object]) -> list[Competition]:
    """Return the competitions of the seeds that are decided."""
    paths = [path_of(workdir, seed) for seed in seeds]
    return [read(path) for path in paths if path.is_file()]
