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
from dapt_jax.report.chance import BaselineLevel, baseline_levels, chance_level, is_at
from dapt_jax.report.marks import LEVEL
from dapt_jax.report.patients import PatientError, error_of_difference
from dapt_jax.statistics import Comparison, Interval, holm, mean_interval, paired_t
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

    The best strategy is recommended where it is shown to be better than every other: by paired t-tests over
    seeds, adjusted by Holm's method. Where the difference from the runner-up could be due to the patients of
    the split, the headline says so. Otherwise it is the cheapest of those that are not shown to be worse than
    the best, and the headline says that none is shown to be better.

    Args:
        records: Records of the study.
        task: The task.
        workdir: Folder of its predictions, which say how many patients would do; None without any.
    """
    split = records.deciding_split(task)
    metric, protocol = records.metric(task), records.protocol(task)
    means = _means(records, task, split)
    if not means:
        return None
    values = {name: records.values(name, task, split, protocol, metric) for name in means}
    sign = -1 if lower_is_better(metric) else 1
    title = records.display_name(task, metric)
    chance, levels = chance_level(records, task), baseline_levels(records, task, split)
    best = max(means, key=lambda name: sign * means[name].mean)
    tests = {n: t for n in means if n != best and (t := paired_t(values[n], values[best])) is not None}
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    equal = [name for name in means if name == best or not _is_significant(adjusted.get(name))]
    cost = {
        name: mean.mean for name in means if (mean := records.mean_cost(name, task, lambda c: c.total_flops))
    }
    chosen = min(equal, key=lambda name: (cost.get(name, math.inf), -sign * means[name].mean))
    others = [name for name in means if name != chosen]
    rival = max(others, key=lambda name: sign * means[name].mean) if others else None
    error = (
        error_of_difference(workdir, records, task, split, chosen, rival)
        if workdir and rival is not None
        else None
    )
    at_chance = chance is not None and all(is_at(means[name], chance, sign) for name in means)
    score = f"{split} {title} {_interval(means[chosen])}; {_against(means[chosen], chance, levels, sign)}"
    lines = [("Score", score), ("Cost", _cost(records, task, chosen, cost))]
    if at_chance:
        headline = f"No strategy is recommended: none scores above chance on the {split} set"
        lines[0] = ("Best score", f"{best}: {split} {title} {_interval(means[best])}; chance {chance:g}")
        lines.pop()
    elif len(equal) == 1 and error is not None and not error.is_shown:
        headline = (
            f"Use {chosen}: on the images of the {split} set it is better than every other strategy over seeds, "
            f"but this is not shown for other patients"
        )
    elif len(equal) == 1 and others:
        headline = f"Use {chosen}: it is shown to be better than every other strategy on the {split} set"
    elif others:
        headline = (
            f"No strategy is shown to be better than {chosen} on the {split} set. "
            f"Use {chosen}, the cheapest of {len(equal)} between which nothing is decided"
            if chosen in cost
            else f"No strategy is shown to be better than {chosen} on the {split} set"
        )
    else:
        headline = f"{chosen} is the only strategy with a score: there is nothing to compare"
    if not at_chance and (inside := _inside(records, task, split, chosen)):
        lines.append((records.in_domain(task).capitalize(), inside))
    if rival is not None:
        test = paired_t(values[chosen], values[rival])
        lines += [
            (
                "How sure",
                _sureness(test, rival, title, adjusted.get(rival if chosen == best else chosen), len(tests)),
            ),
            ("Runner-up", f"{rival}: {_interval(means[rival])}"),
            ("What would change it", _change(test, error, chosen, rival, split)),
        ]
        if error is not None:
            lines.append((f"Patients, {split}", _patients(error, chosen, rival)))
    return Recommendation(headline + ".", [(heading, text + ".") for heading, text in lines])


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


def _interval(mean: Interval) -> str:
    if mean.low is None:
        return f"{mean.mean:.3f} (one seed)"
    return f"{mean.mean:.3f} (95% interval {mean.low:.3f} to {mean.high:.3f}, {mean.n} seeds)"


def _against(mean: Interval, chance: float | None, levels: list[BaselineLevel], sign: int) -> str:
    """Return a score against chance and the one-feature baselines."""
    parts = []
    if chance is not None:
        verb = "not shown to be above" if is_at(mean, chance, sign) else "above"
        parts.append(f"{verb} chance ({chance:g})")
    for level in levels:
        verb = "not shown to be better than" if is_at(mean, level.value, sign) else "better than"
        parts.append(f"{verb} {level}")
    seed = " in one seed, which tests nothing" if parts and mean.n == 1 else ""
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
    return f"{best} has the best mean, {_interval(means[best])}; {chosen} {_interval(means[chosen])}"


def _sureness(
    test: Comparison | None, rival: str, title: str, adjusted: float | None, comparisons: int
) -> str:
    if test is None:
        return f"there is no seed with scores of both it and {rival}"
    difference = test.difference
    if difference.low is None:
        return f"{title} differs by {difference.mean:+.3f} from {rival} in one seed, which tests nothing"
    several = adjusted is not None and comparisons > 1
    after = f"{p_value(adjusted)} after Holm's method over {comparisons} strategies" if several else ""
    return (
        f"{title} differs by {difference.mean:+.3f} from {rival} "
        f"(95% interval {difference.low:+.3f} to {difference.high:+.3f}, p {p_value(test.p)}"
        + (f", {after})" if after else ", not adjusted)")
    )


def _change(test: Comparison | None, error: PatientError | None, chosen: str, rival: str, split: str) -> str:
    """Return what would change the recommendation, from the spread that was seen."""
    if test is None or test.difference.low is None:
        return "more seeds: with five or more the strategies can be compared"
    n, needed = test.difference.n, seeds_for(test)
    if _is_significant(test.p) and error is not None and not error.is_shown:
        return f"more patients, or another {split} set: more seeds on the same patients would not"
    if _is_significant(test.p):
        return f"another {split} set, or a budget in which {rival} costs less"
    if needed is None:
        return f"more than {MOST_SEEDS} seeds to tell {chosen} from {rival} at this difference"
    more = max(1, needed - n)
    return (
        f"about {more} more seed{'s' * (more != 1)} would tell {chosen} from {rival}, if difference and spread "
        f"stay as seen (power {POWER:.0%})"
    )


def _patients(error: PatientError, chosen: str, rival: str) -> str:
    """Return how many patients would show the difference, from its spread over patients."""
    seen = f"{error.patients:,} now; these seeds differ by {error.difference:+.3f} ± {1.96 * error.error:.3f} over patients"
    if error.needed <= error.patients:
        return f"{seen}; that suffices to tell {chosen} from {rival}, if other patients are like these"
    if error.needed > MOST_TIMES * error.patients:
        return f"{seen}; more than {MOST_TIMES} times as many would be needed to tell {chosen} from {rival}"
    more = math.ceil(error.needed) - error.patients
    return f"{seen}; about {more:,} more would tell {chosen} from {rival}, if the difference stays (power {POWER:.0%})"
