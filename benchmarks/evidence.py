"""Tables and Pareto plots of docs/evidence.md, from the committed records of its studies.

    python -m benchmarks.evidence            the tables between the marks of docs/evidence.md, docs/evidence/figures
    python -m benchmarks.evidence --summary  dapt_jax/study/evidence.csv, which mode=advise reads
    python -m benchmarks.evidence --publish=runs/evidence/chest     what these need of a study, into docs/evidence/chest
    python -m benchmarks.evidence --publish=runs/further/chest --further-seeds     of more seeds of some of its arms, besides

Every folder below docs/evidence that holds a study (`config.json`, `results.jsonl`, `ledger.jsonl` and, for patients,
`predictions/` or `case_scores/`) is shown, finished or not.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks import common
from dapt_jax.errors import EXIT_CODE, UserError
from dapt_jax.formatting import NONE, number, p_value, percent
from dapt_jax.metrics import lower_is_better
from dapt_jax.records import arrays, case_scores, predictions
from dapt_jax.records.case_scores import CaseScores
from dapt_jax.records.ledger import Row
from dapt_jax.records.predictions import Predictions
from dapt_jax.records.study_records import Cost, Records
from dapt_jax.report.style import COLOURS, GREY, save
from dapt_jax.runtime import atomic_files
from dapt_jax.settings.sections import flat
from dapt_jax.statistics import (
    Interval,
    Summary,
    holm,
    mean_interval,
    pareto,
    patient_draws,
    random_effects,
    two_level,
)
from dapt_jax.statistics.comparisons import Estimate
from dapt_jax.study import evidence

ROOT = Path(__file__).resolve().parents[1]
PAGE, FOLDER = ROOT / "docs" / "evidence.md", ROOT / "docs" / "evidence"
BEGIN, END = "<!-- begin: python -m benchmarks.evidence -->", common.END
EARLIER = ("brain_mri", "brain_mri_segmentation", "wbc", "wbc_segmentation")
"""Folders of docs with records of earlier studies, evidence of `mode=advise` too."""

HELD_OUT = ("external", "test")
"""Splits that scores are claimed on."""
NAMES = ("group", "image", "unit")
"""Arrays of names, which numbers replace, the same name by the same number in all files of a study."""

UNUSED = {predictions.FOLDER: ("image", "source"), case_scores.FOLDER: ()}
"""Arrays that no figure needs, by folder."""

MOST_LEVELS = 1024
"""Numbers from 0 to 1 at equal distances that float16 tells apart."""

UNREAD = ("hardware_flops", "peak_bytes", "total_params")
"""Fields of a ledger that no figure needs."""

NOT_OF_RESULTS = (
    "seeds",
    "strategies",
    "cache",
    "monitoring",
    "runtime",
    "energy",
    "plan",
    "report",
    "title",
    "note",
)
"""Settings that further seeds of a study may have of their own."""

CLAIMED = 0.1
"""Share of FLOPs up to which the claim is made."""

RESAMPLES = 400
Cases = Predictions | CaseScores
"""Scores of single images of one run."""

COSTS: dict[str, Callable[[Cost], float]] = {
    "TFLOP": lambda cost: cost.total_flops / 1e12,
    "seconds": lambda cost: cost.wall_s,
    "kWh": lambda cost: cost.kwh,
}


@dataclasses.dataclass(frozen=True)
class Panel:
    """A task of a study on one split.

    Attributes:
        name: Name of the study.
        folder: Folder of its records.
        records: The records.
        task: The task.
        split: Split that is shown.
    """

    name: str
    folder: Path
    records: Records
    task: str
    split: str

    @property
    def title(self) -> str:
        """Name for people."""
        metric = self.records.display_name(self.task, self.records.metric(self.task))
        return f"{self.name}, {self.task}, {self.split} {metric}"

    def values(self, strategy: str, split: str = "") -> list[float | None]:
        """Return a strategy's scores by seed."""
        records, task = self.records, self.task
        return records.values(
            strategy, task, split or self.split, records.protocol(task), records.metric(task)
        )

    @property
    def sign(self) -> int:
        """1 where higher scores are better, else -1."""
        return -1 if lower_is_better(self.records.metric(self.task)) else 1

    @property
    def arms(self) -> list[str]:
        """Strategies with a score."""
        return [name for name in self.records.strategies if Summary.of(self.values(name)) is not None]

    def flops(self, strategy: str) -> float:
        """Return the FLOPs of a strategy's adaptation, mean over seeds."""
        found = self.records.mean_cost(strategy, self.task, lambda cost: float(cost.flops["dapt"]))
        return found.mean if found else 0.0

    def best_full(self) -> str | None:
        """Return full DAPT at its best length, chosen by the mean out-of-fold score on development images.

        The mean is over the seeds of all lengths, so that further seeds of one do not make it the best or another.
        """
        lengths = [name for name in self.arms if name == "full" or name.rpartition("_")[0] == "full"]
        values = {name: self.values(name, self.records.in_domain(self.task)) for name in lengths}
        of_all = [all(value is not None for value in each) for each in zip(*values.values(), strict=True)]
        scores = {}
        for name, each in values.items():
            shared = [value for value, is_shared in zip(each, of_all, strict=True) if is_shared]
            summary = Summary.of(shared or each)
            if summary is not None:
                scores[name] = self.sign * summary.mean
        return max(scores, key=lambda name: scores[name]) if scores else None

    def compare(self, strategy: str, reference: str) -> tuple[Estimate | None, str]:
        """Return a strategy minus a reference over seeds and patients, and how it was tested.

        Without predictions of both for two seeds it is over seeds alone.
        """
        found = [
            (each, other)
            for seed in self.records.seeds
            if (each := self._cases(strategy, seed)) and (other := self._cases(reference, seed))
        ]
        if len(found) > 1 and all(_are_same(each, other) for each, other in found):
            patients = len(np.unique(found[0][0].groups))
            return over_seeds_and_patients(found), f"{patients} {found[0][0].drawn}"
        pairs = zip(self.values(strategy), self.values(reference), strict=True)
        summary = Summary.of([a - b if a is not None and b is not None else None for a, b in pairs])
        if summary is None:
            return None, "seeds alone"
        error = summary.sd / summary.n**0.5 if summary.n > 1 and summary.sd > 1e-12 else None
        return Estimate(summary.mean, error, summary.n - 1, summary.n, "paired t-test"), "seeds alone"

    def _cases(self, strategy: str, seed: object) -> Cases | None:
        """Return the scores of single images of a run; None where they were not kept."""
        protocol, metric = self.records.protocol(self.task), self.records.metric(self.task)
        if protocol is None:
            return None
        if metric == "dice":
            path = case_scores.path_of(self.folder, strategy, seed, self.task, self.split, protocol)
            return case_scores.read(path) if path.is_file() else None
        path = predictions.path_of(self.folder, strategy, seed, self.task, self.split)
        if metric != "auc" or not path.is_file():
            return None
        return predictions.read(path, protocol) or predictions.read(path, protocol, predictions.ORDER)


