"""The first lines of a report: what to use, how sure that is, and what would change it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import scipy

from dapt_jax.formatting import number, p_value, percent
from dapt_jax.metrics import lower_is_better
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import CHECKPOINT_MARK
from dapt_jax.report.chance import BaselineLevel, baseline_levels, chance_level, is_above, is_at
from dapt_jax.report.columns import in_words
from dapt_jax.report.marks import LEVEL, is_different
from dapt_jax.report.patients import PatientError, error_of_difference
from dapt_jax.statistics import Comparison, Interval, holm, mean_interval, paired_t
from dapt_jax.statistics.intervals import defined
from dapt_jax.statistics.power import POWER

UNADAPTED = "none"
"""Strategy of the encoder without adaptation."""

MOST_SEEDS, MOST_TIMES = 200, 100
"""The most seeds that are named, and the most times the patients there are."""


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The answer of a study for one task.

    Attributes:
        headline: What to use, or that nothing is shown to be better.
        lines: Pairs of a heading and a short text.
    """

    headline: str
    lines: list[tuple[str, str]]


def recommend(records: Records, task: str, workdir: Path | None = None) -> Recommendation | None:
    """Return the recommendation for a task; None without scores.

    Strategies are compared over the seeds that all of them have, where there are any. The best strategy is
    recommended where it is shown to be better than every other: by paired t-tests over seeds, adjusted by Holm's
    method. Where the difference from the runner-up could be due to the patients of the split, the headline says
    so. Otherwise it is the cheapest of those that are above chance, over seeds and over patients, and not shown to
    be worse: than the best by the same test without adjustment, since the more strategies there are, the more
    would pass an adjusted one; nor than another, adjusted over the strategy's own tests. Nothing is recommended
    where none is above chance, and where strategies are scored on different images.

    Args:
        records: Records of the study.
        task: The task.
        workdir: Folder of its predictions, which say what holds for other patients; None without any.
    """
    found = _Comparisons.of(records, task)
    if found is None:
        return None
    if found.unlike:
        return Recommendation(f"No strategy is recommended: {found.unlike}.", [])
    split, title, sign, means, best = found.split, found.title, found.sign, found.means, found.best
    chance, levels = chance_level(records, task, split), baseline_levels(records, task, split)

    above = list(means)
    if chance is not None:
        by_seeds = [name for name, mean in means.items() if not is_at(mean, chance, sign)]
        errors = {
            name: None
            if workdir is None
            else error_of_difference(workdir, records, task, split, name, chance)
            for name in by_seeds
        }
        above = [name for name, error in errors.items() if error is None or error.is_shown]
        if not above:
            return _at_chance(found, chance, next(filter(None, errors.values()), None))
    cost = {
        name: mean.mean for name in means if (mean := records.mean_cost(name, task, lambda c: c.total_flops))
    }
    equal = [name for name in above if not found.is_worse(name)]
    equal = equal or [max(above, key=lambda name: sign * means[name].mean)]
    chosen = min(equal, key=lambda name: (cost.get(name, math.inf), -sign * means[name].mean))
    others = [name for name in means if name != chosen]
    rival = max(others, key=lambda name: sign * means[name].mean) if others else None
    error = (
        error_of_difference(workdir, records, task, split, chosen, rival)
        if workdir and rival is not None
        else None
    )
    score = f"{split} {title} {in_words(means[chosen])}; {_against(found, chosen, chance, levels)}"
    lines = [("Score", score), ("Cost", _cost(records, task, chosen, cost))]
    if inside := _inside(records, task, split, chosen):
        lines.append((records.in_domain(task).capitalize(), inside))
    if rival is not None:
        test = found.test(chosen, rival)
        adjusted = found.adjusted.get(rival if chosen == best else chosen)
        lines += [
            ("How sure", _sureness(test, rival, title, adjusted, len(found.adjusted))),
            ("Runner-up", f"{rival}: {in_words(means[rival])}"),
            ("What would change it", _change(test, adjusted, error, chosen, rival, split)),
        ]
        if error is not None:
            lines.append((f"{error.drawn.capitalize()}, {split}", _patients(error, chosen, rival)))
    if once := [name for name in records.adapted_once if name in means]:
        whose = "each strategy" if len(once) == len(means) else ", ".join(once)
        one = f"one of {whose} (adapt.seed): intervals and tests say nothing of other adaptations"
        lines.append(("Adaptations", one))
    headline = f"{chosen} is the only strategy with a score: there is nothing to compare"
    if rival is not None:
        headline = _headline(found, chosen, len(equal), len(above), error, {*equal} <= {*cost})
    return Recommendation(headline + ".", [(heading, text + ".") for heading, text in lines])


