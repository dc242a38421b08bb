"""Tables of docs/efficiency.md, from the CSV files of benchmarks/results.

    python -m benchmarks.train_step --csv benchmarks/results/train_step.csv
    python -m benchmarks.efficiency_page

Every table stands between marks that name its file; what is outside of them is left as it is.
"""

import argparse
import csv
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import common
from dapt_jax.errors import EXIT_CODE, UserError

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "efficiency.md", ROOT / "benchmarks" / "results"
STEP_TARGETS = {
    ("resnet50", "full"): "1.0",
    ("resnet50", "last block"): "1.2",
    ("resnet50", "forward"): "1.0",
    ("efficientnet_lite0", "full"): "1.0",
    ("efficientnet_lite0", "forward"): "1.0",
}
"""Ratios that float32 steps were to reach."""
PROTOCOL_TARGETS = {"full": "2", "l1sb": "5", "l1sb_pft": "3"}
TENTH_TARGETS = {"full": "2.6", "l1sb": "10", "l1sb_pft": "4.5"}
"""Ratios with compiling that the cached protocol was to reach, at a fiftieth and at a tenth of the paper's epochs."""
NAMES = {
    "resnet50": "ResNet-50",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "vit_small": "ViT-S",
    "vit_small_dinov2": "DINOv2 ViT-S/14",
    "full": "full",
    "l1sb": "L1SB",
    "l1sb_pft": "L1SB, then full",
    "l2sb": "L2SB",
    "l2sb_pft": "L2SB, then full",
    "f1b": "F1B",
    "f2b": "F2B",
    "cached": "dapt_jax, cached",
    "uncached": "dapt_jax, not cached",
    "torch": "PyTorch",
    "size": "image side",
    "boundary": "FLOPs above the boundary",
}
"""Names for people, where a file has another one."""
TRAINED = {"full": "all", "last block": "last block, not cached", "forward": "forward"}

Rows = Sequence[dict[str, str]]


def begin(file: str) -> str:
    """Return the mark above the table of a file.

    >>> begin("heads.csv")
    '<!-- begin: python -m benchmarks.efficiency_page, heads.csv -->'
    """
    return f"<!-- begin: python -m benchmarks.efficiency_page, {file} -->"


def digits(text: str, number: int = 3) -> str:
    """Return a figure of a file with so many significant digits; empty for an empty one.

    >>> digits("119.353"), digits("56363.9"), digits("0.0562"), digits("")
    ('119', '5.64e+04', '0.0562', '')
    """
    return f"{float(text):.{number}g}" if text else ""


def whole(text: str) -> str:
    """Return a figure of a file as a whole number.

    >>> whole("1819.79")
    '1,820'
    """
    return f"{float(text):,.0f}"


def decimals(text: str, number: int) -> str:
    """Return a figure of a file with so many decimals; empty for an empty one."""
    return f"{float(text):.{number}f}" if text else ""


def score(text: str, number: int) -> str:
    """Return a score between 0 and 1 without its zero."""
    return decimals(text, number).removeprefix("0")


def train_step(rows: Rows) -> list[str]:
    """Return the table of training steps."""
    head = (
        "| model | dtype | what trains | ours, images/s | PyTorch | ratio | rounds | target "
        "| peak MiB | PyTorch | compiling, s |"
    )
    return [head, "| --- | --- | --- |" + " ---: |" * 3 + " --- |" + " ---: |" * 4] + [
        line(
            NAMES.get(row["model"], row["model"]),
            row["dtype"],
            TRAINED[row["strategy"]],
            digits(row["dapt_jax images/s"]),
            digits(row["torch images/s"]),
            decimals(row["ratio"], 2),
            f"{decimals(row['ratio low'], 2)} to {decimals(row['ratio high'], 2)}"
            if row["ratio low"]
            else "",
            STEP_TARGETS.get((row["model"], row["strategy"]), "") if row["dtype"] == "float32" else "",
            whole(row["dapt_jax peak MiB"]),
            whole(row["torch peak MiB"]),
            decimals(row["compile s"], 1) if float(row["compile s"]) else "",
        )
        for row in rows
    ]