def over_seeds_and_patients(found: Sequence[tuple[Cases, Cases]]) -> Estimate | None:
    """Return the first minus the second of two arms, from the scores of the same images by seed: see `two_level`."""
    differences, draws = [], []
    for each, other in found:
        every = np.arange(len(each.groups))
        differences.append(_measure(each)(every) - _measure(other)(every))
        first, second = (patient_draws(_measure(one), one.groups, RESAMPLES) for one in (each, other))
        draws.append(first - second)
    return two_level(differences, np.stack(draws, 1), len(np.unique(found[0][0].groups)))


def _are_same(first: Cases, second: Cases) -> bool:
    if isinstance(first, Predictions):
        return isinstance(second, Predictions) and first.same_images(second)
    return isinstance(second, CaseScores) and first.same_images(second)


def _measure(cases: Cases) -> Callable[[np.ndarray], float]:
    return cases.auc if isinstance(cases, Predictions) else cases.mean


def panels(folder: Path) -> list[Panel]:
    """Return every task of every study below a folder, on its external set and other patients."""
    found = []
    for config in sorted(folder.glob("*/config.json")):
        records = Records.read(config.parent)
        for task in records.tasks:
            splits = [split for split in HELD_OUT if split in records.splits(task)]
            shown = splits or [records.in_domain(task)]
            found += [Panel(config.parent.name, config.parent, records, task, split) for split in shown]
    return found