def _headline(
    found: _Comparisons, chosen: str, equal: int, above: int, error: PatientError | None, is_cheapest: bool
) -> str:
    """Return what to use.

    Args:
        found: Scores and tests.
        chosen: The strategy.
        equal: Number of strategies that are not shown to be worse than another, of those above chance.
        above: Number of strategies above chance.
        error: Difference from the runner-up over patients, where it is known.
        is_cheapest: Whether the costs of all these are known, so that it is the cheapest of them.
    """
    on = f"on the {found.split} set"
    if all(found.is_shown_worse(name) for name in found.means if name != chosen):
        if error is None or error.is_shown:
            return f"Use {chosen}: it is shown to be better than every other strategy {on}"
        return (
            f"Use {chosen}: on the images of the {found.split} set it is better than every other strategy over seeds, "
            f"but this is not shown for other {error.drawn}"
        )
    none = f"No strategy is shown to be better than every other {on}"
    if not is_cheapest:
        return none
    which = "is above chance and" if above < len(found.means) else "is"
    which = f"{which} not shown to be worse than another"
    if equal == 1:
        return f"{none}. Use {chosen}, the only one that {which}"
    best = "and has the best mean" if chosen == found.best else f"({found.best} has the best mean)"
    return f"{none}. Use {chosen}, the cheapest of {equal} each of which {which} {best}"


@dataclasses.dataclass(frozen=True)
class _Comparisons:
    """The strategies of a task on the split that decides, each tested against the one of the best mean.

    Attributes:
        split: The split.
        title: Name of the metric.
        sign: 1 where higher is better, else -1.
        values: Score of every seed by strategy, of the seeds that all strategies have, where there are any.
        places: Which of the study's seeds these are.
        means: Their means.
        best: The strategy of the best mean.
        adjusted: By other strategy, p of the test against the best after Holm's method; None where seeds test nothing.
        unlike: What keeps them from being compared; empty for nothing.
    """

    split: str
    title: str
    sign: int
    values: dict[str, list[float | None]]
    places: list[int]
    means: dict[str, Interval]
    best: str
    adjusted: dict[str, float | None]
    unlike: str

    @classmethod
    def of(cls, records: Records, task: str) -> _Comparisons | None:
        """Return the comparisons of a task; None without scores."""
        split, metric, protocol = records.deciding_split(task), records.metric(task), records.protocol(task)
        every = {
            name: records.values(name, task, split, protocol, metric) for name in _means(records, task, split)
        }
        if not every:
            return None
        by_seed = enumerate(zip(*every.values(), strict=True))
        places = [place for place, values in by_seed if len(defined(values)) == len(every)]
        places = places or list(range(len(records.seeds)))
        values = {name: [each[place] for place in places] for name, each in every.items()}
        means = {name: mean for name, each in values.items() if (mean := mean_interval(each)) is not None}
        sign = -1 if lower_is_better(metric) else 1
        best = max(means, key=lambda name: sign * means[name].mean)
        tests = {
            name: test for name in means if name != best and (test := paired_t(values[name], values[best]))
        }
        adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
        title = records.display_name(task, metric)
        return cls(split, title, sign, values, places, means, best, adjusted, records.unlike(task, split))

    def test(self, first: str, second: str) -> Comparison | None:
        """Return the paired t-test of two strategies."""
        return paired_t(self.values[first], self.values[second])

    def is_worse(self, name: str) -> bool:
        """Return whether a strategy is shown to be worse than the best one, or than any other.

        Than the best by the test itself, without adjustment; than one of the others after Holm's method over the
        strategy's own tests. A difference that is the same in every seed needs no test.
        """
        tests = {other: test for other in self.means if other != name and (test := self.test(name, other))}
        adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
        return any(
            self.sign * test.difference.mean < 0
            and is_different(test, test.p if other == self.best else adjusted[other])
            for other, test in tests.items()
        )

    def is_shown_worse(self, name: str) -> bool:
        """Return whether the best strategy is shown to be better than another, after Holm's method."""
        test = self.test(name, self.best)
        is_lower = test is not None and self.sign * test.difference.mean < 0
        return is_lower and _is_significant(self.adjusted.get(name))


