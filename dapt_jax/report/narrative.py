"""The results in words, put together from the numbers alone."""

from __future__ import annotations

from collections.abc import Iterable

from dapt_jax.records.study_records import Records, lower_is_better, nice
from dapt_jax.records.vocabulary import BASELINE
from dapt_jax.report.claims import claims
from dapt_jax.report.marks import LEVEL
from dapt_jax.report.tables import comparisons, number, p_value
from dapt_jax.statistics import Comparison, mean_interval


def summary(records: Records, task: str) -> list[str]:
    """Returns sentences on a task: the reference, what differs from it, what is cheap, how far scores dip."""
    metric, protocol, reference = records.metric(task), records.protocol(task), records.reference
    split = "external" if "external" in records.splits(task) else "development"
    if reference is None or protocol is None:
        return ["There is no score yet."]
    base = mean_interval(records.values(reference, task, split, protocol, metric))
    if base is None:
        return [f"{reference}, with which the others would be compared, has no {split} {nice(metric)} yet."]
    spread = "one seed" if base.low is None else f"95% interval {base.low:.3f} to {base.high:.3f}, {base.n} seeds"
    sentences = [f"On the {split} set {reference} reaches {nice(metric)} {base.mean:.3f} ({spread})."]
    sentences += _differences(records, task, split)
    sentences += _no_worse(records, task, split)
    sentences += _cheapest(records, task, split)
    sentences += _dips(records, task)
    sentences += _baseline(records, task, split)
    return sentences


def _differences(records: Records, task: str, split: str) -> list[str]:
    """Says which strategies differ from the reference, and what the test could have seen."""
    tests, reference = comparisons(records, task, split), records.reference
    if not tests:
        return ["No other strategy has a score to compare."]
    if all(test.difference.n < 2 for test, _ in tests.values()):
        means = {name: test.difference.mean for name, (test, _) in tests.items()}
        listed = ", ".join(f"{name} {mean:+.3f}" for name, mean in means.items())
        return [f"Differences from {reference}: {listed}. With one seed nothing can be said of chance."]
    clear = {name: (test, p) for name, (test, p) in tests.items() if p is not None and p < LEVEL}
    sentences = []
    if clear:
        parts = [
            f"{name} by {test.difference.mean:+.3f} (p {'' if p is not None and p < 0.001 else '= '}{p_value(p)})"
            for name, (test, p) in clear.items()
        ]
        sentences.append(f"Different from {reference} beyond chance: {_list(parts)}.")
    alone = {
        name: (test, p)
        for name, (test, p) in tests.items()
        if name not in clear and test.p is not None and test.p < LEVEL
    }
    if alone:
        parts = [
            f"{name} by {test.difference.mean:+.3f} (p = {p_value(test.p)}, adjusted {p_value(p)})"
            for name, (test, p) in alone.items()
        ]
        sentences.append(
            f"Different from {reference} when looked at alone, but not after adjusting for {len(tests)} comparisons: "
            f"{_list(parts)}."
        )
    rest = {name: test for name, (test, _) in tests.items() if name not in clear and name not in alone}
    halves = [test.difference.half for test in rest.values() if test.difference.half is not None]
    if halves:
        differences = [test.difference.mean for test in rest.values()]
        sentences.append(
            f"Within the interval, so not to be told from {reference}: {_list(list(rest))}, with mean differences of "
            f"{_range(differences, '+')} and intervals of ±{_range(halves)}. That is no proof that they are equal: a "
            f"difference smaller than its interval goes unseen with {_seeds(rest.values())}."
        )
    return sentences


def _no_worse(records: Records, task: str, split: str) -> list[str]:
    """Says which strategies were shown to be no worse than the reference by the margin, and which were not."""
    found = {n: claim for n, claim in claims(records, task, split).items() if claim.no_worse is not None}
    if not found:
        return []
    what = f"no worse than {records.reference} by a margin of {records.margin:g} {nice(records.metric(task))}"
    held = {name: claim for name, claim in found.items() if claim.says in ("no worse", "equivalent")}
    rest = [name for name in found if name not in held]
    if not held:
        return [f"Not shown of any strategy: to be {what}."]
    parts = [
        f"{name} (p {'' if p_value(claim.no_worse).startswith('<') else '= '}{p_value(claim.no_worse)})"
        for name, claim in held.items()
    ]
    shown = f"Shown to be {what}: {_list(parts)}"
    return [f"{shown}; not shown of {_list(rest)}." if rest else f"{shown}."]