def table(panel: Panel) -> list[str]:
    """Return the table of a panel as Markdown: every arm against full at its best and full of equal FLOPs."""
    best = panel.best_full()
    if best is None:
        return [f"### {panel.title}", "", "No full DAPT with a score yet.", ""]
    longest = panel.flops("full") or panel.flops(best)
    margin = panel.records.margin
    rows = []
    for name in panel.arms:
        estimate, tested = panel.compare(name, best) if name != best else (None, "")
        claim = estimate.non_inferiority(margin, panel.sign < 0) if estimate and margin else None
        both = estimate.equivalence(margin) if estimate and margin else None
        matched = f"full_{name.rpartition('_')[2]}"
        against = panel.compare(name, matched)[0] if matched in panel.arms and name != matched else None
        rows.append((name, panel.flops(name) / longest, claim, both, against, tested))
    cheap = [row for row in rows if row[2] is not None and row[1] <= CLAIMED + 1e-9]
    adjusted = dict(zip([row[0] for row in cheap], holm([row[2].p for row in cheap if row[2]]), strict=True))
    lines = [
        f"### {panel.title}",
        "",
        f"Full at its best length on development images: `{best}`. Margin {margin:g}.",
        "",
        "| arm | FLOPs of full | development | score | minus best full, 90% | p non-inferior | p equivalent "
        "| minus full of equal FLOPs, 95% | over |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, share, claim, both, against, tested in sorted(rows, key=lambda row: row[1]):
        p = p_value(adjusted[name]) if name in adjusted else NONE
        inside = mean_interval(panel.values(name, panel.records.in_domain(panel.task)))
        lines.append(
            f"| `{name}` | {percent(share)} | {_score(inside)} | {_score(mean_interval(panel.values(name)))} "
            f"| {_signed(claim.difference if claim else None)} | {p} | {p_value(both.p) if both else NONE} "
            f"| {_signed(against.interval() if against else None)} | {tested or NONE} |"
        )
    lines += [
        "",
        "Development: out of fold. Score: the mean over the folds' networks, each scored by itself; differences are of "
        "their mean prediction for each image.",
        f"p non-inferior: arms of at most {CLAIMED:.0%}, adjusted by Holm's method; p equivalent: not adjusted.",
    ]
    winners = [name for name, p in adjusted.items() if p is not None and p < 0.05]
    if adjusted:
        lines.append(
            f"Non-inferior to `{best}` at {CLAIMED:.0%} of its longest FLOPs or less: "
            f"{', '.join(f'`{name}`' for name in winners) or 'none shown'}."
        )
    return [*lines, "", f"![Score against cost](evidence/figures/{_file(panel)})", ""]


def figure(panel: Panel) -> Figure:
    """Draw score with its interval against FLOPs, seconds and kWh, the Pareto front as a line."""
    drawn = Figure(figsize=(12, 4))
    for index, (title, read) in enumerate(COSTS.items(), start=1):
        axis = drawn.add_subplot(1, 3, index)
        names, xs, ys = [], [], []
        for name in panel.arms:
            cost, score = panel.records.mean_cost(name, panel.task, read), mean_interval(panel.values(name))
            if cost is None or score is None or cost.mean <= 0:
                continue
            names.append(name)
            xs.append(cost.mean)
            ys.append(score.mean)
            axis.errorbar(
                cost.mean, score.mean, yerr=score.half or 0.0, fmt="o", ms=4,
                color=COLOURS[1] if name.startswith("full") else COLOURS[0], ecolor=GREY,
            )  # fmt: skip
        front = pareto(xs, [panel.sign * y for y in ys])
        axis.plot([xs[i] for i in front], [ys[i] for i in front], color=GREY, drawstyle="steps-post", lw=1)
        for place, i in enumerate(front):
            above = (2, 3 + 8 * (place % 4))  # neighbours on the front are near each other
            axis.annotate(names[i], (xs[i], ys[i]), fontsize=6, xytext=above, textcoords="offset points")
        if xs:
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"{title} of one seed, target task included")
    drawn.suptitle(panel.title, fontsize=10)
    drawn.tight_layout()
    return drawn