def arms_shown(records: Records, task: str) -> list[str]:
    """Return the strategies whose predictions are drawn: best, runner-up and the unadapted `none`.

    Best and runner-up are those of the mean over seeds on the external set, or in-domain without one.
    """
    split = records.deciding_split(task)
    means = _means(records, task, split)
    ranked = sorted(
        means, key=lambda name: means[name].mean, reverse=not lower_is_better(records.metric(task))
    )
    return list(dict.fromkeys([*ranked[:2], *(name for name in ranked if name == UNADAPTED)]))


def seeds_for(test: Comparison) -> int | None:
    """Return the number of seeds that would show a paired difference; None beyond `MOST_SEEDS` or unknown.

    By a two-sided paired t-test at `LEVEL` with a power of `POWER`, if mean and spread stay as seen.
    """
    half, n, mean = test.difference.half, test.difference.n, abs(test.difference.mean)
    if half is None or not mean:
        return None
    deviation = half * math.sqrt(n) / float(scipy.stats.t.ppf(0.975, n - 1))
    for count in range(2, MOST_SEEDS + 1):
        quantiles = scipy.stats.t.ppf(1 - LEVEL / 2, count - 1) + scipy.stats.t.ppf(POWER, count - 1)
        if mean >= float(quantiles) * deviation / math.sqrt(count):
            return count
    return None


def _is_significant(p: float | None) -> bool:
    return p is not None and p < LEVEL


def _at_chance(found: _Comparisons, chance: float, error: PatientError | None) -> Recommendation:
    """Return that no strategy is shown to score above chance: over seeds, or on other patients."""
    split, title, best = found.split, found.title, found.best
    headline = f"No strategy is recommended: none is shown to score above chance on the {split} set."
    lines = [("Best score", f"{best}: {split} {title} {in_words(found.means[best])}; chance {chance:g}.")]
    if error is not None:
        headline = (
            f"No strategy is recommended: none is shown to score above chance on other {error.drawn} than those of the "
            f"{split} set."
        )
        spread = f"{error.patients:,} {error.drawn} leave ±{1.96 * error.error:.3f} of {title} to chance."
        lines.append((f"{error.drawn.capitalize()}, {split}", spread))
    return Recommendation(
        headline, [*lines, ("What would change it", f"a larger {split} set, or more seeds.")]
    )


def _against(found: _Comparisons, name: str, chance: float | None, levels: list[BaselineLevel]) -> str:
    """Return a score against chance, which it exceeds where that is known, and the one-feature baselines."""
    parts = [] if chance is None else [f"above chance ({chance:g})"]
    for level in levels:
        against = [level.values[place] for place in found.places]
        verb = "better" if is_above(found.values[name], against, found.sign) else "not shown to be better"
        parts.append(f"{verb} than {level}")
    seed = " in one seed, which tests nothing" if parts and found.means[name].n == 1 else ""
    return ", ".join(parts) + seed or "chance is not known for this metric"


def _cost(records: Records, task: str, name: str, cost: dict[str, float]) -> str:
    if name not in cost:
        return "not recorded"
    seconds = records.mean_cost(name, task, lambda each: each.wall_s)
    text = f"{number(cost[name] / 1e12)} TFLOP" + (f" and {number(seconds.mean)} s" if seconds else "")
    reference = records.reference
    if reference and reference != name and cost.get(reference):
        text += f" a seed, {percent(cost[name] / cost[reference])} of the FLOPs of {reference}"
    return text


