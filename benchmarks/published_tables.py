"""What a published table shades as best or not significantly worse, against what its own numbers say.

The table of arXiv 2108.05930 on domain-adapted models gives mean and deviation of ten runs, and shades in
each column the best mean and those not significantly worse by a two-sample t-test at 0.05. The code that
marks the tables of a report is given the same means and deviations here: `python -m
benchmarks.published_tables --reference ../shared/reference`.
"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common
from dapt_jax.errors import EXIT_CODE, UserError
from dapt_jax.report.marks import LEVEL, significance_marks
from dapt_jax.statistics import Summary, holm, summary_t

FILE = "taher2021_domain_adapted.csv"
RUNS = 10
SHADED = {
    "ChestX-ray14": {"imagenet_chexpert"},
    "CheXpert": {"imagenet", "chestxray14", "imagenet_chestxray14"},
    "Shenzhen": {"imagenet_chestxray14"},
    "SIIM": {"chestxray14", "chexpert", "imagenet_chestxray14", "imagenet_chexpert"},
    "Montgomery": {"imagenet", "chexpert", "imagenet_chexpert"},
}
"""By column, the rows that the published table shades."""


def read(folder: Path) -> dict[str, dict[str, Summary]]:
    """Means and deviations by column and row, in percent.

    Raises:
        UserError: the file is not there, lacks a column, or holds what is no number.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the published table in --reference")
    found: dict[str, dict[str, Summary]] = {}
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                of_task = found.setdefault(row["task"], {})
                of_task[row["init"]] = Summary(float(row["mean"]), float(row["sd"]), RUNS)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}:{number}: expected init, task, mean and sd, found {row}") from error
    return found


def check(task: str, cells: dict[str, Summary]) -> list[common.Row]:
    """Tests every cell of a column against its best, and sets the verdict beside the shading.

    Args:
        task: the column.
        cells: by row.

    Returns:
        A line per cell: two-sided p of Student's test (one variance for both), of Welch's, of Student's where
        the deviations are taken to have the divisor n, as NumPy's default does, and Student's p adjusted by
        Holm's method over the column.
    """
    means = {name: cell.mean for name, cell in cells.items()}
    wider = {n: Summary(c.mean, c.sd * math.sqrt(c.n / (c.n - 1)), c.n) for n, c in cells.items()}

    def marked(of: dict[str, Summary], equal_variances: bool) -> dict[str, float | None]:
        p_against = lambda name, best: summary_t(of[name], of[best], equal_variances).p  # noqa: E731
        return dict(significance_marks(means, p_against, digits=2).p)

    student, welch, divisor_n = marked(cells, True), marked(cells, False), marked(wider, True)
    adjusted = dict(zip(student, holm(list(student.values())), strict=True))
    rows = []
    for name, cell in cells.items():
        is_shaded, p = name in SHADED[task], student.get(name)
        rows.append(
            {
                "task": task,
                "init": name,
                "mean": cell.mean,
                "sd": cell.sd,
                "shaded": "yes" if is_shaded else "no",
                "student": p,
                "welch": welch.get(name),
                "divisor_n": divisor_n.get(name),
                "holm": adjusted.get(name),
                "says": _verdict(is_shaded, p, adjusted.get(name)),
            }
        )
    return rows


def _verdict(is_shaded: bool, p: float | None, adjusted: float | None) -> str:
    if p is None:
        return "best" if is_shaded else "best, and not shaded"
    if is_shaded == (p >= LEVEL):
        return "as shaded"
    if not is_shaded:
        return "not shaded, but not significantly worse"
    after = "so" if adjusted is not None and adjusted < LEVEL else "not so"
    return f"shaded, but significantly worse; {after} after Holm"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and keeps the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, help=f"folder that holds {FILE}")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--csv", help="file for the table")
    options = parser.parse_args(arguments)
    try:
        rows = [row for task, cells in read(options.reference).items() for row in check(task, cells)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    options.reference = str(options.reference)
    common.report(options, f"p against the best of the column, two-sided, {RUNS} runs each", rows)
    unsupported = [row for row in rows if row["says"].startswith("shaded, but")]
    for row in unsupported:
        print(
            f"{row['task']}: {row['init']} is {row['says']} (p = {row['student']:.3f}, adjusted {row['holm']:.3f})"
        )
    print(
        f"{len(unsupported)} of {sum(map(len, SHADED.values()))} shaded cells are not supported by the table's own numbers."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
