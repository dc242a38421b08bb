"""`mode=compare`: one report over several workdirs, from their records alone; without JAX."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from matplotlib.figure import Figure

from dapt_jax.errors import UserError, nearest
from dapt_jax.formatting import NONE
from dapt_jax.metrics import lookup, lower_is_better
from dapt_jax.records.study_records import Cost, Records
from dapt_jax.records.vocabulary import BASELINE, OFFICIAL, SPLITS
from dapt_jax.report import page
from dapt_jax.report.claims import claims
from dapt_jax.report.columns import Cell, Column, Table, compact
from dapt_jax.report.marks import UNMARKED, note_of_marks, over_seeds
from dapt_jax.report.style import COLOURS, FAINT, GREY
from dapt_jax.runtime import home
from dapt_jax.statistics import Aggregation, mean_interval

WORKDIRS_ACROSS = 8
"""Workdirs that the table of settings shows as columns; of more each is a row."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A workdir of the comparison.

    Attributes:
        workdir: Folder of the study.
        records: Its records.
        name: Name that the user gives it; empty for none.
    """

    workdir: str
    records: Records
    name: str = ""

    @classmethod
    def read(cls, entry: str) -> Part:
        """Read `WORKDIR` or `NAME=WORKDIR`.

        Raises:
            UserError: The folder holds no study, or no results.
        """
        name, equals, folder = entry.partition("=")
        if not equals or home.expanded(entry).is_dir():
            name, folder = "", entry
        path = home.expanded(folder)
        if not (path / "config.json").exists():
            raise UserError(
                f"compare: {folder} holds no study (no config.json); expected a workdir that has run"
            )
        records = Records.read(path)
        if not records.results:
            why = "has no results yet; expected a workdir that has run"
            if not records.config.get("tasks"):
                why = "is a study without a target task; expected a workdir that has run on one"
            raise UserError(f"compare: {folder} {why}")
        return cls(folder, records, name.strip())

    @property
    def version(self) -> str:
        """Version of the computation that its results depend on; 1 where none is recorded."""
        return str(self.records.config.get("contents", {}).get("code", {}).get("version", "1"))

    def contents(self, task: str) -> dict[str, Any]:
        """Return the digests of the sets of a task by split, and by part where the version records parts."""
        config = self.records.config
        found = {
            split: config.get("images", {}).get(f"{task}/{split}") for split in self.records.splits(task)
        }
        prefix = f"tasks.{task}."
        recorded = config.get("contents", {}).items()
        return found | {key.removeprefix(prefix): of for key, of in recorded if key.startswith(prefix)}

    def splitting(self, task: str, protocol: str | None) -> dict[str, Any]:
        """Return the settings that say which images of a task are scored.

        They are the number of folds, the seed of the splits and, of a protocol that trains an encoder or a decoder,
        the number of folds that are run.
        """
        config = self.records.config
        own = config.get("tasks", {}).get(task, {}).get("transfer", {})
        found = _flat(config.get("transfer", {})) | _flat(own)
        names = ["folds", "split_seed"]
        has_folds = "development" in self.records.splits(task)  # official lists have one
        if has_folds and lookup(self.records.metric(task)).of_masks:
            names.append("segmentation.folds")
        elif has_folds and Aggregation.split(protocol or "")[0] == "finetune":
            names.append("finetune.folds")
        return {name: found.get(name, -1) for name in names}


class CombinedRecords(Records):
    """The records of several workdirs as those of one study, arms renamed so that they differ."""

    def __init__(self, parts: Sequence[Part], report: Mapping[str, Any] | None = None) -> None:
        """Join records that `check` allows.

        Args:
            parts: The workdirs, the first of which sets metric, protocol and margin.
            report: Settings of the section `report` that are to count instead of the first workdir's.

        Raises:
            UserError: No workdir has the given metric or protocol.
        """
        self.parts = parts
        self._label = _labels(parts)
        first = parts[0].records
        results = [
            {**row, "strategy": self._label(number, row) if row["strategy"] != BASELINE else BASELINE}
            for number, part in enumerate(parts)
            for row in part.records.results
        ]
        labels = [row["strategy"] for row in results if row["strategy"] != BASELINE]
        for name in ("metric", "protocol"):
            known = list(dict.fromkeys(row[name] for row in results if row["strategy"] != BASELINE))
            if (asked := (report or {}).get(name)) and asked not in known:
                raise UserError(f"report.{name} is {asked!r}, which no workdir has; {nearest(asked, known)}")
        config = {
            "report": {**first.config.get("report", {}), **(report or {})},
            **({"energy": first.config["energy"]} if "energy" in first.config else {}),
            "title": f"Comparison of {len(parts)} workdirs",
            "note": "; ".join(dict.fromkeys(part.workdir for part in parts)),
            "synthetic": any(part.records.config.get("synthetic") is True for part in parts),
            "strategies": list(dict.fromkeys(labels)),
        }
        leaks: dict[str, dict[str, str]] = {}
        few_samples: dict[str, list[str]] = {}
        for part in parts:
            for task, by_split in part.records.leaks.items():
                leaks.setdefault(task, {}).update(by_split)
            for task, lines in part.records.few_samples.items():
                known = few_samples.setdefault(task, [])
                known += [line for line in lines if line not in known]
        rows = [
            dataclasses.replace(row, strategy=label)
            for number, part in enumerate(parts)
            for row in part.records.rows
            if (label := self._of_ledger(number, row.strategy))
        ]
        super().__init__(config, results, rows, leaks, few_samples)

    @functools.cached_property
    def seeds(self) -> list[Any]:
        """Seeds of any of the workdirs, without those of adaptations that all seeds of one share."""
        return list(dict.fromkeys(seed for part in self.parts for seed in part.records.seeds))

    @property
    def adapted_once(self) -> list[str]:
        """Arms of workdirs whose seeds share one adaptation."""
        labels = [
            self._of_ledger(number, name)
            for number, part in enumerate(self.parts)
            for name in part.records.adapted_once
        ]
        return list(dict.fromkeys(filter(None, labels)))

    def _of_ledger(self, number: int, strategy: str) -> str:
        """Return the label of a strategy of a workdir; empty for one without results."""
        rows = (row for row in self.parts[number].records.results if row["strategy"] == strategy)
        return next((self._label(number, row) for row in rows), "")

    def costs(self, strategy: str, task: str | None = None) -> dict[Any, Cost]:
        """Return the standalone cost of each seed, as its own workdir counts it: see `Records.costs`.

        Without a task, that of all workdirs which are one row of the tables, each of a task of its own.
        """
        found: dict[Any, Cost] = {}
        for number, part in enumerate(self.parts):
            for name in dict.fromkeys(row["strategy"] for row in part.records.results):
                if self._of_ledger(number, name) == strategy and (task is None or task in part.records.tasks):
                    for seed, cost in part.records.costs(name, task).items():
                        found[seed] = found[seed] + cost if seed in found else cost
        return found

    def missing(self) -> list[str]:
        """Return the arms that their own workdirs plan and have no results of."""
        return [f"{part.workdir}: {line}" for part in self.parts for line in part.records.missing()]


def _labels(parts: Sequence[Part]) -> Callable[[int, Mapping[str, Any]], str]:
    """Return the function from the number of a workdir and a result to the label of its arm.

    It is the given name; else the strategy, the initialisation, both, or the folder with the strategy: the
    first under which no task has two arms of one label.
    """
    names = [part.name for part in parts]
    is_alone = [len({r["strategy"] for r in p.records.results} - {BASELINE}) == 1 for p in parts]

    def given(number: int, row: Mapping[str, Any]) -> str:
        return names[number] if is_alone[number] else f"{names[number]} {row['strategy']}"

    def or_given(scheme: Callable[[int, Mapping[str, Any]], str]) -> Callable[[int, Mapping[str, Any]], str]:
        return lambda number, row: given(number, row) if names[number] else scheme(number, row)

    schemes = [
        or_given(lambda number, row: row["strategy"]),
        or_given(lambda number, row: str(row.get("init") or row["strategy"])),
        or_given(lambda number, row: f"{row.get('init')} {row['strategy']}"),
        or_given(lambda number, row: f"{Path(parts[number].workdir).name} {row['strategy']}"),
        or_given(lambda number, row: f"{parts[number].workdir} {row['strategy']}"),
    ]
    for scheme in schemes:
        arms = {
            (row["task"], scheme(number, row), number, row["strategy"])
            for number, part in enumerate(parts)
            for row in part.records.results
            if row["strategy"] != BASELINE
        }
        if max(Counter((task, label) for task, label, *_ in arms).values(), default=0) <= 1:
            return scheme
    twice = next(name for name, count in Counter(names).items() if name and count > 1)
    raise UserError(f"compare: two workdirs of one task are named {twice!r}; expected a name each")


def check(parts: Sequence[Part]) -> list[str]:
    """Refuse workdirs whose studies cannot be compared, and return warnings about the others.

    Raises:
        UserError: Fewer than two workdirs, one that shares no task with the others, or a task with other
            sets or folds in two of them.
    """
    if len(parts) < 2:
        raise UserError(f"compare names {len(parts)} workdirs; expected two or more: --config.compare=A,B")
    folders = [home.expanded(part.workdir).resolve() for part in parts]
    for number, part in enumerate(parts):
        if folders[number] in folders[:number]:
            raise UserError(f"compare: {part.workdir} is there twice; expected each once")
    for part in parts:
        others = [task for other in parts if other is not part for task in other.records.tasks]
        if not set(part.records.tasks) & set(others):
            raise UserError(
                f"compare: {part.workdir} has the task {', '.join(part.records.tasks)}, and the others have "
                f"{', '.join(dict.fromkeys(others))}; expected a task in common"
            )
    lines = []
    for task in dict.fromkeys(task for part in parts for task in part.records.tasks):
        first, *rest = [part for part in parts if task in part.records.tasks]
        for other in rest:
            _check_pair(task, first, other)
            if first.version != other.version:
                lines.append(
                    f"{task}: {first.workdir} has results of version {first.version} of the computation, and "
                    f"{other.workdir} of version {other.version}: their numbers may differ for that alone."
                )
            shared = set(first.records.seeds) & set(other.records.seeds)
            if not shared:
                lines.append(
                    f"{task}: {first.workdir} and {other.workdir} share no seed, so there is no paired test."
                )
    return lines


def _check_pair(task: str, first: Part, other: Part) -> None:
    both = f"compare: {first.workdir} and {other.workdir}"
    protocol = first.records.protocol(task)
    here, there = first.splitting(task, protocol), other.splitting(task, protocol)
    for name in here:
        if here[name] != there[name]:
            raise UserError(
                f"{both} divide task {task!r} by transfer.{name} of {here[name]} and {there[name]}; expected "
                "the same splits"
            )
    ours, theirs = first.contents(task), other.contents(task)
    if sorted(ours) != sorted(theirs):
        raise UserError(
            f"{both} have other splits of task {task!r}: {', '.join(ours)}, and {', '.join(theirs)}; expected "
            "the same"
        )
    for split, mine in ours.items():
        if mine == theirs[split] or mine is None or theirs[split] is None:
            continue
        parts = ""
        if isinstance(mine, Mapping) and isinstance(theirs[split], Mapping):
            shared = mine.keys() & theirs[split].keys()
            differing = sorted(part for part in shared if mine[part] != theirs[split][part])
            if not differing:
                continue
            parts = f" ({', '.join(differing)})"
        raise UserError(f"{both} have other images or labels of {task} {split}{parts}; expected the same set")


def build(entries: Sequence[str], folder: Path, report: Mapping[str, Any] | None = None) -> CombinedRecords:
    """Write one report over several workdirs: report.md, report.html and figures.

    Args:
        entries: Workdirs, each `WORKDIR` or `NAME=WORKDIR`; several of one name are one row of the tables
            over tasks.
        folder: Folder of the report.
        report: See `CombinedRecords`.

    Raises:
        UserError: The studies cannot be compared; the line says why.
    """
    parts = [Part.read(entry) for entry in entries]
    warnings = check(parts)
    records = CombinedRecords(parts, report)
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds a study; expected another --workdir for the report of a comparison")
    folder.mkdir(parents=True, exist_ok=True)
    extra = page.Overview([*_tables(records), _differing(parts)], _figure(records), warnings)
    page.build_of(records, folder, extra)
    return records


def _columns(records: Records) -> Iterator[tuple[str, str]]:
    for task in records.tasks:
        for split in records.splits(task):
            yield task, split


def _tables(records: Records) -> list[Table]:
    """Return arms by task, with the best and those not significantly worse, and the claims of equivalence."""
    marks, values = {}, {}
    for task, split in _columns(records):
        found = {
            name: records.values(name, task, split, records.protocol(task), records.metric(task))
            for name in records.strategies
        }
        values[task, split] = found
        is_unlike = bool(records.unlike(task, split))
        marks[task, split] = (
            UNMARKED if is_unlike else over_seeds(found, lower_is_better(records.metric(task)))
        )

    def score(task: str, split: str) -> Callable[[str], Cell]:
        return lambda name: marks[task, split].mark(compact(mean_interval(values[task, split][name])), name)

    columns = [Column[str]("arm", lambda name: name)]
    for task, split in _columns(records):
        columns.append(
            Column(split, score(task, split), f"{task}, {records.display_name(task, records.metric(task))}")
        )
    table = Table.of(
        "Arms by task", columns, records.strategies, "Mean over seeds ± half the 95% t-interval."
    )
    tables = [dataclasses.replace(table, note=note_of_marks(table.note, table.rows))]
    tested = {(task, split): claims(records, task, split) for task, split in _columns(records)}
    if any(each.non_inferiority is not None for of in tested.values() for each in of.values()):

        def verdict(task: str, split: str) -> Callable[[str], str]:
            return lambda name: tested[task, split][name].verdict if name in tested[task, split] else NONE

        claimed = [Column[str]("arm", lambda name: name)]
        claimed += [Column(split, verdict(task, split), task) for task, split in _columns(records)]
        note = (
            f"Against {records.reference}, margin {records.margin:g}; p adjusted by Holm's method over the arms "
            "of a column. The tables of each task have differences and p."
        )
        tables.append(Table.of(f"Equivalence to {records.reference}", claimed, records.strategies, note))
    return tables


def _differing(parts: Sequence[Part]) -> Table:
    """Return the settings that differ between the workdirs, without budgets that follow the machine.

    A strategy's own settings are compared among the workdirs that define it.
    """
    hidden = (
        "name",
        "title",
        "note",
        "mode",
        "images",
        "contents",
        "compare",
        "runtime",
        "monitoring",
        "cache.dir",
        "cache.memory_mb",
        "cache.disk_mb",
        "data.cache_mb",
    )
    flat = [_flat(part.records.config) for part in parts]
    names = [
        name
        for name in dict.fromkeys(name for each in flat for name in each)
        if not {name, name.partition(".")[0]} & set(hidden)
        and not _is_of_images(name)
        and len(_values(name, flat)) > 1
    ]

    titles = [part.name or Path(part.workdir).name for part in parts]
    rows = [[name, *_shown([each.get(name, NONE) for each in flat])] for name in names]
    header = [("setting", ""), *((title, "workdir") for title in titles)]
    if len(parts) > WORKDIRS_ACROSS and names:
        rows = [[title, *(row[number + 1] for row in rows)] for number, title in enumerate(titles)]
        header = [("workdir", ""), *((name, "setting") for name in names)]

    def cell(place: int) -> Callable[[list[str]], str]:
        return lambda row: row[place]

    columns = [Column(title, cell(place), group) for place, (title, group) in enumerate(header)]
    return Table.of("Settings that differ", columns, rows, "" if names else "None.")


def _values(name: str, flat: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the values of a setting in the workdirs, as text; of a task in those that have the task."""
    is_of_strategy = name.startswith("custom_strategies.")
    task = ".".join([*name.split(".")[:2], ""]) if name.startswith("tasks.") else ""
    return {
        str(each.get(name, NONE))
        for each in flat
        if (name in each or not is_of_strategy) and any(other.startswith(task) for other in each)
    }


