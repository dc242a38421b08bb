"""Summary sentences, generated from the results."""

from __future__ import annotations

from collections.abc import Iterable

from dapt_jax.formatting import p_value, percent
from dapt_jax.metrics import lower_is_better
from dapt_jax.records.study_records import Records
from dapt_jax.report.chance import baseline_levels, chance_level, is_above, is_at
from dapt_jax.report.claims import claims
from dapt_jax.report.columns import in_words
from dapt_jax.report.main_table import comparisons
from dapt_jax.report.marks import LEVEL, is_different
from dapt_jax.statistics import Comparison, mean_interval


def summary(records: Records, task: str) -> list[str]:
    """Return sentences on a task: the reference, differences from it, costs, and generalization gaps."""
    metric, protocol, reference = records.metric(task), records.protocol(task), records.reference
    split = records.deciding_split(task)
    if reference is None or protocol is None:
        return ["There is no score yet."]
    base = mean_interval(records.values(reference, task, split, protocol, metric))
    if base is None:
        return [f"{reference}, the reference, has no {split} {records.display_name(task, metric)} yet."]
    sentences = [
        f"On the {split} set {reference} reaches {records.display_name(task, metric)} {in_words(base)}."
    ]
    sentences += _differences(records, task, split)
    sentences += _non_inferiority(records, task, split)
    sentences += _cheapest(records, task, split)
    sentences += _gaps(records, task)
    sentences += _baseline(records, task, split)
    return sentences


def _differences(records: Records, task: str, split: str) -> list[str]:
    """Return sentences on significant differences from the reference and on detectable differences."""
    tests, reference = comparisons(records, task, split), records.reference
    if unlike := records.unlike(task, split):
        return [f"Strategies are not compared: {unlike}."]
    if not tests:
        return ["No other strategy has a score to compare."]
    if all(test.difference.n < 2 for test, _ in tests.values()):
        means = {name: test.difference.mean for name, (test, _) in tests.items()}
        listed = ", ".join(f"{name} {mean:+.3f}" for name, mean in means.items())
        return [f"Differences from {reference}: {listed}. With one seed there is no test."]
    clear = {name: (test, p) for name, (test, p) in tests.items() if p is not None and p < LEVEL}
    sentences = []
    if clear:
        parts = [
            f"{name} by {test.difference.mean:+.3f} (p "
            f"{'' if p is not None and p < 0.001 else '= '}{p_value(p)})"
            for name, (test, p) in clear.items()
        ]
        sentences.append(f"Significantly different from {reference}: {_list(parts)}.")
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
            f"Significantly different from {reference} before, but not after adjusting for {len(tests)} "
            "comparisons: "
            f"{_list(parts)}."
        )
    constant = {name: test for name, (test, _) in tests.items() if test.is_constant}
    if constant:
        parts = [f"{name} by {test.difference.mean:+.3f}" for name, test in constant.items()]
        sentences.append(
            f"Different from {reference} by the same in every seed, so that seeds test nothing: {_list(parts)}."
        )
    told = (*clear, *alone, *constant)
    rest = {name: test for name, (test, _) in tests.items() if name not in told}
    halves = [test.difference.half for test in rest.values() if test.difference.half is not None]
    if halves:
        differences = [test.difference.mean for test in rest.values()]
        sentences.append(
            f"Not significantly different from {reference}: {_list(list(rest))}, with mean differences of "
            f"{_range(differences, '+')} and intervals of ±{_range(halves)}. This does not show that they "
            "are equal: a "
            f"difference smaller than its interval cannot be detected with {_seeds(rest.values())}."
        )
    return sentences


def _non_inferiority(records: Records, task: str, split: str) -> list[str]:
    """Return sentences on strategies with and without shown non-inferiority to the reference."""
    found = {
        n: claim for n, claim in claims(records, task, split).items() if claim.non_inferiority is not None
    }
    if not found:
        return []
    what = (
        f"Non-inferiority to {records.reference} with a margin of {records.margin:g} "
        f"{records.display_name(task, records.metric(task))}"
    )
    shown = {name: claim for name, claim in found.items() if claim.verdict in ("non-inferior", "equivalent")}
    rest = [name for name in found if name not in shown]
    if not shown:
        return [f"{what} was not shown for any strategy."]
    parts = [
        f"{name} (p "
        f"{'' if p_value(claim.non_inferiority).startswith('<') else '= '}{p_value(claim.non_inferiority)})"
        for name, claim in shown.items()
    ]
    sentence = f"{what} was shown for {_list(parts)}"
    return [f"{sentence}; it was not shown for {_list(rest)}." if rest else f"{sentence}."]


