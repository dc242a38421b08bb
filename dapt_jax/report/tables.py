"""The tables of a report, as plain values that both templates print."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from dapt_jax.cost.hardware import utilisation
from dapt_jax.records.ledger import STAGES, Row
from dapt_jax.records.study_records import BASELINE, KINDS, OF_MASKS, Records, lower_is_better, nice
from dapt_jax.report import marks
from dapt_jax.statistics import Comparison, Interval, holm, mean_interval, paired_t

NONE = "–"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One value; `small` is what stands beside it in small print, its interval as a rule.

    `best` and `held` are the marks of the best of a column and of those not significantly worse.
    """

    text: str
    small: str = ""
    best: bool = False
    held: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; `groups` are the headings above the columns, as (heading, columns spanned)."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    groups: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    note: str = ""

    @property
    def flat(self) -> list[str]:
        """The columns for a table without group headings: a name that comes twice has its group's before it."""
        headings = [heading for heading, width in self.groups for _ in range(width)] or [""] * len(self.columns)
        return [
            f"{heading} {column}" if self.columns.count(column) > 1 else column
            for heading, column in zip(headings, self.columns, strict=True)
        ]


def number(value: float | None, digits: int = 3) -> str:
    """Formats a quantity to `digits` significant digits, thousands set apart."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def millions(value: float | None) -> str:
    """Formats a count of parameters as 224 k or 23.5 M."""
    if value is None or value < 1000:
        return number(value)
    return f"{value / 1e3:.3g} k" if value < 999_500 else f"{value / 1e6:.3g} M"


def score(interval: Interval | None, signed: bool = False) -> Cell:
    """Formats a score with three decimals and its interval."""
    if interval is None:
        return Cell(NONE)
    sign = "+" if signed else ""
    small = "" if interval.low is None else f"[{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
    return Cell(f"{interval.mean:{sign}.3f}", small)


def mark(cell: Cell, name: str, marked: marks.Marks) -> Cell:
    """The same cell with the marks that its arm has in its column."""
    return dataclasses.replace(cell, best=name in marked.best, held=name in marked.held)


def marked_leaks(records: Records, table: Table, task: str | None = None) -> Table:
    """Return a table with a mark beside the splits whose images or patients were seen elsewhere, and a note that says so.

    Args:
        records: Of the study.
        table: Of one task, or over several.
        task: The task; None for all.
    """
    leaks = {split: what for name, of in records.leaks.items() if task in (None, name) for split, what in of.items()}
    if not leaks:
        return table

    def shown(text: str) -> str:
        return f"{text} ‡" if text in leaks else text

    listed = "; ".join(f"{split}: {what}" for split, what in leaks.items())
    return dataclasses.replace(
        table,
        groups=[(shown(heading), width) for heading, width in table.groups],
        columns=[shown(column) for column in table.columns],
        rows=[[dataclasses.replace(cell, text=shown(cell.text)) for cell in row] for row in table.rows],
        note=f"‡ Leak, kept on request; seen in training or in another set: {listed}. {table.note}".strip(),
    )


def p_value(p: float | None) -> str:
    """Formats a p-value."""
    if p is None:
        return NONE
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def ratio(value: float | None, reference: float | None) -> str:
    """Formats a quantity as a percentage of the reference's."""
    return NONE if value is None or not reference else percent(value / reference)


def comparisons(records: Records, task: str, split: str) -> dict[str, tuple[Comparison, float | None]]:
    """Tests every strategy against the reference on one split.

    Returns:
        By strategy, the paired test over seeds and its p adjusted by Holm's method over the strategies.
    """
    reference, protocol, metric = records.reference, records.protocol(task), records.metric(task)
    if reference is None:
        return {}
    against = records.values(reference, task, split, protocol, metric)
    tests = {
        name: test
        for name in records.strategies
        if name != reference
        and (test := paired_t(records.values(name, task, split, protocol, metric), against)) is not None
    }
    adjusted = holm([test.p for test in tests.values()])
    return {name: (test, p) for (name, test), p in zip(tests.items(), adjusted, strict=True)}