def _is_of_images(name: str) -> bool:
    """Return whether a setting says where a task's images come from, whose contents `check` compares."""
    section, *names = name.split(".")
    return section == "tasks" and bool({*names[1:2]} & {*SPLITS, *OFFICIAL})


MOST_SHOWN = 60
"""Characters of a setting's value in the table."""


def _shown(values: Sequence[object]) -> list[str]:
    """Return the values of a setting for the table; of phases their names, and what differs between them.

    >>> _shown([[{"name": "all", "lr": 0.1, "epochs": 2}], [{"name": "all", "lr": 0.2, "epochs": 2}], NONE])
    ['all: lr 0.1', 'all: lr 0.2', '–']
    """
    lists = [value for value in values if isinstance(value, list)]
    phases = [{item["name"]: item for item in value if _is_phase(item)} for value in lists]

    def text(item: object) -> str:
        if not _is_phase(item):
            return str(item)
        name = item["name"]
        others = [each[name] for each in phases if name in each]
        keys = [key for key in item if len({str(each.get(key)) for each in others}) > 1]
        return f"{name}: {', '.join(f'{key} {item[key]}' for key in keys)}" if keys else str(name)

    found: list[str] = []
    for value in values:
        each = list(map(text, value)) if isinstance(value, list) else [str(value)]
        found.append(("; " if any(": " in part for part in each) else ", ").join(each) or NONE)
    return [each if len(each) <= MOST_SHOWN else f"{each[: MOST_SHOWN - 1]}…" for each in found]


