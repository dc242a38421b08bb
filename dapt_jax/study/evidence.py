"""What the records of earlier studies say of strategies: the evidence that `mode=advise` rests on.

`evidence.csv` beside this file summarises the records that are committed under docs/; `python -m benchmarks.evidence
--summary` writes it again.
"""

import csv
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from dapt_jax.errors import UserError
from dapt_jax.metrics import METRICS, lower_is_better
from dapt_jax.models import registry
from dapt_jax.models.encoder import Encoder
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import CHECKPOINT_MARK
from dapt_jax.runtime import home
from dapt_jax.settings import StrategySpec
from dapt_jax.statistics import Comparison, Estimate, Summary, random_effects
from dapt_jax.study.built_in_strategies import built_in_like

FILE = Path(__file__).with_name("evidence.csv")
OUTSIDE, INSIDE = "outside", "inside"
SAME_SHARE = 2.0
"""Factor of FLOPs, either way, within which a run of a strategy is evidence for another of other length."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A strategy in one study, against the same weights without adaptation.

    Attributes:
        study: Name of the study.
        task: Its task.
        data_set: What tells the task's development images from those of other studies.
        kind: "classes" or "masks".
        encoder: Architecture.
        init: Source weights.
        objective: What adaptation minimised.
        corpus: Images of the corpus.
        strategy: Built-in strategy that it is or resembles: see `resembled`.
        cut_after: Layer group after which it cuts the encoder; empty for the whole one.
        share: FLOPs of its adaptation as a share of those of full DAPT.
        where: `OUTSIDE` for the external set, `INSIDE` for images like those of training.
        metric: Primary metric.
        gain: Mean difference from `none` over seeds, positive where better.
        error: Standard error of it over seeds.
        seeds: Number of seeds.
    """

    study: str
    task: str
    data_set: str
    kind: str
    encoder: str
    init: str
    objective: str
    corpus: int
    strategy: str
    cut_after: str
    share: float
    where: str
    metric: str
    gain: float
    error: float
    seeds: int


def findings(records: Records, study: str) -> list[Finding]:
    """Return what a study found of each strategy that adapts, where it has `none`, `full` and two seeds.

    Args:
        records: Records of the study.
        study: Name of it.
    """
    found = []
    names = [name for name in records.strategies if CHECKPOINT_MARK not in name]
    if "none" not in names or "full" not in names:
        return []
    flops = {name: _adaptation_flops(records, name) for name in names}
    specs = {
        name: StrategySpec.from_config(values, f"{study}: custom_strategies.{name}")
        for name, values in records.config.get("custom_strategies", {}).items()
    }
    resemblances = {name: _resembled(records, name, specs.get(name)) for name in names}
    shared = {
        "objective": records.config.get("adapt", {}).get("objective", "supervised"),
        "encoder": records.model,
        "init": str(records.config.get("weights", "imagenet")),
    }
    for task in records.tasks:
        metric, protocol = records.metric(task), records.protocol(task)
        sign = -1 if lower_is_better(metric) else 1
        kind = "masks" if METRICS[metric.partition("/")[0]].of_masks else "classes"
        splits = {INSIDE: records.in_domain(task)}
        if "external" in records.splits(task):
            splits[OUTSIDE] = "external"
        for where, split in splits.items():
            against = records.values("none", task, split, protocol, metric)
            for name in names:
                spec, (strategy, cut_after) = specs.get(name), resemblances[name]
                is_apart = spec is not None and bool(spec.weights or spec.corpus)
                if not strategy or is_apart or not flops[name] or not flops["full"]:
                    continue
                own = records.values(name, task, split, protocol, metric)
                summary = Summary.of(
                    [
                        sign * (a - b) if a is not None and b is not None else None
                        for a, b in zip(own, against, strict=True)
                    ]
                )
                if summary is None or summary.n < 2 or not summary.sd:
                    continue
                found.append(
                    Finding(
                        study=study,
                        task=task,
                        data_set=_data_set(records, study, task),
                        kind=kind,
                        **{**shared, "objective": (spec.objective if spec else "") or shared["objective"]},
                        corpus=_corpus_images(records),
                        strategy=strategy,
                        cut_after=cut_after,
                        share=round(flops[name] / flops["full"], 4),
                        where=where,
                        metric=metric,
                        gain=round(summary.mean, 6),
                        error=round(summary.sd / math.sqrt(summary.n), 6),
                        seeds=summary.n,
                    )
                )
    return found


