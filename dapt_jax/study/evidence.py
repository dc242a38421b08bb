"""What the records of earlier studies say of strategies: the evidence that `mode=advise` rests on.

`evidence.csv` beside this file summarises the records that are committed under docs/; `python -m benchmarks.evidence
--summary` writes it again.
"""

import csv
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from dapt_jax.errors import UserError
from dapt_jax.metrics import METRICS, lower_is_better
from dapt_jax.records.study_records import Records
from dapt_jax.records.vocabulary import CHECKPOINT_MARK
from dapt_jax.statistics import Estimate, Interval, Summary, random_effects
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
        kind: "classes" or "masks".
        encoder: Architecture.
        init: Source weights.
        objective: What adaptation minimised.
        corpus: Images of the corpus.
        strategy: Built-in strategy that it is or resembles by what it trains (`built_in_like`).
        share: FLOPs of its adaptation as a share of those of full DAPT.
        where: `OUTSIDE` for the external set, `INSIDE` for images like those of training.
        metric: Primary metric.
        gain: Mean difference from `none` over seeds, positive where better.
        error: Standard error of it over seeds.
        seeds: Number of seeds.
    """

    study: str
    task: str
    kind: str
    encoder: str
    init: str
    objective: str
    corpus: int
    strategy: str
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
    specs = records.config.get("custom_strategies", {})
    shared = {
        "objective": records.config.get("adapt", {}).get("objective", "supervised"),
        "encoder": str(records.config.get("model", {}).get("name", "")),
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
                spec = specs.get(name, {})
                if not flops[name] or not flops["full"] or spec.get("weights") or spec.get("corpus"):
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
                        kind=kind,
                        **{**shared, "objective": spec.get("objective") or shared["objective"]},
                        corpus=_corpus_images(records),
                        strategy=_strategy(name, spec),
                        share=round(flops[name] / flops["full"], 4),
                        where=where,
                        metric=metric,
                        gain=round(summary.mean, 6),
                        error=round(summary.sd / math.sqrt(summary.n), 6),
                        seeds=summary.n,
                    )
                )
    return found


def _strategy(name: str, spec: dict[str, Any]) -> str:
    """Return what a strategy trains, by the name of a built-in one; else its own without a compute budget's share."""
    trained = [phase["trainable"] for phase in spec.get("phases", ())]
    found = built_in_like(name, spec.get("like", ""), spec.get("cut_after", ""), trained)
    stem, _, share = found.rpartition("_")
    return stem if spec.get("compute_budget") and stem and share.isdecimal() else found


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
        own = findings(Records.read(Path(folder).expanduser()), folder)
        if not own:
            raise UserError(
                f"advise.records: {folder} has no two seeds of both none and full with results; expected a "
                "workdir of a study that compares them"
            )
        found += own
    return found


def pooled(found: Sequence[Finding]) -> Interval | None:
    """Return the mean gain over none with its 95% interval; None of no finding.

    Of one study by Student's t over its seeds, of several by a random-effects summary.
    """
    if not found:
        return None
    if len(found) == 1:
        (only,) = found
        return Estimate(only.gain, only.error, only.seeds - 1, 1, "t-test over seeds").interval()
    return random_effects([each.gain for each in found], [each.error for each in found]).effect