def paper_protocol(rows: Rows, targets: Mapping[str, str] = PROTOCOL_TARGETS) -> list[str]:
    """Return the table of the paper's protocol, with the ratios that arms were to reach."""
    head = (
        "| arm | side | wall s | of it compiling | TFLOP | Wh | AUC | ratio | ratio with compiling | rounds "
        "| FLOP ratio | target |"
    )
    lines = [head, "| --- | --- |" + " ---: |" * 7 + " --- |" + " ---: |" * 2]
    for arm, group in itertools.groupby(rows, key=lambda row: row["arm"]):
        for place, row in enumerate(group):
            compiling = decimals(row["compile s"], 1) if row["side"] != "torch" else ""
            ratios = [digits(row[key]) for key in ("ratio", "ratio with compile")]
            lowest, highest = digits(row["lowest"]), digits(row["highest"])
            ratios += [f"{lowest} to {highest}" if lowest != highest else "", digits(row["FLOP ratio"])]
            target = targets.get(arm, "") if row["side"] == "cached" else ""
            figures = decimals(row["wall s"], 1), compiling, decimals(row["TFLOP"], 2), decimals(row["Wh"], 2)
            first = NAMES.get(arm, arm) if not place else ""
            lines.append(line(first, NAMES[row["side"]], *figures, score(row["AUC"], 3), *ratios, target))
    return lines


def heads(rows: Rows) -> list[str]:
    """Return the table of linear heads on real sets."""
    head = "| set | images | AUC | scikit-learn | s | scikit-learn, s |"
    return [head, "| --- |" + " ---: |" * 5] + [
        line(
            row["what"],
            row["rows"],
            score(row["AUC"], 4),
            score(row["scikit-learn"], 4),
            digits(row["seconds"]),
            digits(row["scikit-learn s"]),
        )
        for row in rows
        if row["AUC"]
    ]


def feature_cache(rows: Rows) -> list[str]:
    """Return the table of cached prefixes."""
    head = (
        "| model | boundary below | kept, MiB | fill s | step ms, not cached | cached | times faster | FLOP ratio "
        "| break-even, epochs |"
    )
    shown = ("MiB", "fill s", "uncached ms", "cached ms", "times faster", "FLOP ratio", "break even epochs")
    return [head, "| --- | --- |" + " ---: |" * 7] + [
        line(row["model"], row["boundary below"], *(digits(row[key]) for key in shown)) for row in rows
    ]


def input_pipeline(rows: Rows) -> list[str]:
    """Return the table of reading images."""
    head = "| files | from px | ratio | rounds | over 10 epochs |"
    return [head, "| --- | ---: | ---: | --- | ---: |"] + [
        line(
            row["files"].replace("jpeg", "JPEG").replace("png", "PNG"),
            row["from px"],
            decimals(row["ratio"], 2),
            f"{decimals(row['ratio low'], 2)} to {decimals(row['ratio high'], 2)}",
            digits(row["over 10 epochs"]),
        )
        for row in rows
    ]


def scaling(rows: Rows) -> list[str]:
    """Return the table of how time and FLOPs grow."""
    head = "| axis | from | to | exponent of time | of FLOPs | GFLOP/s |"
    lines = [head, "| --- | ---: | ---: | ---: | ---: | --- |"]
    for axis, of_axis in itertools.groupby(rows, key=lambda row: row["axis"]):
        group = list(of_axis)
        key = "GFLOP" if axis == "boundary" else "value"
        values, speeds = (sorted(float(row[name]) for row in group) for name in (key, "GFLOP/s"))
        lines.append(
            line(
                NAMES.get(axis, axis),
                f"{values[0]:.3g}",
                f"{values[-1]:.3g}",
                decimals(group[0]["exponent"], 2),
                digits(group[0]["of FLOPs"]),
                f"{speeds[0]:.3g} to {speeds[-1]:.3g}",
            )
        )
    return lines


def less_work(rows: Rows) -> list[str]:
    """Return the table of settings that save work by an approximation."""
    head = (
        "| encoder | setting | TFLOP | of it without | CPU s | cached, MiB | development AUC | change "
        "| other patients' AUC | change |"
    )
    lines = [head, "| --- | --- |" + " ---: |" * 4 + " --- | --- |" * 2]
    for row in rows:
        ratio = score(row["of its FLOPs"], 3) if row["against"] else ""
        costs = digits(row["TFLOP"]), ratio, digits(row["CPU s"]), digits(row["cached MiB"])
        scores = [
            text
            for split in ("development", "test")
            for text in (score(row[f"{split} AUC"], 3), _change(row, split))
        ]
        lines.append(line(NAMES.get(row["model"], row["model"]), row["arm"], *costs, *scores))
    return lines