def resembled(name: str, spec: StrategySpec | None, encoder: Encoder, is_cut: bool) -> str:
    """Return the built-in strategy that a strategy is, copies or resembles by what it trains; empty for none.

    Args:
        name: Its name.
        spec: Its settings, if it is a custom one.
        encoder: The encoder that it adapts.
        is_cut: Whether that was cut first.
    """
    if spec is None:
        return name
    if spec.like:
        return spec.like
    if any(phase.corpus for phase in spec.phases):
        return ""
    return built_in_like([phase.trainable for phase in spec.phases], encoder, is_cut)


def _resembled(records: Records, name: str, spec: StrategySpec | None) -> tuple[str, str]:
    """Return the built-in strategy that a strategy of a study resembles, and the layer group after which it cuts."""
    cut = spec.cut_after if spec and spec.cut_after else ""
    if (name if spec is None else spec.like) == "simplified":
        cut = str(records.config.get("adapt", {}).get("cut_after", ""))
    try:
        encoder = registry.build(records.model)
        found = resembled(name, spec, encoder.truncate(cut) if cut else encoder, bool(cut))
    except (UserError, ValueError):
        return "", ""
    return found, cut


def _data_set(records: Records, study: str, task: str) -> str:
    """Return what tells the development images of a task from others: their labels and patients, or the study's name."""
    contents = records.config.get("contents", {}).get(f"tasks.{task}.development", {})
    told = [str(contents.get(name, "")) for name in ("labels", "patients")]
    return "-".join(each[:8] for each in told) if all(told) else f"{study}, {task}"


def _adaptation_flops(records: Records, name: str) -> int:
    costs = records.costs(name).values()
    return max((each.flops["dapt"] for each in costs), default=0)


def _corpus_images(records: Records) -> int:
    """Return the training images of the corpus: images of an epoch of full DAPT."""
    rows = (row for row in records.rows if row.strategy == "full" and row.stage == "dapt" and row.curve)
    return next((row.images // len(row.curve) for row in rows), 0)


def write(found: Iterable[Finding], file: TextIO) -> None:
    """Write findings as CSV."""
    writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Finding)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(each) for each in found)


def shipped() -> list[Finding]:
    """Return the findings of the project's own committed records."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return [
            Finding(**{each.name: each.type(row[each.name]) for each in dataclasses.fields(Finding)})  # type: ignore[operator]
            for row in csv.DictReader(file)
        ]


def of_folders(folders: Sequence[str]) -> list[Finding]:
    """Return the findings of workdirs.

    Raises:
        UserError: A folder holds no study, or none with `none`, `full` and two seeds.
    """
    found = []
    for folder in folders:
        own = findings(Records.read(home.expanded(folder)), folder)
        if not own:
            raise UserError(
                f"advise.records: {folder} has no two seeds of both none and full with results; expected a "
                "workdir of a study that compares them"
            )
        found += own
    return found


def pooled(found: Sequence[Finding]) -> Comparison | None:
    """Return the mean gain over none with its 95% interval, and p that there is none; None of no finding.

    Of one study by Student's t over its seeds, of several by a random-effects summary.
    """
    if not found:
        return None
    if len(found) == 1:
        (only,) = found
        estimate = Estimate(only.gain, only.error, only.seeds - 1, 1, "t-test over seeds")
        return Comparison(estimate.interval(), estimate.p(0.0), estimate.name)
    summary = random_effects([each.gain for each in found], [each.error for each in found])
    return Comparison(summary.effect, summary.p, "random-effects summary")