def _means(records: Records, task: str, split: str) -> dict[str, Interval]:
    """Return the mean score of each strategy on a split, without checkpoints and strategies that have none."""
    protocol, metric = records.protocol(task), records.metric(task)
    return {
        name: mean
        for name in records.strategies
        if CHECKPOINT_MARK not in name
        and (mean := mean_interval(records.values(name, task, split, protocol, metric))) is not None
    }


def _inside(records: Records, task: str, split: str, chosen: str) -> str | None:
    """Return the best in-domain score beside that of `chosen`; None where the split is in-domain or they agree."""
    own, sign = records.in_domain(task), -1 if lower_is_better(records.metric(task)) else 1
    if own == split:
        return None
    means = _means(records, task, own)
    best = max(means, key=lambda name: sign * means[name].mean, default=chosen)
    if best == chosen or chosen not in means:
        return None
    return f"{best} has the best mean, {in_words(means[best])}; {chosen} {in_words(means[chosen])}"


def _sureness(
    test: Comparison | None, rival: str, title: str, adjusted: float | None, comparisons: int
) -> str:
    if test is None:
        return f"there is no seed with scores of both it and {rival}"
    difference = test.difference
    if difference.low is None:
        seeds = "one seed" if difference.n == 1 else f"each of {difference.n} seeds"
        return f"{title} differs by {difference.mean:+.3f} from {rival} in {seeds}, which tests nothing"
    several = adjusted is not None and comparisons > 1
    after = f"{p_value(adjusted)} after Holm's method over {comparisons} strategies" if several else ""
    return (
        f"{title} differs by {difference.mean:+.3f} from {rival} "
        f"(95% interval {difference.low:+.3f} to {difference.high:+.3f}, p {p_value(test.p)}"
        + (f", {after})" if after else ", not adjusted)")
    )


def _change(
    test: Comparison | None,
    adjusted: float | None,
    error: PatientError | None,
    chosen: str,
    rival: str,
    split: str,
) -> str:
    """Return what would change the recommendation, from the spread that was seen."""
    if test is None or test.difference.n == 1:
        return "more seeds: with five or more the strategies can be compared"
    if test.difference.low is None:
        return f"another {split} set: the scores do not vary with the seed, so that more seeds would tell nothing"
    n, needed = test.difference.n, seeds_for(test)
    if _is_significant(test.p) and error is not None and not error.is_shown:
        return f"more {error.drawn}, or another {split} set: more seeds on the same {error.drawn} would not"
    if _is_significant(adjusted):
        return f"another {split} set, or a budget in which {rival} costs less"
    if _is_significant(test.p):
        return f"more seeds, for the difference from {rival} to stand after adjusting for the number of strategies"
    if needed is None:
        return f"more than {MOST_SEEDS} seeds to tell {chosen} from {rival} at this difference"
    more = max(1, needed - n)
    return (
        f"about {more} more seed{'s' * (more != 1)} would tell {chosen} from {rival}, if difference and spread "
        f"stay as seen (power {POWER:.0%})"
    )


def _patients(error: PatientError, chosen: str, rival: str) -> str:
    """Return how many patients, or images without one, would show the difference, from its spread over them."""
    alone = "" if error.drawn == "patients" else ", each drawn by itself"
    seen = (
        f"{error.patients:,} now{alone}; these seeds differ by {error.difference:+.3f} ± {1.96 * error.error:.3f} over "
        f"{error.drawn}"
    )
    if error.needed <= error.patients:
        return f"{seen}; that suffices to tell {chosen} from {rival}, if other {error.drawn} are like these"
    if error.needed > MOST_TIMES * error.patients:
        return f"{seen}; more than {MOST_TIMES} times as many would be needed to tell {chosen} from {rival}"
    more = math.ceil(error.needed) - error.patients
    return f"{seen}; about {more:,} more would tell {chosen} from {rival}, if the difference stays (power {POWER:.0%})"