def _cheapest(records: Records, task: str, split: str) -> list[str]:
    """Names the cheapest strategy that is not significantly worse than the reference."""
    tests, reference = comparisons(records, task, split), records.reference
    sign = -1 if lower_is_better(records.metric(task)) else 1
    flops = {n: records.mean_cost(n, task, lambda cost: cost.total_flops) for n in records.strategies}
    wall = {n: records.mean_cost(n, task, lambda cost: cost.wall_s) for n in records.strategies}
    base, base_wall = flops.get(reference or ""), wall.get(reference or "")
    if base is None or base_wall is None or not base.mean or not base_wall.mean:
        return []
    # By the p of each alone: to call a strategy as good as the reference, Holm's caution would be the wrong way round.
    worse = {n for n, (t, _) in tests.items() if t.p is not None and t.p < LEVEL and sign * t.difference.mean < 0}
    candidates = {n: f.mean for n, f in flops.items() if f is not None and n in tests and n not in worse}
    cheaper = {name: cost for name, cost in candidates.items() if cost < base.mean}
    if not cheaper:
        return [f"Nothing that costs fewer FLOPs than {reference} holds its score."] if worse else []
    name = min(cheaper, key=lambda each: cheaper[each])
    seconds = wall[name]
    time = f" and {_percent(seconds.mean / base_wall.mean)} of its time" if seconds is not None else ""
    share = _percent(cheaper[name] / base.mean)
    difference = tests[name][0].difference
    spread = "" if difference.low is None else f" (95% interval {difference.low:+.3f} to {difference.high:+.3f})"
    held = "whose score was not shown to be worse" if difference.n > 1 else "that was run"
    return [
        f"The cheapest strategy {held} is {name}, at {share} of {reference}'s FLOPs{time}, "
        f"with a mean {split} {nice(records.metric(task))} {difference.mean:+.3f} from it{spread}."
    ]


def _dips(records: Records, task: str) -> list[str]:
    metric, protocol = records.metric(task), records.protocol(task)
    dips = {name: mean_interval(records.dips(name, task, protocol, metric)) for name in records.strategies}
    known = {name: dip.mean for name, dip in dips.items() if dip is not None}
    if len(known) < 2:
        return []
    low, high = min(known, key=lambda n: known[n]), max(known, key=lambda n: known[n])
    return [
        f"From development to external data {nice(metric)} changes least for {low} (dip {known[low]:+.3f}) "
        f"and most for {high} ({known[high]:+.3f})."
    ]


def _baseline(records: Records, task: str, split: str) -> list[str]:
    """Says which strategies do no better than a one-number baseline."""
    metric, protocol = records.metric(task), records.protocol(task)
    sign = -1 if lower_is_better(metric) else 1
    sentences = []
    for baseline in records.baselines(task):
        level = mean_interval(records.values(BASELINE, task, split, baseline, metric))
        if level is None:
            continue
        means = {n: mean_interval(records.values(n, task, split, protocol, metric)) for n in records.strategies}
        below = [n for n, mean in means.items() if mean is not None and sign * (mean.mean - level.mean) <= 0]
        what = f"no better than the one-number baseline {baseline} ({level.mean:.3f})"
        sentences.append(
            f"{_list(below)} {'is' if len(below) == 1 else 'are'} {what}."
            if below
            else f"Every strategy is above the one-number baseline {baseline} ({level.mean:.3f})."
        )
    return sentences


def _range(values: list[float], sign: str = "") -> str:
    low, high = f"{min(values):{sign}.3f}", f"{max(values):{sign}.3f}"
    return low if low == high else f"{low} to {high}"


def _seeds(tests: Iterable[Comparison]) -> str:
    counts = sorted({test.difference.n for test in tests})
    return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def _percent(share: float) -> str:
    return f"{number(100 * share, 2)}%"


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
