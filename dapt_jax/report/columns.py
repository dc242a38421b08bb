"""Tables, built from columns, as plain values for both templates."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from dapt_jax.formatting import NONE
from dapt_jax.statistics import Interval

R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One value of a table.

    Attributes:
        text: Text of the value.
        small: Secondary text beside it, usually its interval.
        best: Whether it is marked as the best of its column.
        not_significantly_worse: Whether it is marked as not significantly worse than the best.
    """

    text: str
    small: str = ""
    best: bool = False
    not_significantly_worse: bool = False


@dataclasses.dataclass(frozen=True)
class Column(Generic[R]):
    """A column of a table; adding one needs no other edit.

    Attributes:
        title: Heading of the column.
        read: Function from the subject of a row to its cell or text.
        group: Heading above neighbouring columns that share it.
    """

    title: str
    read: Callable[[R], Cell | str]
    group: str = ""

    def cell(self, row: R) -> Cell:
        """Return the cell of a row."""
        found = self.read(row)
        return found if isinstance(found, Cell) else Cell(found)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: Heading of the table.
        columns: Headings of the columns.
        rows: Cells, one for each column.
        groups: Headings above the columns, as (heading, number of columns).
        note: Note below the table.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    groups: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    note: str = ""

    @classmethod
    def of(cls, title: str, columns: Sequence[Column[R]], rows: Iterable[R], note: str = "") -> Table:
        """Build a table; neighbouring columns of one group share its heading.

        Args:
            title: Heading of the table.
            columns: Columns of the table.
            rows: Subjects of the rows.
            note: Note below the table.
        """
        groups = [
            (group, len(list(members)))
            for group, members in itertools.groupby(columns, lambda each: each.group)
        ]
        cells = [[column.cell(row) for column in columns] for row in rows]
        return cls(title, [column.title for column in columns], cells, groups, note)

    @property
    def flat(self) -> list[str]:
        """Headings without groups; a duplicate heading is prefixed with that of its group."""
        headings = [heading for heading, width in self.groups for _ in range(width)] or [""] * len(
            self.columns
        )
        return [
            f"{heading} {column}" if self.columns.count(column) > 1 else column
            for heading, column in zip(headings, self.columns, strict=True)
        ]


def score(interval: Interval | None, signed: bool = False) -> Cell:
    """Return a score with three decimals and its interval."""
    if interval is None:
        return Cell(NONE)
    sign = "+" if signed else ""
    small = "" if interval.low is None else f"[{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
    return Cell(f"{interval.mean:{sign}.3f}", small)


def compact(interval: Interval | None) -> Cell:
    """Return a score as mean ± half-width."""
    if interval is None:
        return Cell(NONE)
    return Cell(f"{interval.mean:.3f}", "" if interval.half is None else f"±{interval.half:.3f}")


def in_words(interval: Interval) -> str:
    """Return a score with its interval, or why it has none.

    >>> in_words(Interval(0.8, 0.78, 0.82, 5)), in_words(Interval(0.8, None, None, 1))
    ('0.800 (95% interval 0.780 to 0.820, 5 seeds)', '0.800 (one seed)')
    """
    if interval.low is None:
        return f"{interval.mean:.3f} ({'one seed' if interval.n == 1 else f'the same in {interval.n} seeds'})"
    return f"{interval.mean:.3f} (95% interval {interval.low:.3f} to {interval.high:.3f}, {interval.n} seeds)"