def main(records: Records, task: str) -> Table:
    """The first table of a task: scores, cost, and cost and significance against the reference."""
    metric, protocol, reference = records.metric(task), records.protocol(task), records.reference
    splits, names = records.splits(task), records.strategies
    has_dip = "development" in splits and "external" in splits
    scores = {
        (name, split): mean_interval(records.values(name, task, split, protocol, metric))
        for name in names
        for split in splits
    }
    dips = {name: mean_interval(records.dips(name, task, protocol, metric)) for name in names}
    tests = {split: comparisons(records, task, split) for split in splits if split != "test"}
    flops = {name: _mean(records.mean_cost(name, task, lambda cost: cost.total_flops)) for name in names}
    wall = {name: _mean(records.mean_cost(name, task, lambda cost: cost.wall_s)) for name in names}

    lowest = lower_is_better(metric)
    marked = {
        split: marks.over_seeds({n: records.values(n, task, split, protocol, metric) for n in names}, lowest)
        for split in splits
    }
    marked_dip = marks.over_seeds({name: records.dips(name, task, protocol, metric) for name in names}, not lowest)
    rows = []
    for name in names:
        row = [Cell(name)]
        row += [mark(score(scores[name, split]), name, marked[split]) for split in splits]
        if has_dip:
            row.append(mark(score(dips[name], signed=True), name, marked_dip))
        for read in (
            lambda cost: (cost.flops["dapt"] + cost.flops["score"]) / 1e12,
            lambda cost: cost.flops["transfer"] / 1e12,
            lambda cost: cost.seconds["train"],
            lambda cost: cost.wall_s,
            lambda cost: cost.kwh,
        ):
            row.append(Cell(number(_mean(records.mean_cost(name, task, read)))))
        row.append(Cell(millions(_mean(records.mean_cost(name, task, lambda cost: cost.trainable)))))
        row.append(Cell(ratio(flops[name], flops.get(reference or ""))))
        row.append(Cell(ratio(wall[name], wall.get(reference or ""))))
        row += [Cell("reference" if name == reference else p_value(tests[s].get(name, (0, None))[1])) for s in tests]
        rows.append(row)
    for baseline in records.baselines(task):
        means = [mean_interval(records.values(BASELINE, task, split, baseline, metric)) for split in splits]
        dip = [score(mean_interval(records.dips(BASELINE, task, baseline, metric)), signed=True)] if has_dip else []
        width = 8 + len(tests)
        rows.append([Cell(BASELINE, baseline), *map(score, means), *dip, *[Cell(NONE)] * width])
    columns = ["strategy", *splits, *(["dip"] if has_dip else [])]
    columns += ["adapt TFLOP", "transfer TFLOP", "train s", "wall s", "kWh", "trained params", "FLOPs", "time"]
    columns += [f"p {split}" for split in tests]
    groups = [
        ("", 1),
        (f"{nice(metric)}, {protocol or 'no protocol'}", len(splits) + has_dip),
        ("standalone cost of one seed, mean", 6),
        (f"against {reference}", 2 + len(tests)),
    ]
    return Table("Scores and cost", columns, rows, groups, _marks_note(_main_note(records, task, splits), rows))


def everything(records: Records, task: str) -> Table:
    """Every protocol and metric of a task, by strategy and split."""
    metrics, splits = records.metrics(task), records.splits(task)
    rows = _by_protocol(records, task, metrics)
    groups = [("", 2), *((nice(metric), len(splits)) for metric in metrics)]
    columns = ["protocol", "strategy", *(split for _ in metrics for split in splits)]
    note = _marks_note("Mean over seeds ± half the 95% t-interval.", rows)
    return Table("Every protocol and metric", columns, rows, groups, note)


def per_class(records: Records, task: str) -> Table | None:
    """A score of each class or segment, by protocol, strategy and split.

    It is the primary metric's where that comes by class, else the first such.

    Returns:
        None when no result has any.
    """
    metric = records.metric_by_class(task)
    if metric is None:
        return None
    classes, splits = records.classes(task, metric), records.splits(task)
    rows = _by_protocol(records, task, [f"{metric}/{label}" for label in classes])
    columns = ["protocol", "strategy", *(split for _ in classes for split in splits)]
    groups = [("", 2), *((label, len(splits)) for label in classes)]
    what = "One class against the rest; mean" if metric in ("auc", "ap") else "Mean"
    note = _marks_note(f"{what} over seeds ± half the 95% t-interval.", rows)
    kind = "segment" if metric in OF_MASKS else "class"
    return Table(f"{nice(metric)} by {kind}", columns, rows, groups, note)


