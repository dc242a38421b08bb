"""Records of a study: its results and ledger, read once and queried by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dapt_jax.errors import UserError, nearest
from dapt_jax.metrics import METRICS, display_name, lookup
from dapt_jax.records import typed
from dapt_jax.records.ledger import Ledger, Row
from dapt_jax.records.renamed import upgrade
from dapt_jax.records.vocabulary import BASELINE, CHECKPOINT_MARK, KINDS, MARGIN, SALIENCY, SPLITS, STAGES
from dapt_jax.runtime import atomic_files
from dapt_jax.statistics import Aggregation, Interval, mean_interval

_RESULT = {
    "strategy": typed.TEXT,
    "seed": typed.COUNT,
    "task": typed.TEXT,
    "split": typed.TEXT,
    "protocol": typed.TEXT,
    "metric": typed.TEXT,
    "value": typed.NUMBER.or_null,
    "n": typed.COUNT.or_null,
    "classes": typed.either(typed.list_of(typed.TEXT), typed.COUNT).or_null,
    "init": typed.TEXT.or_null,
    "model": typed.TEXT.or_null,
    "unit": typed.TEXT.or_null,
}
LEAKS = "leaks.json"
"""In a workdir whose study was allowed leaks: by task and split, what of it was seen elsewhere."""

FEW_SAMPLES = "few_samples.json"
"""In a workdir: by task, lines on what rests on few patients or folds."""

_KEY = ("strategy", "seed", "task", "split", "protocol", "metric")
_CONFIG = {
    "title": typed.TEXT,
    "note": typed.TEXT,
    "synthetic": typed.TRUTH,
    "data_note": typed.TEXT,
    "model": typed.either(typed.OBJECT, typed.TEXT),
    "adapt": typed.OBJECT,
    "tasks": typed.OBJECT,
    "strategies": typed.list_of(typed.TEXT),
    "seeds": typed.list_of(typed.COUNT),
    "compute_budget": typed.NUMBER,
    "report": typed.OBJECT,
    "energy": typed.OBJECT,
    "transfer": typed.OBJECT,
    "images": typed.OBJECT,
    "contents": typed.OBJECT,
    "custom_strategies": typed.OBJECT,
}
_SECTIONS = {
    "model": {"name": typed.TEXT},
    "report": {"metric": typed.TEXT, "protocol": typed.TEXT, "margin": typed.AMOUNT},
    "energy": {"region": typed.TEXT},
    "adapt": {"seed": typed.WHOLE},
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Standalone cost of one arm: its own work, plus the work reused from other arms' caches.

    Attributes:
        flops: Model FLOPs by stage (`STAGES`).
        seconds: Seconds by kind (`KINDS`, and "other").
        reused_s: Seconds that another arm had already spent.
        kwh: Energy, the reused part charged in proportion to its seconds.
        trainable: Number of parameters that the last adaptation phase trains; 0 for an arm that is not
            adapted.
    """

    flops: dict[str, int]
    seconds: dict[str, float]
    reused_s: float
    kwh: float
    trainable: int

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of two arms together, such as those of one name on two tasks."""
        return Cost(
            {stage: self.flops[stage] + other.flops[stage] for stage in self.flops},
            {kind: self.seconds[kind] + other.seconds[kind] for kind in self.seconds},
            self.reused_s + other.reused_s,
            self.kwh + other.kwh,
            max(self.trainable, other.trainable),
        )

    @property
    def total_flops(self) -> int:
        """Model FLOPs of all stages."""
        return sum(self.flops.values())

    @property
    def wall_s(self) -> float:
        """Seconds of all kinds, including reused ones."""
        return sum(self.seconds.values()) + self.reused_s

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Cost:
        """Add up the rows of one arm."""
        flops = dict.fromkeys(STAGES, 0)
        seconds = dict.fromkeys((*KINDS, "other"), 0.0)
        reused_s = kwh = 0.0
        trainable = 0
        for row in rows:
            flops[row.stage] += row.model_flops + row.reused_flops
            spent = {kind: float(getattr(row, f"{kind}_s")) for kind in KINDS}
            for kind, value in spent.items():
                seconds[kind] += value
            seconds["other"] += max(0.0, row.wall_s - sum(spent.values()))
            reused_s += row.reused_s
            ran = max(row.wall_s, sum(spent.values()))
            kwh += row.energy_kwh * (1 + row.reused_s / ran if ran > 0 else 1)
            if row.stage == "dapt":
                trainable = row.trainable_params
        return cls(flops, seconds, reused_s, kwh, trainable)


class Records:
    """The records of one study.

    Attributes:
        config: The settings in config.json.
        results: The lines of results.jsonl.
        rows: The rows of ledger.jsonl.
        leaks: The content of leaks.json: by task and split, the images or patients that occur in another set.
        few_samples: The content of few_samples.json: by task, lines on what rests on few patients or folds.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        results: list[dict[str, Any]],
        rows: list[Row],
        leaks: Mapping[str, Mapping[str, str]] | None = None,
        few_samples: Mapping[str, list[str]] | None = None,
    ) -> None:
        self.config = config
        self.leaks = leaks or {}
        self.few_samples = few_samples or {}
        self.results = results
        self.rows = rows
        self._found: dict[tuple[Any, ...], list[str]] = {}
        self._values: dict[tuple[Any, ...], float | None] = {}
        for row in results:
            self._values[tuple(row[key] for key in _KEY)] = row["value"]

    @classmethod
    def read(cls, workdir: Path) -> Records:
        """Read a study's folder.

        Results and ledger may be missing, for a study that has not started.

        Raises:
            UserError: There is no config.json, a file is damaged, or a value has the wrong type; names file
                and line.
        """
        path = Path(workdir) / "config.json"
        if not path.exists():
            raise UserError(f"{path}: no such file; a report needs the folder of a study")
        config = _upgraded(path)
        typed.check(str(path), config, _CONFIG)
        for section, kinds in _SECTIONS.items():
            if isinstance(values := config.get(section), Mapping):
                typed.check(f"{path}: {section}", values, kinds)
        for section in ("tasks", "contents"):
            values = config.get(section, {})
            typed.check(f"{path}: {section}", values, dict.fromkeys(values, typed.OBJECT))
        results = atomic_files.read(Path(workdir) / "results.jsonl")
        for number, row in enumerate(results, start=1):
            where = f"{workdir}/results.jsonl:{number}"
            typed.check(where, row, _RESULT, required=(*_KEY, "value"))
            if row["metric"].partition("/")[0] not in METRICS:
                raise UserError(
                    f"{where}: unknown metric {row['metric']!r}; {nearest(row['metric'], METRICS)}"
                )
        return cls(
            config,
            results,
            Ledger(Path(workdir) / "ledger.jsonl").rows(),
            _leaks(Path(workdir) / LEAKS),
            _few_samples(Path(workdir) / FEW_SAMPLES),
        )

    @property
    def model(self) -> str:
        """Name of the encoder; empty where the configuration names none."""
        model = self.config.get("model")
        return str((model.get("name") or model.get("kind") if isinstance(model, Mapping) else model) or "")

    @property
    def planned(self) -> list[str]:
        """Strategies that the configuration names."""
        return list(self.config.get("strategies", ()))

    @functools.cached_property
    def strategies(self) -> list[str]:
        """Strategies in the order of the configuration, then others with records, without the baseline."""
        found = [*(row["strategy"] for row in self.results), *(row.strategy for row in self.rows)]
        return [name for name in dict.fromkeys([*self.planned, *found]) if name != BASELINE]

    @functools.cached_property
    def seeds(self) -> list[Any]:
        """Seeds that the configuration or the records name."""
        found = [row["seed"] for row in self.results if row["strategy"] != BASELINE]
        rows = [row.seed for row in self.rows if self.shared_seed is None or row.stage == "transfer"]
        return list(dict.fromkeys([*self.config.get("seeds", ()), *found, *rows]))

    @property
    def shared_seed(self) -> int | None:
        """Seed of the one adaptation that all seeds share; None where each seed adapts anew."""
        seed = self.config.get("adapt", {}).get("seed", -1)
        return seed if seed >= 0 else None

    @property
    def adapted_once(self) -> list[str]:
        """Strategies whose seeds share one adaptation, so that these say nothing of other adaptations."""
        return [] if self.shared_seed is None else self.strategies

    @functools.cached_property
    def tasks(self) -> list[str]:
        """Target tasks that have results."""
        return self._named("task")

    @property
    def reference(self) -> str | None:
        """The reference strategy: "full", else the first; of strategies that compete for compute, one with scores."""
        strategies = self.strategies
        if self.config.get("compute_budget") and self.results:
            have = {row["strategy"] for row in self.results}
            strategies = [name for name in strategies if name in have] or strategies
        return "full" if "full" in strategies else next(iter(strategies), None)

    @property
    def margin(self) -> float:
        """Non-inferiority margin in the primary metric; 0 for no such test."""
        return float(self._report().get("margin", MARGIN))

    def metric(self, task: str) -> str:
        """Return the primary metric: the configuration's, else AUC, else the first that a task has."""
        found = self._named("metric", task=task)
        wanted = self._report().get("metric", "auc")
        return wanted if wanted in found or not found else found[0]

    def protocol(self, task: str) -> str | None:
        """Return the primary protocol: the configuration's, else the first that a task has.

        Where a task aggregates images to patients or other units, it is that of the units.
        """
        found = self.protocols(task)
        wanted = self._report().get("protocol")
        chosen = wanted if wanted in found else next(iter(found), None)
        return next(
            (name for name in found if Aggregation.split(name)[1] and Aggregation.split(name)[0] == chosen),
            chosen,
        )

    def protocols(self, task: str) -> list[str]:
        """Return the protocols of a task, without those of the baseline."""
        of_task = (row for row in self.results if row["task"] == task and row["strategy"] != BASELINE)
        return list(dict.fromkeys(row["protocol"] for row in of_task))

    def baselines(self, task: str) -> list[str]:
        """Return the protocols of the one-feature baselines that the primary protocol is compared with.

        They are of images, or of the units that these form, as the primary protocol is.
        """
        level = Aggregation.split(self.protocol(task) or "")[1]
        found = self.every_baseline(task)
        return [name for name in found if Aggregation.split(name)[1] == level] or found

    def every_baseline(self, task: str) -> list[str]:
        """Return the protocols of the one-feature baselines of a task, of images and of units."""
        return self._named("protocol", task=task, strategy=BASELINE)

    def splits(self, task: str) -> list[str]:
        """Return the splits of a task, development first."""
        found = self._named("split", task=task)
        return [split for split in dict.fromkeys([*SPLITS, *found]) if split in found]

    def in_domain(self, task: str) -> str:
        """Return the split that external data are compared with: development, else test, else val."""
        found = self.splits(task)
        return next((split for split in ("development", "test", "val") if split in found), "development")

    def deciding_split(self, task: str) -> str:
        """Return the split by which strategies are compared: external, or in-domain without one."""
        return "external" if "external" in self.splits(task) else self.in_domain(task)

    def metrics(self, task: str) -> list[str]:
        """Return the metrics of a task, without those of single classes (`auc/<class>`)."""
        return [name for name in self._named("metric", task=task) if "/" not in name]

    def classes(self, task: str, metric: str = "auc") -> list[str]:
        """Return the classes with an individual score in a metric."""
        return [n.partition("/")[2] for n in self._named("metric", task=task) if n.startswith(f"{metric}/")]

    def metric_by_class(self, task: str) -> str | None:
        """Return the primary metric if it has scores by class, else the first such metric, or None."""
        found = [name.partition("/")[0] for name in self._named("metric", task=task) if "/" in name]
        primary = self.metric(task).partition("/")[0]
        return primary if primary in found else next(iter(found), None)

    def display_name(self, task: str, metric: str) -> str:
        """Return the display name of a metric, with the unit that the results of a task name, such as "mm"."""
        rows = (row for row in self.results if (row["task"], row["metric"]) == (task, metric))
        units = list(dict.fromkeys(row["unit"] for row in rows if row.get("unit")))
        return display_name(metric) + (f" ({' or '.join(units)})" if units else "")

    def values(
        self, strategy: str, task: str, split: str, protocol: str | None, metric: str
    ) -> list[float | None]:
        """Return one value per seed, in the order of `seeds`; None where a seed has none."""
        return [self._values.get((strategy, seed, task, split, protocol, metric)) for seed in self.seeds]

    def unlike(self, task: str, split: str, metric: str | None = None, protocol: str | None = None) -> str:
        """Return why the scores of strategies cannot be compared; empty where they can.

        Distances between surfaces are means over the images where truth and prediction both have one, so that a
        strategy that draws nothing in hard images is not charged for them.

        Args:
            task: The task.
            split: The split.
            metric: The metric; None for the primary one.
            protocol: The protocol; None for the primary one.
        """
        metric, protocol = metric or self.metric(task), protocol or self.protocol(task)
        if not lookup(metric).is_distance:
            return ""
        counts: dict[Any, dict[str, Any]] = {}
        for row in self.results:
            key = (row["task"], row["split"], row["protocol"], row["metric"])
            if key == (task, split, protocol, metric) and row["strategy"] in self.strategies:
                counts.setdefault(row["seed"], {})[row["strategy"]] = row.get("n")
        for seed, of_seed in counts.items():
            if len(set(of_seed.values())) > 1:
                listed = ", ".join(f"{name} {count}" for name, count in of_seed.items())
                return (
                    f"{self.display_name(task, metric)} is a mean over the images in which truth and prediction both "
                    f"have a surface, and these are not as many for every strategy (seed {seed}: {listed}); compare Dice"
                )
        return ""

    def generalization_gaps(
        self, strategy: str, task: str, protocol: str | None, metric: str
    ) -> list[float | None]:
        """Return the score of `in_domain` minus that of external per seed."""
        splits = (self.in_domain(task), "external")
        both = (self.values(strategy, task, split, protocol, metric) for split in splits)
        return [None if a is None or b is None else a - b for a, b in zip(*both, strict=True)]

    def costs(self, strategy: str, task: str | None = None) -> dict[Any, Cost]:
        """Return the standalone cost of each seed of a strategy that has results and ledger rows.

        The cost of an arm without results is incomplete, so it is left out. A transfer row
        belongs to the task whose name its phase begins with (`<task>/...`), or to every task. What explains
        results (`SALIENCY`) is not counted.
        """
        tasks = set(self.tasks)
        finished = {row["seed"] for row in self.results if row["strategy"] == strategy}
        arms: dict[Any, list[Row]] = {}
        for row in self.rows:
            owner, _, part = row.phase.partition("/")
            if part == SALIENCY:
                continue
            elsewhere = task is not None and row.stage == "transfer" and owner in tasks and owner != task
            is_shared = (
                self.shared_seed is not None and row.stage != "transfer" and CHECKPOINT_MARK not in strategy
            )
            for seed in finished if is_shared else {row.seed} & finished:
                if row.strategy == strategy and not elsewhere:
                    arms.setdefault(seed, []).append(row)
        return {seed: Cost.of(rows) for seed, rows in arms.items()}

    def mean_cost(self, strategy: str, task: str | None, read: Callable[[Cost], float]) -> Interval | None:
        """Return mean and interval over seeds of one quantity of the standalone cost."""
        return mean_interval([read(cost) for cost in self.costs(strategy, task).values()])

    @property
    def arms(self) -> list[tuple[str, Any]]:
        """Strategy and seed of every arm, without those that are checkpoints of one, of which seeds have others."""
        names = [name for name in self.strategies if CHECKPOINT_MARK not in name]
        return [(name, seed) for name in names for seed in self.seeds]

    def missing(self) -> list[str]:
        """Return the planned arms without results, as `strategy seed`.

        Arms that successive halving has eliminated are not included.
        """
        have = {(row["strategy"], row["seed"]) for row in self.results}
        if self.config.get("compute_budget"):
            adapted = {(row.strategy, row.seed) for row in self.rows if row.stage == "dapt"}
            decided = {seed for strategy, seed in have & adapted}
            have |= {(strategy, seed) for strategy, seed in adapted if seed in decided}
        return [f"{name} {seed}" for name, seed in self.arms if (name, seed) not in have]

    def _report(self) -> Mapping[str, Any]:
        return self.config.get("report", {})

    def _named(self, key: str, **only: str) -> list[str]:
        asked = (key, *only.items())
        if asked not in self._found:  # with thousands of classes, each search is long
            rows = (row for row in self.results if all(row[k] == value for k, value in only.items()))
            self._found[asked] = list(dict.fromkeys(str(row[key]) for row in rows))
        return self._found[asked]


def _upgraded(path: Path) -> dict[str, Any]:
    """Return the settings in a `config.json` by current names.

    Raises:
        UserError: The file is damaged: it has both the former and the current name of a setting, one of them
            as a section.
    """
    found = typed.read_object(path)
    try:
        return upgrade(found)
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"{path}: two settings that are one today do not go together; delete the older"
        ) from error


def _few_samples(path: Path) -> dict[str, list[str]]:
    """Return the recorded lines on few samples; empty where the file does not exist."""
    if not path.exists():
        return {}
    found = typed.read_object(path)
    typed.check(str(path), found, dict.fromkeys(found, typed.list_of(typed.TEXT)))
    return found


def _leaks(path: Path) -> dict[str, dict[str, str]]:
    """Return the recorded leaks; empty where the file does not exist."""
    if not path.exists():
        return {}
    found = typed.read_object(path)
    typed.check(str(path), found, dict.fromkeys(found, typed.OBJECT))
    for task, by_split in found.items():
        typed.check(f"{path}: {task}", by_split, dict.fromkeys(by_split, typed.TEXT))
    return found
