"""Records of `mode=score`: one line for each checkpoint, set and variant of a score; without JAX."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from dapt_jax.records import typed
from dapt_jax.runtime import atomic_files
from dapt_jax.statistics import Interval

FOLDER = "scores"
"""Folder, in a workdir, of the scores of checkpoints."""

FILE = "scores.jsonl"
LEVEL = 0.95
_ROW = {
    "checkpoint": typed.TEXT,
    "task": typed.TEXT,
    "split": typed.TEXT,
    "key": typed.TEXT,
    "spec": typed.TEXT,
    "model": typed.TEXT,
    "fingerprint": typed.TEXT,
    "score": typed.TEXT,
    "variant": typed.OBJECT,
    "variant_title": typed.TEXT,
    "higher_is_better": typed.TRUTH,
    "value": typed.NUMBER.or_null,
    "reason": typed.TEXT,
    "n": typed.COUNT,
    "halves": typed.list_of(typed.NUMBER.or_null),
}


@dataclasses.dataclass(frozen=True)
class Downstream:
    """A downstream score of a checkpoint.

    Attributes:
        checkpoint: Label of the checkpoint.
        task: Name of the task.
        split: Split that it was measured on; "given" where a table says it.
        metric: Protocol and metric.
        value: The score, a mean over seeds where there are several.
        lower_is_better: Whether lower values are better.
    """

    checkpoint: str
    task: str
    split: str
    metric: str
    value: float
    lower_is_better: bool


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of scores.

    Raises:
        UserError: A line is damaged; names it.
    """
    rows = atomic_files.read(path)
    for number, row in enumerate(rows, start=1):
        typed.check(f"{path}:{number}", row, _ROW, required=tuple(_ROW))
    return rows


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file of scores atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write(path, rows)


def is_of(row: Mapping[str, Any], score: str, variant: Mapping[str, Any]) -> bool:
    """Return whether a line is of a variant of a score."""
    return row["score"] == score and row["variant"] == variant


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A checkpoint's place under one variant of a score on one set.

    Attributes:
        row: Its line.
        interval: Its value with the interval of the halves; None where undefined.
        rank: Its rank, 1 for the best, ties sharing their mean; None where undefined.
        low: Lower bound of the rank over the halves; None without halves.
        high: Upper bound of it.
    """

    row: Mapping[str, Any]
    interval: Interval | None
    rank: float | None
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Agreement of a variant of a score with downstream scores over checkpoints.

    Attributes:
        kendall: Kendall's tau-b with the interval of the halves, positive where the score predicts.
        spearman: Spearman's rank correlation, with the same sign.
        loss: Downstream score of the checkpoint with the best score less that of the best checkpoint, in the
            metric's unit: 0 where the score finds the best, otherwise on the worse side.
        n: Number of checkpoints.
    """

    kendall: Interval
    spearman: float
    loss: float
    n: int


class Scores:
    """The scores of a workdir.

    Attributes:
        rows: Lines of the file.
        downstream: Known downstream scores.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], downstream: Sequence[Downstream] = ()):
        self.rows, self.downstream = list(rows), list(downstream)

    def _unique(self, key: str) -> list[str]:
        return list(dict.fromkeys(row[key] for row in self.rows))

    @property
    def checkpoints(self) -> list[str]:
        """Labels of the checkpoints, in the order of the settings."""
        return self._unique("checkpoint")

    @property
    def variants(self) -> list[str]:
        """Titles of the variants."""
        return self._unique("variant_title")

    @property
    def sets(self) -> list[tuple[str, str]]:
        """Scored sets, as (task, split)."""
        return list(dict.fromkeys((row["task"], row["split"]) for row in self.rows))

    def of(self, task: str, split: str, variant: str) -> list[Mapping[str, Any]]:
        """Return the lines of a variant on a set, one per checkpoint."""
        wanted = (task, split, variant)
        return [row for row in self.rows if (row["task"], row["split"], row["variant_title"]) == wanted]

    def ranking(self, task: str, split: str, variant: str) -> list[Ranked]:
        """Return the checkpoints of a set by rank; those without a value come last.

        Ranks are taken again on each half, the same images for all checkpoints; bounds are quantiles.
        """
        rows = self.of(task, split, variant)
        known = [row for row in rows if row["value"] is not None]
        ranks = _ranks(known, [row["value"] for row in known]) if known else np.zeros(0)
        draws = _half_ranks(known)
        found = []
        for place, row in enumerate(known):
            bounds: tuple[float | None, float | None] = (None, None)
            if len(draws):
                low, high = np.quantile(draws[:, place], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
                bounds = (float(low), float(high))
            found.append(Ranked(row, interval(row), float(ranks[place]), *bounds))
        lacking = [Ranked(row, None, None, None, None) for row in rows if row["value"] is None]
        return [*sorted(found, key=lambda each: each.rank or 0.0), *lacking]

    def correlation(self, task: str, split: str, variant: str, on: str) -> Correlation | None:
        """Return the agreement with the downstream scores of a split; None for fewer than three checkpoints.

        Args:
            task: Name of the task.
            split: Set that was scored.
            variant: Title of the variant.
            on: Split of the downstream scores.
        """
        known = {each.checkpoint: each for each in self.downstream if (each.task, each.split) == (task, on)}
        rows = [row for row in self.of(task, split, variant) if row["checkpoint"] in known]
        rows = [row for row in rows if row["value"] is not None]
        if len(rows) < 3:
            return None
        sign = -1 if next(iter(known.values())).lower_is_better else 1
        good = np.array([sign * known[row["checkpoint"]].value for row in rows])
        score = _signed(rows, [row["value"] for row in rows])
        if not (np.ptp(score) > 0 and np.ptp(good) > 0):
            return None
        tau = float(scipy.stats.kendalltau(score, good)[0])
        of_halves = [float(scipy.stats.kendalltau(-each, good)[0]) for each in _half_ranks(rows)]
        defined = [value for value in of_halves if math.isfinite(value)]
        low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if defined else (None, None)
        spearman = float(scipy.stats.spearmanr(score, good)[0])
        loss = sign * float(good[int(score.argmax())] - good.max())
        return Correlation(Interval(tau, low, high, len(rows)), spearman, loss, len(rows))


def interval(row: Mapping[str, Any]) -> Interval | None:
    """Return a line's value, with the interval that has the spread of its halves around it."""
    if row["value"] is None:
        return None
    known = np.array([value for value in row["halves"] if value is not None], float)
    if len(known) < 10:
        return Interval(row["value"], None, None, row["n"])
    draws = row["value"] + known - known.mean()
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(row["value"], float(low), float(high), row["n"])


def _signed(rows: Sequence[Mapping[str, Any]], values: Sequence[float]) -> np.ndarray:
    """Return values with the sign that makes higher better."""
    return np.array(values, float) * np.array([1 if row["higher_is_better"] else -1 for row in rows])


def _ranks(rows: Sequence[Mapping[str, Any]], values: Sequence[float]) -> np.ndarray:
    return scipy.stats.rankdata(-_signed(rows, values))


def _half_ranks(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return ranks [halves, checkpoints] of lines on each half where all have a value."""
    if not rows or len({len(row["halves"]) for row in rows}) != 1:
        return np.zeros((0, len(rows)))
    halves = zip(*(row["halves"] for row in rows), strict=True)
    found = [_ranks(rows, values) for values in halves if None not in values]
    return np.array(found).reshape(-1, len(rows))