def over_data_sets(found: Sequence[Panel]) -> list[str]:
    """Return the random-effects summary of every arm that two data sets share, first split of each task, by metric.

    Of studies with the same images in a task, the first is taken.
    """
    first: dict[str, Panel] = {}
    for panel in found:
        images = panel.records.config.get("tasks", {}).get(panel.task, panel.name)
        first.setdefault(json.dumps([panel.task, images], sort_keys=True), panel)
    by_metric: dict[str, dict[str, list[Estimate]]] = {}
    for panel in first.values():
        best = panel.best_full()
        metric = panel.records.display_name(panel.task, panel.records.metric(panel.task))
        for name in panel.arms:
            estimate = panel.compare(name, best)[0] if best and name != best else None
            if estimate is not None and estimate.error:
                by_metric.setdefault(metric, {}).setdefault(name, []).append(estimate)
    lines = []
    for metric, by_arm in by_metric.items():
        shared = {name: each for name, each in by_arm.items() if len(each) > 1}
        if not shared:
            continue
        lines += [
            f"### Over the data sets, {metric}",
            "",
            "Random effects (Paule and Mandel; Hartung and Knapp).",
            "",
            "| arm | data sets | minus best full, 95% | p | tau |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for name, each in shared.items():
            summary = random_effects([one.mean for one in each], [one.error or 0.0 for one in each])
            tau = number(summary.tau)
            lines.append(
                f"| `{name}` | {len(each)} | {_signed(summary.effect)} | {p_value(summary.p)} | {tau} |"
            )
        lines.append("")
    return lines


def page(found: Sequence[Panel]) -> str:
    """Return what stands between the marks."""
    if not found:
        return "No records yet.\n"
    lines = [line for panel in found for line in table(panel)]
    for name, records in {panel.name: panel.records for panel in found}.items():
        lines += _not_run(name, records)
    return "\n".join([*over_data_sets(found), *lines]).rstrip() + "\n"


def _not_run(name: str, records: Records) -> list[str]:
    """Return what has not run of a study: its missing arms, and the few arms that further seeds have."""
    missing = set(records.missing())
    ran = {
        seed: tuple(arm for arm in records.strategies if f"{arm} {seed}" not in missing)
        for seed in records.seeds
    }
    most = max(map(len, ran.values()), default=0)
    further = {seed: arms for seed, arms in ran.items() if arms and 2 * len(arms) < most}
    others = sum(len(records.strategies) - len(arms) for seed, arms in ran.items() if seed not in further)
    lines = [f"Partial: {others} arms of `{name}` have not run.", ""] if others else []
    for arms in dict.fromkeys(further.values()):
        seeds = ", ".join(str(seed) for seed, own in further.items() if own == arms)
        names = ", ".join(f"`{arm}`" for arm in arms)
        lines += [f"Further seeds of `{name}`, {seeds}, have run for {names} alone.", ""]
    return lines


def summary(docs: Path) -> list[evidence.Finding]:
    """Return the findings of every committed study."""
    folders = [docs / name for name in EARLIER if (docs / name / "config.json").exists()]
    folders += sorted(each.parent for each in (docs / "evidence").glob("*/config.json"))
    return [
        finding
        for folder in folders
        for finding in evidence.findings(Records.read(folder), folder.relative_to(docs.parent).as_posix())
    ]


def publish(workdir: Path, folder: Path) -> None:
    """Copy of a study's records what the page and the summary read.

    These are the results of each task's primary metric, costs, and predictions or scores of
    cases of held-out sets with numbers in the place of names: the same figures to the last digit. Of predictions only
    AUC is shown, to which their order alone matters, so that they are replaced by it (`ordered`), but where images are
    aggregated to units.

    Args:
        workdir: Workdir of the study, finished or not.
        folder: Folder to write, anew.

    Raises:
        UserError: One of the two folders holds the other, which writing anew would delete.
    """
    source, target = workdir.resolve(), folder.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise UserError(f"--publish={workdir}: {folder} is written anew; expected a workdir outside of it")
    records = Records.read(workdir)
    shown = {task: records.metric(task) for task in records.tasks}
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    config["data_dir"] = common.DATA
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    results = [row for row in _rows(workdir / "results.jsonl") if row["metric"] == shown.get(row["task"])]
    _write(folder / "results.jsonl", results)
    _write(folder / "ledger.jsonl", [_as_read(row) for row in _rows(workdir / "ledger.jsonl")])
    for kind, unused in UNUSED.items():
        files = {
            path: arrays.read(path)
            for path in sorted((workdir / kind).rglob("*.npz"))
            if any(f"-{split}" in path.name for split in HELD_OUT)
        }
        numbers = {
            name: np.unique(np.concatenate([each[name] for each in files.values() if name in each] or [[]]))
            for name in NAMES
        }
        for path, found in files.items():
            target = folder / path.relative_to(workdir)
            target.parent.mkdir(parents=True, exist_ok=True)
            arrays.write(target, _told(found, unused, numbers))


def _told(
    found: dict[str, np.ndarray], unused: Sequence[str], numbers: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return arrays of predictions or scores of cases without what no figure needs, and without names."""
    told = {}
    for name, array in found.items():
        kind, _, protocol = name.partition("/")
        if name in unused or (kind == "seen" and array.all()):
            continue
        if name in NAMES:
            told[name] = np.searchsorted(numbers[name], array).astype(np.int32)
        elif (
            kind == predictions.PROBABILITY and "unit" not in found and (order := ordered(array)) is not None
        ):
            told[f"{predictions.ORDER}/{protocol}"] = order
        else:
            told[name] = array
    return told


def add_seeds(workdir: Path, folder: Path) -> None:
    """Add to the published records of a study those of further seeds of some of its arms.

    Args:
        workdir: Workdir in which the further seeds ran, by the same config but for `seeds` and `strategies`.
        folder: Folder that the study was published to.

    Raises:
        UserError: The workdir is of another study or other images, or has seeds that are published already.
    """
    with tempfile.TemporaryDirectory() as temporary:
        added = Path(temporary) / folder.name
        publish(workdir, added)
        of_added, of_study = (
            json.loads((each / "config.json").read_text(encoding="utf-8")) for each in (added, folder)
        )
        then = flat(of_study)
        differing = sorted(
            name
            for name, value in flat(of_added).items()
            if name.partition(".")[0] not in NOT_OF_RESULTS and then.get(name, value) != value
        )
        if differing:
            raise UserError(
                f"{workdir}: {differing[0]} differs from {folder / 'config.json'}; expected the same study"
            )
        if unknown := set(of_added["strategies"]) - set(of_study["strategies"]):
            raise UserError(f"{workdir}: {min(unknown)!r} is no strategy of {folder / 'config.json'}")
        if again := set(of_added["seeds"]) & set(of_study["seeds"]):
            raise UserError(f"{workdir}: seed {min(again)} is in {folder} already; expected further seeds")
        of_study["seeds"] += of_added["seeds"]
        for name in ("results.jsonl", "ledger.jsonl"):
            _write(folder / name, [*_rows(folder / name), *_rows(added / name)])
        for path in added.rglob("*.npz"):
            target = folder / path.relative_to(added)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        (folder / "config.json").write_text(json.dumps(of_study, indent=1) + "\n", encoding="utf-8")


def ordered(probabilities: np.ndarray) -> np.ndarray | None:
    """Return numbers from 0 to 1 in the order of the probabilities of each class, float16 [n, classes].

    They take half of the room of float32. None where a class has more than `MOST_LEVELS` different probabilities, which
    float16 would not tell apart, or one that is no number.
    """
    levels = [np.unique(column, return_inverse=True) for column in probabilities.T]
    if np.isnan(probabilities).any() or any(len(values) > MOST_LEVELS for values, _ in levels):
        return None
    return np.stack([(place / len(values)).astype(np.float16) for values, place in levels], -1)


def _as_read(row: dict[str, Any]) -> dict[str, Any]:
    """Return a line of a ledger without what its absence says, and without what nothing reads."""
    defaults = {field.name: field.default for field in dataclasses.fields(Row)}
    # The curve of full DAPT tells the summary how many images an epoch had.
    unread = UNREAD if row["strategy"] == "full" else (*UNREAD, "curve")
    return {name: value for name, value in row.items() if name not in unread and value != defaults[name]}


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines without spaces."""
    lines = (json.dumps(row, separators=(",", ":")) for row in rows)
    atomic_files.write_text(path, "".join(f"{line}\n" for line in lines))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and its figures, the summary, or the records of a study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=Path, default=FOLDER, help="folder with a folder for each study")
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the marks")
    parser.add_argument("--summary", action="store_true", help=f"write {evidence.FILE.name} instead")
    parser.add_argument(
        "--publish", type=Path, metavar="WORKDIR", help="copy what is read of a study to --records"
    )
    parser.add_argument(
        "--further-seeds", action="store_true", help="add what --publish names to what is published"
    )
    given = parser.parse_args(arguments)
    try:
        if given.publish:
            write = add_seeds if given.further_seeds else publish
            write(given.publish, given.records / given.publish.resolve().name)
            return 0
        if given.summary:
            with evidence.FILE.open("w", encoding="utf-8", newline="") as file:
                evidence.write(summary(ROOT / "docs"), file)
            return 0
        found = panels(given.records)
        text = common.between_marks(given.page.read_text(encoding="utf-8"), BEGIN, page(found), given.page)
        figures = given.page.parent / "evidence" / "figures"
        for panel in found:
            figures.mkdir(parents=True, exist_ok=True)
            save(figure(panel), figures / _file(panel))
        given.page.write_text(text, encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    print(f"{len(found)} tables in {given.page}")
    return 0


def _file(panel: Panel) -> str:
    return f"{panel.name}_{panel.task}_{panel.split}.png"


def _score(interval: Interval | None, spec: str = ".3f") -> str:
    if interval is None:
        return NONE
    if interval.low is None:
        return f"{interval.mean:{spec}}"
    return f"{interval.mean:{spec}} [{interval.low:{spec}}, {interval.high:{spec}}]"


def _signed(interval: Interval | None) -> str:
    return _score(interval, "+.3f")


if __name__ == "__main__":
    sys.exit(main())