def _change(row: dict[str, str], split: str) -> str:
    """Return a change of the score of a split with its interval; empty for an arm that is compared with none."""
    if not row[f"{split} low"]:
        return ""
    change, low, high = (float(row[f"{split} {name}"]) for name in ("change", "low", "high"))
    return f"{change:+.4f} [{low:+.4f}, {high:+.4f}]"


def few_parameters(rows: Rows) -> list[str]:
    """Return the table of steps that train few parameters."""
    head = "| encoder | strategy | layer groups | parameters that train | ms | of full: FLOPs | seconds | rounds | memory |"
    lines = [head, "| --- | --- |" + " ---: |" * 5 + " --- | ---: |"]
    for row in rows:
        groups = row["groups"] if row["groups"] == "all" else f"last {row['groups']}"
        lines.append(
            line(
                NAMES.get(row["model"], row["model"]),
                f"`{row['strategy']}`",
                groups,
                f"{int(row['trainable']):,}",
                whole(row["ms"]),
                score(row["of full FLOPs"], 2),
                score(row["of full seconds"], 2),
                f"{score(row['low'], 2)} to {score(row['high'], 2)}",
                score(row["of full memory"], 2),
            )
        )
    return lines


def papers_size(rows: Rows) -> list[str]:
    """Return the table of jobs at the size of their papers: what was run of them, and the whole."""
    head = (
        "| job | phase | images | s predicted | s | ratio | MiB planned | XLA's | all: PFLOP | hours here | s, H100 "
        "| images/s, H100 | cache, GiB |"
    )
    lines = [head, "| --- | --- |" + " ---: |" * 11]
    for row in rows:
        on_h100 = (
            f"{3600 * float(row['hours on an H100']):.3g}",
            "" if row["cache"] else whole(row["images/s on an H100"]),
        )
        lines.append(
            line(
                row["job"],
                row["phase"],
                f"{int(row['images']):,}",
                digits(row["predicted s"]),
                digits(row["s"]),
                decimals(row["ratio"], 2),
                whole(row["planned MiB"]),
                whole(row["XLA MiB"]),
                digits(row["PFLOP in all"]),
                digits(row["hours here"]),
                *on_h100,
                f"{digits(row['cache GiB'])} ({row['cache']})" if row["cache"] else "",
            )
        )
    return lines


TABLES: dict[str, Callable[[Rows], list[str]]] = {
    f"{table.__name__}.csv": table
    for table in (
        train_step,
        paper_protocol,
        few_parameters,
        heads,
        feature_cache,
        input_pipeline,
        scaling,
        less_work,
        papers_size,
    )
}
TABLES["paper_protocol_tenth.csv"] = functools.partial(paper_protocol, targets=TENTH_TARGETS)
"""Function from the rows of a file to the lines of its table, by the file's name."""
FLAGS = {"paper_protocol_tenth.csv": "paper_protocol --divide 10 --arms full,l1sb,l1sb_pft"}
"""Module and flags that write a file, where its name does not say them."""


def line(*cells: str) -> str:
    """Return a row of a table.

    >>> line("a", "", "b")
    '| a | | b |'
    """
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def machine(rows: Rows) -> str:
    """Return the machine and the versions of a file in one line."""

    def each(key: str) -> str:
        return ", ".join(dict.fromkeys(row[key] for row in rows if row.get(key)))

    parts = [f"{each('cores')} cores of {each('machine')}"]
    parts += [f"{name} {each(name)}" for name in ("jax", "torch") if each(name)]
    return f"*{', '.join(parts)}.*"


def page(text: str, results: Path, path: Path) -> str:
    """Return the page with every table drawn anew.

    Args:
        text: Text of the page.
        results: Folder of the files.
        path: Path of the page, for errors.

    Raises:
        UserError: A file or the marks of its table are missing, or a file has other columns.
    """
    for name, table in TABLES.items():
        file = results / name
        if not file.exists():
            raise UserError(
                f"{file}: not found; python -m benchmarks.{FLAGS.get(name, file.stem)} --csv {file} measures and writes it"
            )
        with file.open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened))
        try:
            lines = [*table(rows), "", machine(rows)]
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{file}: {error}; expected the columns of python -m benchmarks.{file.stem}"
            ) from error
        text = common.between_marks(text, begin(name), _joined(lines), path)
    return text


def _joined(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the tables between their marks, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the marks")
    given = parser.parse_args(arguments)
    try:
        text = page(given.page.read_text(encoding="utf-8"), given.results, given.page)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    given.page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
