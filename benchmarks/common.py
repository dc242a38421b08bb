"""What the benchmarks share: flags, images, the machine and its versions, medians with their spread, table, JSON, CSV."""

import argparse
import csv
import functools
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dapt_jax.cost import hardware
from dapt_jax.data import sources
from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError

DATA = "../shared/data"
VERSIONS = ("dapt_jax", "jax", "jaxlib", "numpy", "pillow", "torch", "torchvision", "timm")

END = "<!-- end -->"
"""Mark in a page below what a benchmark writes there."""

Row = dict[str, Any]


def parser(doc: str | None, *, rounds: int = 3) -> argparse.ArgumentParser:
    """The flags that every benchmark has; `doc` is its docstring."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--json", help="file for the numbers, every round's among them")
    made.add_argument("--csv", help="file for the table, with the machine and the versions")
    made.add_argument("--rounds", type=int, default=rounds, help="measurements of each side, in turn")
    made.add_argument("--data", default=DATA, help="folder of real images; phantoms where it is absent")
    return made


def words(text: str) -> list[str]:
    """Parts of a comma-separated flag."""
    return [part for part in text.split(",") if part]


def numbers(text: str) -> list[int]:
    """Whole numbers of a comma-separated flag."""
    return [int(part) for part in words(text)]


def about() -> dict[str, str]:
    """The machine and the versions, as they stand in every row of a CSV."""
    here = hardware.lookup("cpu", 1, "cpu")
    found = {"machine": here.cpu, "cores": str(here.cores), "memory_gb": f"{here.memory_gb:.1f}"}
    found["python"] = platform.python_version()
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


PEER = ("torch", "torchvision", "timm")
"""Packages of the PyTorch side, by the extra `benchmarks`."""


@functools.cache
def has_torch() -> bool:
    """Return whether the PyTorch side can run; say in one line why where it cannot.

    The packages are imported in a process of their own: builds of torch and torchvision that do not fit each other
    are installed but fail when they are imported (`operator torchvision::nms does not exist`).
    """
    missing = [name for name in PEER if importlib.util.find_spec(name) is None]
    reason = f"{' and '.join(missing)} not installed" if missing else _import_error()
    if reason:
        print(
            f"PyTorch side left out: {reason}; expected the versions of pip install -e '.[benchmarks]'",
            flush=True,
        )
    return not reason


def _import_error() -> str:
    """Return the last line of the error with which the packages of the PyTorch side fail; empty if they import."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(PEER)}"], capture_output=True, text=True, check=False
    )
    lines = done.stderr.strip().splitlines()
    return (lines[-1] if lines else f"exit code {done.returncode}") if done.returncode else ""


def images_of(data: str, count: int, size: int) -> tuple[Dataset, str]:
    """A corpus with as many images of each class as the count allows, and what it is.

    Args:
        data: folder that holds `bccd/manifest.csv`.
        count: of images.
        size: side in pixels.

    Returns:
        Cells of the BCCD set, or synthetic phantoms where the folder is absent.
    """
    folder = Path(data) / "bccd"
    if (folder / "manifest.csv").is_file():
        settings = {"kind": "manifest", "path": "manifest.csv"}
        whole, what = sources.load(settings, data_dir=str(folder), image_size=size), "BCCD cells"
    else:
        whole = sources.load(
            {"kind": "phantoms", "name": "corpus", "n": 4 * count}, data_dir=None, image_size=size
        )
        what = "SYNTHETIC phantoms"
    order = np.random.default_rng(0).permutation(len(whole))
    places = np.empty(len(whole), int)
    for label in np.unique(whole.labels):
        mine = order[whole.labels[order] == label]
        places[mine] = np.arange(len(mine))
    chosen = order[np.argsort(places[order], kind="stable")[:count]]
    return whole.take(np.sort(chosen)), what


def between_marks(text: str, begin: str, new: str, path: Path) -> str:
    """Return a page with new text between a mark and the next `END`.

    Raises:
        UserError: The marks are missing.
    """
    before, found, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise UserError(f"{path}: no lines {begin} and {END}; expected both, for the tables between them")
    return f"{before}{begin}\n\n{new}\n{END}{after}"


def middle(values: Iterable[float]) -> float:
    """The median."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest in words."""
    return f"{middle(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def ratios(ours: Sequence[Row], theirs: Sequence[Row], key: str) -> list[float]:
    """Ratios of a figure, round by round."""
    return [one[key] / other[key] for one, other in zip(ours, theirs, strict=True)]


def report(options: argparse.Namespace, title: str, rows: Sequence[Row], **more: Any) -> None:
    """Prints the table and writes the files that were asked for.

    Args:
        options: with `json` and `csv`.
        title: of the table.
        rows: one dict per row; floats are shown with four digits.
        **more: goes into the JSON file as it is.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if isinstance(rows[0].get(column), int | float) else "left")
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    write(options, title, rows, **more)


def write(options: argparse.Namespace, title: str, rows: Sequence[Row], **more: Any) -> None:
    """Write the files that were asked for, with the machine and the versions: see `report`."""
    here, columns = about(), list(dict.fromkeys(key for row in rows for key in row))
    if options.csv:
        Path(options.csv).parent.mkdir(parents=True, exist_ok=True)
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [*columns, *here])
            writer.writeheader()
            writer.writerows({key: _plain(value) for key, value in row.items()} | here for row in rows)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"title": title, "about": here, "options": vars(options), "rows": rows, **more},
                file,
                indent=1,
            )


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