def _is_phase(item: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(item, Mapping) and "name" in item


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _figure(records: Records) -> Figure:
    """Draw the scores of every arm on every task and split: one panel each, the reference's margin shaded."""
    panels = list(_columns(records))
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    names = records.strategies
    height = (0.27 * len(names) + 1.0) * lines
    figure = Figure(figsize=(2.9 * columns + 1.2, height), layout="constrained")
    grid = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for axes, (task, split) in zip(grid, panels, strict=False):
        metric, protocol = records.metric(task), records.protocol(task)
        for place, name in enumerate(names):
            values = records.values(name, task, split, protocol, metric)
            found = mean_interval(values)
            if found is None:
                continue
            y, colour = len(names) - 1 - place, COLOURS[place % len(COLOURS)]
            if name == records.reference and records.margin:
                axes.axvspan(found.mean - records.margin, found.mean + records.margin, color=FAINT, zorder=0)
            axes.plot(
                [v for v in values if v is not None],
                [y] * found.n,
                "o",
                color=colour,
                alpha=0.35,
                markersize=3,
            )
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [y, y], color=GREY, linewidth=1.2)
            axes.plot(found.mean, y, "o", color=colour, markersize=6, markeredgecolor="white")
        axes.set_title(f"{task}, {split}", fontsize=9)
        axes.set_xlabel(records.display_name(task, metric), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.locator_params(axis="x", nbins=4)
    grid[0].set_yticks(range(len(names)), names[::-1])
    grid[0].set_ylim(-0.6, len(names) - 0.4)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure
