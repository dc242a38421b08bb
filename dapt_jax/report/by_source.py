"""Scores of each source of a split, such as a hospital or a scanner."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dapt_jax.formatting import NONE
from dapt_jax.records.predictions import Predictions
from dapt_jax.report.columns import Cell, Column, Table, compact
from dapt_jax.report.prediction_figures import SplitPredictions
from dapt_jax.statistics import mean_interval

MOST_SOURCES = 12
"""Sources up to which a split has a table."""


@dataclasses.dataclass(frozen=True)
class _Source:
    """A row of the table."""

    of: SplitPredictions
    name: str

    @property
    def rows(self) -> np.ndarray:
        assert self.of.first.sources is not None
        return np.flatnonzero(self.of.first.sources == self.name)

    def auc(self, strategy: str) -> Cell:
        """Return the AUC over the source's images, mean over seeds."""
        return compact(mean_interval([run.auc(self.rows) for run in self.of.runs.get(strategy, [])]))

    def accuracy(self, strategy: str) -> Cell:
        """Return the accuracy over the source's images, mean over seeds."""
        values = [_accuracy(run.take(self.rows)) for run in self.of.runs.get(strategy, [])]
        return compact(mean_interval(values))


def _patients(row: _Source) -> str:
    """Return the number of patients of a source; nothing where images name none."""
    of = row.of.first
    return NONE if of.drawn == "images" else f"{len(np.unique(of.groups[row.rows])):,}"


def table(splits: Sequence[SplitPredictions]) -> Table | None:
    """Return AUC and accuracy of each source by split, for the arms shown.

    Returns:
        The table; None where no split has from 2 to `MOST_SOURCES` sources.
    """
    rows = []
    for split in splits:
        sources = [] if split.first.sources is None else np.unique(split.first.sources).tolist()
        if 2 <= len(sources) <= MOST_SOURCES:
            rows += [_Source(split, str(name)) for name in sources]
    if not rows:
        return None
    columns: list[Column[_Source]] = [
        Column("split", lambda row: row.of.split),
        Column("source", lambda row: row.name or "not named"),
        Column("images", lambda row: f"{len(row.rows):,}"),
        Column("patients", _patients),
    ]
    for name in dict.fromkeys(name for split in splits for name in split.runs):
        columns.append(Column("AUC", lambda row, name=name: row.auc(name), name))  # type: ignore[misc]
        if all(split.first.labels is not None for split in splits):
            columns.append(Column("accuracy", lambda row, name=name: row.accuracy(name), name))  # type: ignore[misc]
    note = (
        "Mean over seeds ± half of its 95% interval. The AUC is of the classes of which a source has images and "
        f"of which it lacks some; {NONE} where there is no such class."
    )
    return Table.of("Scores by source", columns, rows, note)


def _accuracy(run: Predictions) -> float:
    assert run.labels is not None
    return float((run.probabilities.argmax(1) == run.labels).mean())
