"""Which of several arms a table marks: the best, and those not significantly worse than it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from dapt_jax.statistics import mean_interval, paired_t

LEVEL = 0.05
NOTE = (
    "Bold: the best mean. †: not significantly worse than the best by a two-sided paired t-test over seeds "
    f"(p ≥ {LEVEL}, not adjusted), which is no proof of being as good."
)


@dataclasses.dataclass(frozen=True)
class Marks:
    """What is marked in a column.

    Attributes:
        best: names of the best mean as printed; none where fewer than two have a mean.
        held: names of those whose test against the best is not significant.
        p: of the test against the best, by name; None where it is undefined.
    """

    best: frozenset[str]
    held: frozenset[str]
    p: Mapping[str, float | None]


def marks(
    means: Mapping[str, float],
    p_against: Callable[[str, str], float | None],
    lowest: bool = False,
    digits: int = 3,
    level: float = LEVEL,
) -> Marks:
    """Marks a column.

    Args:
        means: by name, of the arms that have one.
        p_against: the p of an arm's test against the best, given both names; None where there is none.
        lowest: whether small values are the good ones.
        digits: decimals that are printed: means that print alike are alike.
        level: p from here on is not significant.
    """
    if len(means) < 2:
        return Marks(frozenset(), frozenset(), {})
    choose = min if lowest else max
    leader = choose(means, key=lambda name: means[name])
    target = round(means[leader], digits)
    best = frozenset(name for name, mean in means.items() if round(mean, digits) == target)
    p = {name: p_against(name, leader) for name in means if name not in best}
    held = frozenset(name for name, value in p.items() if value is not None and value >= level)
    return Marks(best, held, p)


def over_seeds(values: Mapping[str, Sequence[float | None]], lowest: bool = False) -> Marks:
    """Marks arms by the paired t-test over seeds.

    Args:
        values: by name, one value per seed in the same order; None where there is none.
        lowest: whether small values are the good ones.
    """
    intervals = {name: mean_interval(each) for name, each in values.items()}
    means = {name: interval.mean for name, interval in intervals.items() if interval is not None}

    def p_against(name: str, leader: str) -> float | None:
        test = paired_t(values[name], values[leader])
        return None if test is None else test.p

    return marks(means, p_against, lowest)
