"""Significance marks of a table: the best arm, and those not significantly worse."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from dapt_jax.formatting import p_value
from dapt_jax.report.columns import Cell
from dapt_jax.statistics import Comparison, holm, mean_interval, paired_t, welch_t

LEVEL = 0.05
NOTE = (
    "Bold: the best mean. †: not significantly worse than the best by a two-sided paired t-test over seeds "
    f"(p ≥ {LEVEL}, not adjusted), which does not show that they are equal."
)
P_NOTE = (
    "p: each against the best of its column, after Holm's method over the column: paired t-test over seeds, "
    "then Welch's t-test of independent runs, both two-sided."
)


@dataclasses.dataclass(frozen=True)
class Marks:
    """Marks of a column.

    Attributes:
        best: Names with the best mean as printed; empty where fewer than two have a mean.
        not_significantly_worse: Names whose test against the best is not significant.
        p: The p of the test against the best, by name; None where it is undefined.
        adjusted: Paired and Welch's p against the best after Holm's method over the column, by name, where
            both are defined.
    """

    best: frozenset[str]
    not_significantly_worse: frozenset[str]
    p: Mapping[str, float | None]
    adjusted: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def mark(self, cell: Cell, name: str) -> Cell:
        """Return a cell with the marks of its arm, and its p against the best."""
        is_close = name in self.not_significantly_worse
        if name in self.adjusted:
            paired, welch = map(p_value, self.adjusted[name])
            cell = dataclasses.replace(cell, small=f"{cell.small} p {paired}, Welch {welch}".strip())
        return dataclasses.replace(cell, best=name in self.best, not_significantly_worse=is_close)


def is_different(test: Comparison, p: float | None) -> bool:
    """Return whether two arms differ: by a p below `LEVEL`, or by the same in every seed, which needs no test.

    Args:
        test: Their comparison.
        p: Its p, or the adjusted one.
    """
    return test.is_constant or (p is not None and p < LEVEL)


UNMARKED = Marks(frozenset(), frozenset(), {})
"""No marks: of a column whose values cannot be compared."""


def significance_marks(
    means: Mapping[str, float],
    p_against: Callable[[str, str], float | None],
    lowest: bool = False,
    digits: int = 3,
    level: float = LEVEL,
) -> Marks:
    """Return the marks of a column.

    Args:
        means: Means by name, for the arms with a mean.
        p_against: Function from two names to the p of the test against the best; None if undefined.
        lowest: Whether lower values are better.
        digits: Number of printed decimals; means that print alike count as equal.
        level: Smallest p that is not significant.
    """
    if len(means) < 2:
        return UNMARKED
    choose = min if lowest else max
    leader = choose(means, key=lambda name: means[name])
    target = round(means[leader], digits)
    best = frozenset(name for name, mean in means.items() if round(mean, digits) == target)
    p = {name: p_against(name, leader) for name in means if name not in best}
    close = frozenset(name for name, value in p.items() if value is not None and value >= level)
    return Marks(best, close, p)


def over_seeds(values: Mapping[str, Sequence[float | None]], lowest: bool = False) -> Marks:
    """Return the marks by the paired t-test over seeds, and p by this test and by Welch's.

    Args:
        values: Values by name, one per seed in the same order; None where missing.
        lowest: Whether lower values are better.
    """
    intervals = {name: mean_interval(each) for name, each in values.items()}
    means = {name: interval.mean for name, interval in intervals.items() if interval is not None}

    def p_against(name: str, leader: str) -> float | None:
        test = paired_t(values[name], values[leader])
        if test is None:
            return None
        # The seeds that both have may rank them the other way round than the means over each one's own.
        is_worse = test.difference.mean > 0 if lowest else test.difference.mean < 0
        return test.p if is_worse or test.p is None else 1.0

    marks = significance_marks(means, p_against, lowest)
    if not marks.p:
        return marks
    leader = (min if lowest else max)(means, key=lambda name: means[name])
    independent = [welch_t(values[name], values[leader]) for name in marks.p]
    both = zip(
        holm(list(marks.p.values())),
        holm([None if test is None else test.p for test in independent]),
        strict=True,
    )
    adjusted = {
        name: (paired, welch)
        for name, (paired, welch) in zip(marks.p, both, strict=True)
        if paired is not None and welch is not None
    }
    return dataclasses.replace(marks, adjusted=adjusted)


def note_of_marks(note: str, rows: Iterable[Sequence[Cell]]) -> str:
    """Return a table's note, with an explanation of its marks if it has any."""
    cells = [cell for row in rows for cell in row]
    if any(", Welch " in cell.small for cell in cells):
        note = f"{note} {P_NOTE}".strip()
    if any(cell.not_significantly_worse for cell in cells):
        return f"{note} {NOTE}".strip()
    return f"{note} Bold: the best mean.".strip() if any(cell.best for cell in cells) else note
