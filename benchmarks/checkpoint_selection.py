"""Which rule picks the best pre-training length by a score, judged on the released results of arXiv 2410.18677.

    python -m benchmarks.checkpoint_selection --reference ../shared/reference --json selection.json

36 cells (encoder x dataset x scheme x freeze mode), nine lengths each. `kept` are the epochs of the
checkpoint that is chosen, `run` those that have to be trained before the rule can choose it. Intervals: 95%,
10,000 bootstrap resamples of the 18 score cells, both freeze modes of a cell together since they share a
score. `meets` is the share of resamples in which a rule saves a third of the epochs (kept) and loses less
than 0.20 points. Settings of a rule are chosen on the other datasets (or encoders, or cells) as those with
the highest `meets` there.
"""

import argparse
import csv
import dataclasses
import functools
import json
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from benchmarks.released_scores import DEFAULT, LENGTHS, Released, Variant, load
from dapt_jax.errors import EXIT_CODE, UserError
from dapt_jax.transferability import select

EPOCHS = np.asarray(LENGTHS)
SHARES = EPOCHS / EPOCHS[-1]
SAVED, LOST = 1 / 3, -0.20
WEIGHTS = (0.0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 2.25, 3.0, 4.5)
COLUMNS = (
    "rule", "kept", "saved", "saved_low", "saved_high", "run", "points", "points_low", "points_high", "against_200",
    "against_200_low", "against_200_high", "meets",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Picks:
    """What a rule does: in each score cell, the index of the length that it keeps, and of the last one it needs."""

    kept: np.ndarray
    run: np.ndarray


def by_row(goodness: np.ndarray, choose: Callable[[np.ndarray], tuple[int, int]]) -> Picks:
    """A rule applied to each score cell."""
    found = np.array([choose(row) for row in goodness])
    return Picks(found[:, 0], found[:, 1])


def arg_best(goodness: np.ndarray) -> Picks:
    """The published rule: the best score of all lengths."""
    return by_row(goodness, lambda row: (select.best(row), len(row) - 1))


def patient(goodness: np.ndarray, wait: int, window: int) -> Picks:
    """Patience on the smoothed score; what ran is known from where it stops."""

    def choose(row: np.ndarray) -> tuple[int, int]:
        for now in range(len(row)):
            index, stops = select.patience(row[: now + 1], wait, window)
            if stops:
                return index, now
        return index, len(row) - 1

    return by_row(goodness, choose)


def with_prior(goodness: np.ndarray, weight: float, longest: int = len(LENGTHS)) -> Picks:
    """The best of score plus length among the first lengths."""
    return by_row(
        goodness, lambda row: (select.length_prior(row[:longest], SHARES[:longest], weight), longest - 1)
    )


def fixed(released: Released, index: int) -> Picks:
    """Always the same length."""
    return Picks(np.full(len(released.cells), index), np.full(len(released.cells), index))


def families(released: Released) -> dict[str, dict[str, Picks]]:
    """Rules by family: the settings of a family are what is chosen out of sample."""
    variants = [v for v in released.goodness if v.level <= 2 and v.margin <= 0.5]
    good = released.goodness
    patience = {
        f"{v}; patience {wait}, window {window}": patient(good[v], wait, window)
        for v in variants for wait in (1, 2, 3) for window in (1, 2)
    }  # fmt: skip
    prior = {f"{v}; weight {w:g}": with_prior(good[v], w) for v in variants for w in WEIGHTS}
    own = {f"{DEFAULT}; weight {w:g}": with_prior(good[DEFAULT], w) for w in WEIGHTS}
    stopped = {f"{DEFAULT}; weight {w:g}, 200 run": with_prior(good[DEFAULT], w, 7) for w in WEIGHTS}
    return {
        "arg-best, any variant": {str(v): arg_best(good[v]) for v in variants},
        "patience, any variant": patience,
        "length prior, any variant": prior,
        "length prior, default variant": own,
        "length prior, default variant, stopped at 200": stopped,
    }


class Judge:
    """Mean savings and points of picks, with bootstrap intervals over score cells."""

    def __init__(self, released: Released, resamples: int, seed: int = 0):
        self.released = released
        self._draws = functools.cache(
            lambda size: np.random.default_rng(seed).integers(0, size, (resamples, size))
        )
        self.draws = self._draws(len(released.cells))

    def by_cell(self, picks: Picks) -> tuple[np.ndarray, np.ndarray]:
        """Share of the epochs saved, and points against 300 epochs (mean of both freeze modes), per score cell."""
        rows = np.arange(len(picks.kept))
        return 1 - SHARES[picks.kept], self.released.gain[rows, :, picks.kept].mean(1)

    def meets(self, picks: Picks, inside: np.ndarray) -> float:
        """Share of resamples of some cells in which both goals are met."""
        saved, points = (values[inside] for values in self.by_cell(picks))
        draws = self._draws(len(saved))
        return float(np.mean((saved[draws].mean(1) >= SAVED - 1e-9) & (points[draws].mean(1) > LOST)))

    def row(self, name: str, picks: Picks) -> dict[str, Any]:
        """A line of the table."""
        saved, points = self.by_cell(picks)
        better = points - self.released.gain[..., LENGTHS.index(200)].mean(1)
        bounds = [
            np.percentile(values[self.draws].mean(1), (2.5, 97.5)) for values in (saved, points, better)
        ]
        return {
            "rule": name,
            "kept": EPOCHS[picks.kept].mean(),
            "saved": saved.mean(),
            "saved_low": bounds[0][0],
            "saved_high": bounds[0][1],
            "run": EPOCHS[picks.run].mean(),
            "points": points.mean(),
            "points_low": bounds[1][0],
            "points_high": bounds[1][1],
            "against_200": better.mean(),
            "against_200_low": bounds[2][0],
            "against_200_high": bounds[2][1],
            "meets": self.meets(picks, np.ones(len(saved), bool)),
        }


def out_of_sample(judge: Judge, candidates: dict[str, Picks], held_out: str) -> tuple[Picks, dict[str, str]]:
    """For each group of cells, the picks of the candidate that is best on all other groups; and which that was."""
    groups = judge.released.group(held_out)
    kept, run = (np.zeros(len(groups), int) for _ in range(2))
    chosen = {}
    for name in np.unique(groups):
        inside = groups == name
        # Of several that are equally sure, the one that loses least.
        best = max(
            candidates,
            key=lambda key: (
                judge.meets(candidates[key], ~inside),
                judge.by_cell(candidates[key])[1][~inside].mean(),
            ),
        )
        kept[inside], run[inside] = candidates[best].kept[inside], candidates[best].run[inside]
        chosen[str(name)] = best
    return Picks(kept, run), chosen


def correlations(released: Released, variant: Variant) -> list[dict[str, Any]]:
    """Pearson, Kendall and weighted tau between goodness and Dice over the nine lengths, in each of the 36 cells."""
    rows = []
    for number, cell in enumerate(released.cells):
        for mode, name in enumerate(("fine-tuned", "frozen")):
            score, dice = released.goodness[variant][number], released.dice[number, mode]
            values = {
                "pearson": scipy.stats.pearsonr(score, dice)[0],
                "kendall": scipy.stats.kendalltau(score, dice)[0],
                "weighted_tau": scipy.stats.weightedtau(score, dice)[0],
            }
            rows.append({"variant": str(variant), "cell": "/".join((*cell, name)), **values})
    return rows


def mean_correlation(judge: Judge, rows: Sequence[dict[str, Any]], name: str) -> tuple[float, float, float]:
    """Mean over cells with its interval."""
    values = np.asarray([row[name] for row in rows]).reshape(-1, 2).mean(1)
    low, high = np.percentile(values[judge.draws].mean(1), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


PUBLISHED = (
    DEFAULT,
    Variant("cosine_distance", 0.5, True, 1),
    Variant("cosine_distance", 0.5, False, 1),
    Variant("inv_pearson_corr", 0.5, False, 1),
)


def measure(folder: Path, resamples: int) -> dict[str, Any]:
    """Everything that is printed."""
    released = load(folder)
    judge = Judge(released, resamples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
        cells = {variant: correlations(released, variant) for variant in PUBLISHED}
    table = [judge.row(f"arg-best: {variant}", arg_best(released.goodness[variant])) for variant in PUBLISHED]
    table += [
        judge.row(f"always {LENGTHS[index]}", fixed(released, index)) for index in range(3, len(LENGTHS))
    ]
    gain = released.gain
    oracle_points = gain.max(2).mean(1)
    oracle_saved = 1 - SHARES[gain.argmax(2)].mean(1)
    chosen = {}
    for family, candidates in families(released).items():
        for held_out in ("dataset", "encoder", "cell"):
            picks, which = out_of_sample(judge, candidates, held_out)
            name = f"{family}; chosen on other {held_out}s"
            table.append(judge.row(name, picks))
            chosen[name] = which if held_out != "cell" else dict.fromkeys(which.values(), "")
    return {
        "correlations": {
            str(variant): {
                name: mean_correlation(judge, rows, name) for name in ("pearson", "kendall", "weighted_tau")
            }
            for variant, rows in cells.items()
        },
        "cells": [row for rows in cells.values() for row in rows],
        "rules": table,
        "oracle": {"points": float(oracle_points.mean()), "saved": float(oracle_saved.mean())},
        "chosen": chosen,
    }


def show(found: dict[str, Any]) -> None:
    """Prints the tables."""
    print("mean over 36 cells of the correlation of -score with Dice [95% interval]")
    for variant, values in found["correlations"].items():
        shown = "   ".join(
            f"{name} {mean:.2f} [{low:.2f}, {high:.2f}]" for name, (mean, low, high) in values.items()
        )
        print(f"  {variant:52} {shown}")
    print(
        f"{'rule':80} {'kept':>5} {'run':>4} {'saved':>16}  {'points against 300':>20}  {'against always 200':>20}  meets"
    )
    for row in found["rules"]:
        saved = f"{row['saved']:.0%} [{row['saved_low']:.0%}, {row['saved_high']:.0%}]"
        points = f"{row['points']:+.2f} [{row['points_low']:+.2f}, {row['points_high']:+.2f}]"
        other = f"{row['against_200']:+.2f} [{row['against_200_low']:+.2f}, {row['against_200_high']:+.2f}]"
        numbers = (
            f"{row['kept']:5.0f} {row['run']:4.0f} {saved:>16}  {points:>20}  {other:>20}  {row['meets']:.2f}"
        )
        print(f"{row['rule']:80} {numbers}")
    print(f"oracle: {found['oracle']['points']:+.2f} points, {found['oracle']['saved']:.0%} saved")


def main(arguments: Sequence[str] | None = None) -> int:
    """Computes, prints and keeps the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, help="folder of the released CSV files")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--csv", type=Path, help="file for the table of rules")
    parser.add_argument("--resamples", type=int, default=10000)
    options = parser.parse_args(arguments)
    try:
        found = measure(options.reference, options.resamples)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    show(found)
    if options.json:
        about = {"python": platform.python_version(), "numpy": np.__version__}
        options.json.write_text(json.dumps({**about, **found}, indent=1, default=float) + "\n")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for row in found["rules"]:
                writer.writerow([row[key] if key == "rule" else f"{row[key]:.4f}" for key in COLUMNS])
    return 0


if __name__ == "__main__":
    sys.exit(main())
