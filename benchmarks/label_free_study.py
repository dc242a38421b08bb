"""Writes what the study of configs/label_free_study.py has found so far into docs/label_free.md.

    python -m benchmarks.label_free_study runs/label_free

The folder holds a workdir SET-ARMS for each part that has been run, such as `blood-cached`; parts that are missing
are left out, and arms that are not finished are shown with the seeds that they have. Lines below a table compare partial
arms with full ones, and arms with their controls. External AUC is that of
linear heads, with Student's intervals over seeds; differences to `none` are over seeds and patients at once (see
`dapt_jax.statistics.two_level`), p-values one-sided and adjusted by Holm's method over the arms without labels of a
set, controls among them.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.evidence import over_seeds_and_patients
from dapt_jax.records import predictions
from dapt_jax.records.predictions import Predictions
from dapt_jax.records.study_records import Records
from dapt_jax.statistics.comparisons import Estimate, holm
from dapt_jax.statistics.intervals import Interval, mean_interval

PAGE = Path(__file__).resolve().parents[1] / "docs" / "label_free.md"
BEGIN, END = "<!-- study: written by python -m benchmarks.label_free_study -->", "<!-- end of study -->"
SETS, PARTS = ("blood", "brain", "chest"), ("cached", "control", "teacher", "full")
MARGIN = 0.02
"""Of external AUC, within which a partial arm counts as equivalent to the full one of the same objective."""

NONE, TEACHER = "none", "teacher, frozen"
CONTROLLED = (
    ("two_views_partial", "two_views_elsewhere"),
    ("distil_partial", "distil_random"),
    ("distil_partial", TEACHER),
)
"""Arms, and the control that each has to beat: another domain's images, a random teacher, the teacher itself."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """Results of one arm by seed.

    Attributes:
        name: Name in the table.
        seeds: Number of seeds that the study has of it.
        development: AUC by seed on development images.
        external: AUC by seed on external images.
        cost: Mean FLOPs of adaptation alone, standalone; None without.
        seconds: Mean wall seconds of adaptation, standalone.
        ranks: RankMe before training and after it, by seed.
        cases: Predictions of the external images by seed.
    """

    name: str
    seeds: int
    development: dict[int, float]
    external: dict[int, float]
    cost: float | None
    seconds: float | None
    ranks: list[tuple[float, float]]
    cases: dict[int, Predictions]

    def minus(self, other: "Arm") -> Estimate | None:
        """Return this arm's external AUC minus another's, over the seeds that both have, and over patients."""
        common = [(self.cases[seed], other.cases[seed]) for seed in self.cases if seed in other.cases]
        return over_seeds_and_patients(common) if common else None


def arms_of(folder: Path, images: str) -> Iterator[Arm]:
    """Yield the arms of a set that have results, in the order of the parts; `none` once."""
    is_first = True
    for part in PARTS:
        workdir = folder / f"{images}-{part}"
        if not (workdir / "results.jsonl").exists():
            continue
        records = Records.read(workdir)
        for name in records.planned:
            if name == NONE and part != "teacher":
                if not is_first:
                    continue
                is_first = False
            scores = [
                {
                    seed: value
                    for seed, value in zip(
                        records.seeds, records.values(name, images, split, "linear", "auc"), strict=True
                    )
                    if value is not None
                }
                for split in ("development", "external")
            ]
            if not scores[1]:
                continue
            rows = [
                row
                for row in records.rows
                if row.strategy == name and row.stage == "dapt" and row.seed in scores[1]
            ]
            count = len(scores[1])
            flops = sum(row.model_flops + row.reused_flops for row in rows) / count
            seconds = sum(row.wall_s + row.reused_s for row in rows) / count
            title = TEACHER if part == "teacher" else name
            ranks = list(_ranks(workdir, name, records))
            cases = {
                seed: found
                for seed in scores[1]
                if (found := _predictions(workdir, name, seed, images)) is not None
            }
            yield Arm(title, len(records.seeds), *scores, flops or None, seconds or None, ranks, cases)


def _predictions(workdir: Path, name: str, seed: int, task: str) -> Predictions | None:
    path = predictions.path_of(workdir, name, seed, task, "external")
    return predictions.read(path, "linear") if path.is_file() else None


def _ranks(workdir: Path, name: str, records: Records) -> Iterator[tuple[float, float]]:
    for seed in records.seeds:
        about = workdir / "checkpoints" / f"{name}-seed{seed}" / "adapted.json"
        points = [
            point
            for row in records.rows
            if (row.strategy, row.seed, row.stage) == (name, seed, "dapt")
            for point in row.curve
        ]
        if about.exists() and points and "rankme" in points[-1]:
            yield json.loads(about.read_text())["rankme_before"], points[-1]["rankme"]


def table(images: str, arms: list[Arm]) -> list[str]:
    """Return the lines of a set's table, and of the equivalence of partial and full arms below it."""
    reference = next(arm for arm in arms if arm.name == NONE)
    compared = {arm.name: arm.minus(reference) for arm in arms if arm is not reference}
    tested = [name for name in compared if not name.startswith("supervised") and name != TEACHER]
    of_each = [compared[name] for name in tested]
    values = [found.p(0, "greater") if found else None for found in of_each]
    adjusted = dict(zip(tested, holm(values), strict=True))
    lines = [
        "",
        f"| {images} | seeds | development AUC | external AUC | minus `none` | p, Holm | TFLOP | s | RankMe |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for arm in arms:
        found, p = compared.get(arm.name), adjusted.get(arm.name)
        ranks = [sum(each) / len(arm.ranks) for each in zip(*arm.ranks, strict=True)]
        cells = (
            arm.name if arm.name == TEACHER else f"`{arm.name}`",
            f"{len(arm.external)} of {arm.seeds}",
            _interval(mean_interval(list(arm.development.values()))),
            _interval(mean_interval(list(arm.external.values()))),
            _interval(found.interval(), "+") if found else "",
            "" if p is None else f"{p:.3f}",
            f"{arm.cost / 1e12:.1f}" if arm.cost else "",
            f"{arm.seconds:.0f}" if arm.seconds else "",
            f"{ranks[0]:.0f} to {ranks[1]:.0f}" if ranks else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    by_name = {arm.name: arm for arm in arms}
    for name, arm in by_name.items():
        full = by_name.get(name.replace("_partial", "_full"))
        if not name.endswith("_partial") or full is None:
            continue
        found = arm.minus(full)
        if found is not None:
            tost = found.equivalence(MARGIN)
            p = "undefined" if tost.p is None else f"{tost.p:.3f}"
            lines += [
                "",
                f"`{name}` minus `{full.name}`, {found.n} seeds: {_interval(tost.difference, '+')} (90%); "
                f"p of a difference of {MARGIN} or more (TOST) {p}.",
            ]
    for name, other in CONTROLLED:
        found = by_name[name].minus(by_name[other]) if {name, other} <= {*by_name} else None
        p_value = found.p(0) if found else None
        if found is not None and p_value is not None:
            control = other if other == TEACHER else f"`{other}`"
            lines += [
                "",
                f"`{name}` minus {control}, {found.n} seeds: {_interval(found.interval(), '+')}; "
                f"p of no difference {p_value:.3f}, not adjusted.",
            ]
    return lines


def _interval(found: Interval | None, sign: str = "") -> str:
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{found.mean:{sign}.3f}"
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def main(arguments: list[str] | None = None) -> None:
    """Read the workdirs, and replace what is between the marks of the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="that holds the workdirs SET-ARMS")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    lines = []
    for images in SETS:
        arms = list(arms_of(options.folder, images))
        if any(arm.name == NONE for arm in arms):
            lines += table(images, arms)
    if not lines:
        parser.error(f"{options.folder} holds no results; expected workdirs such as {SETS[0]}-{PARTS[0]}")
    before, rest = options.page.read_text().split(BEGIN)
    text = "\n".join([BEGIN, *lines, "", END])
    options.page.write_text(before + text + rest.split(END)[1])


if __name__ == "__main__":
    main()