def _cheapest(records: Records, task: str, split: str) -> list[str]:
    """Return a sentence on the cheapest strategy not significantly worse than the reference."""
    tests, reference = comparisons(records, task, split), records.reference
    sign = -1 if lower_is_better(records.metric(task)) else 1
    flops = {n: records.mean_cost(n, task, lambda cost: cost.total_flops) for n in records.strategies}
    wall = {n: records.mean_cost(n, task, lambda cost: cost.wall_s) for n in records.strategies}
    base, base_wall = flops.get(reference or ""), wall.get(reference or "")
    if base is None or base_wall is None or not base.mean or not base_wall.mean:
        return []
    # Unadjusted p: for calling a strategy as good as the reference, Holm's adjustment would be
    # anti-conservative.
    worse = {n for n, (t, _) in tests.items() if sign * t.difference.mean < 0 and is_different(t, t.p)}
    candidates = {n: f.mean for n, f in flops.items() if f is not None and n in tests and n not in worse}
    cheaper = {name: cost for name, cost in candidates.items() if cost < base.mean}
    if not cheaper:
        return [f"Nothing that costs fewer FLOPs than {reference} reaches its score."] if worse else []
    name = min(cheaper, key=lambda each: cheaper[each])
    seconds = wall[name]
    time = f" and {percent(seconds.mean / base_wall.mean)} of its time" if seconds is not None else ""
    share = percent(cheaper[name] / base.mean)
    difference = tests[name][0].difference
    spread = (
        "" if difference.low is None else f" (95% interval {difference.low:+.3f} to {difference.high:+.3f})"
    )
    whose = "whose score is not significantly worse" if difference.n > 1 else "that was run"
    return [
        f"The cheapest strategy {whose} is {name}, at {share} of {reference}'s FLOPs{time}, "
        f"with a mean {split} {records.display_name(task, records.metric(task))} {difference.mean:+.3f} "
        f"from it{spread}."
    ]


def _gaps(records: Records, task: str) -> list[str]:
    """Return a sentence on the smallest and the largest loss from in-domain to external data."""
    metric, protocol = records.metric(task), records.protocol(task)
    if any(records.unlike(task, split) for split in records.splits(task)):
        return []
    gaps = {
        name: mean_interval(records.generalization_gaps(name, task, protocol, metric))
        for name in records.strategies
    }
    known = {name: gap.mean for name, gap in gaps.items() if gap is not None}
    if len(known) < 2:
        return []
    sign = -1 if lower_is_better(metric) else 1
    low, high = min(known, key=lambda n: sign * known[n]), max(known, key=lambda n: sign * known[n])
    return [
        f"From {records.in_domain(task)} to external data {records.display_name(task, metric)} worsens least "
        f"for {low} "
        f"(generalization gap {known[low]:+.3f}) and most for {high} ({known[high]:+.3f})."
    ]


def _baseline(records: Records, task: str, split: str) -> list[str]:
    """Return sentences on strategies that exceed neither chance nor a one-feature baseline."""
    metric, protocol = records.metric(task), records.protocol(task)
    sign = -1 if lower_is_better(metric) else 1
    means = {
        name: mean
        for name in records.strategies
        if (mean := mean_interval(records.values(name, task, split, protocol, metric))) is not None
    }
    chance = chance_level(records, task, split)
    at_chance = [name for name, mean in means.items() if chance is not None and is_at(mean, chance, sign)]
    sentences = []
    if at_chance:
        sentences.append(f"Not shown to be above chance ({chance:g}): {_list(at_chance)}.")
    for level in baseline_levels(records, task, split):
        below = [name for name, mean in means.items() if sign * (mean.mean - level.value) <= 0]
        scores = {name: records.values(name, task, split, protocol, metric) for name in means}
        unclear = [
            name
            for name, values in scores.items()
            if name not in below and not is_above(values, level.values, sign)
        ]
        above = [name for name in means if name not in (*below, *unclear, *at_chance)]
        for verb, names in (("not better", below), ("not shown to be better", unclear)):
            if names:
                sentences.append(f"{_list(names)} {'is' if len(names) == 1 else 'are'} {verb} than {level}.")
        seed = " in one seed, which tests nothing" if all(means[name].n == 1 for name in above) else ""
        if above and len(above) == len(means):
            sentences.append(f"Every strategy is better than {level}{seed}.")
        elif above:
            sentences.append(f"Better than {level}{seed}: {_list(above)}.")
    return sentences


def _range(values: list[float], sign: str = "") -> str:
    low, high = f"{min(values):{sign}.3f}", f"{max(values):{sign}.3f}"
    return low if low == high else f"{low} to {high}"


def _seeds(tests: Iterable[Comparison]) -> str:
    counts = sorted({test.difference.n for test in tests})
    return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