def _by_protocol(records: Records, task: str, metrics: Sequence[str]) -> list[list[Cell]]:
    """Rows of some metrics, each on every split: protocol by protocol all strategies, then the baselines."""
    pairs = [(metric, split) for metric in metrics for split in records.splits(task)]
    names, rows = records.strategies, []
    for protocol in records.protocols(task):
        values = {
            (metric, split): {n: records.values(n, task, split, protocol, metric) for n in names}
            for metric, split in pairs
        }
        marked = {pair: marks.over_seeds(values[pair], lower_is_better(pair[0])) for pair in pairs}
        for name in names:
            cells = [mark(compact(mean_interval(values[pair][name])), name, marked[pair]) for pair in pairs]
            if any(cell.text != NONE for cell in cells):
                rows.append([Cell(protocol), Cell(name), *cells])
    for protocol in records.baselines(task):
        means = [mean_interval(records.values(BASELINE, task, split, protocol, metric)) for metric, split in pairs]
        if any(means):
            rows.append([Cell(protocol), Cell(BASELINE), *map(compact, means)])
    return rows


def totals(records: Records) -> Table:
    """The study's bill by stage: what was really run, and what was taken from a cache."""
    rows = []
    stages = [*(stage for stage in STAGES if any(row.stage == stage for row in records.rows)), "all"]
    for stage in stages:
        of = [row for row in records.rows if stage in (row.stage, "all")]
        kinds = [sum(getattr(row, f"{kind}_s") for row in of) for kind in KINDS]
        wall = sum(row.wall_s for row in of)
        flops = sum(row.model_flops for row in of) / 1e12
        extra = sum(row.hardware_flops - row.model_flops for row in of) / 1e12
        quantities = [*kinds, max(0.0, wall - sum(kinds)), wall, sum(row.reused_s for row in of)]
        quantities += [flops, max(0.0, extra), sum(row.reused_flops for row in of) / 1e12]
        quantities.append(sum(row.energy_kwh for row in of))
        used = [Cell(percent(utilised(of, kind))) for kind in ("model_flops", "hardware_flops")]
        rows.append([Cell(stage), *(Cell(number(quantity)) for quantity in quantities), *used])
    columns = ["stage", *KINDS, "other", "wall", "reused", "model", "recomputed", "reused", "kWh", "MFU", "HFU"]
    groups = [("", 1), ("seconds", len(KINDS) + 3), ("TFLOP", 3), ("", 1), ("of peak", 2)]
    note = (
        "Sums over all arms of what was run; reused is what arms took from activations another arm had computed. "
        "MFU and HFU: model and hardware FLOPs per second of training and cache filling, over what the devices can do at most."
    )
    if not any(row.peak_flops for row in records.rows):
        note += " The devices' peak is not known here."
    return Table("The whole study's bill", columns, rows, groups, note)


def utilised(rows: Sequence[Row], kind: str) -> float | None:
    """Model or hardware FLOPs utilisation over the rows whose devices' peak is known; None where none is."""
    known = [row for row in rows if row.peak_flops]
    most = sum((row.train_s + row.cache_s) * row.peak_flops for row in known)
    return utilisation(sum(getattr(row, kind) for row in known), most, 1.0)


def percent(share: float | None) -> str:
    """Formats a share."""
    return NONE if share is None else f"{number(100 * share, 2)}%"


def compact(interval: Interval | None) -> Cell:
    """Formats a score as mean ± half-width."""
    if interval is None:
        return Cell(NONE)
    return Cell(f"{interval.mean:.3f}", "" if interval.half is None else f"±{interval.half:.3f}")


def _mean(interval: Interval | None) -> float | None:
    return None if interval is None else interval.mean


def _marks_note(note: str, rows: Sequence[Sequence[Cell]]) -> str:
    """The note with what the marks mean, where there are any."""
    if any(cell.held for row in rows for cell in row):
        return f"{note} {marks.NOTE}".strip()
    is_marked = any(cell.best for row in rows for cell in row)
    return f"{note} Bold: the best mean.".strip() if is_marked else note


def _main_note(records: Records, task: str, splits: Sequence[str]) -> str:
    """Says what a reader must know of this table's gaps."""
    metric, protocol = records.metric(task), records.protocol(task)
    counts = [_count(records.values(n, task, s, protocol, metric)) for n in records.strategies for s in splits]
    notes = []
    if max(counts, default=0) == 1:
        notes.append("One seed: no interval and no test.")
    elif len(set(counts)) > 1:
        notes.append(f"Values per cell: {min(counts)} to {max(counts)} seeds.")
    if "external" not in splits:
        notes.append("No external set: no dip.")
    if not records.rows:
        notes.append("The ledger is empty: no costs.")
    return " ".join(notes)


def _count(values: Iterable[float | None]) -> int:
    return sum(value is not None for value in values)
