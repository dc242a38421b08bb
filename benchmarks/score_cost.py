"""What the label-based transferability scores cost, beside the same scores in textbook numpy, on one machine.

    python -m benchmarks.score_cost --json score_cost.json

Synthetic features of 10,000 images in 100 classes, 2,048 each, with a spectrum that falls off as those of
trained networks do, and 1,000 source classes. Each score is computed once; what scores share is charged to
the first that needs it, and compilation to the score that compiles. Both sides read float32 features, as a
network gives them.
"""

import argparse
import csv
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy
import sklearn

from benchmarks import textbook_scores
from dapt_jax.cost import hardware
from dapt_jax.transferability.registry import Sample, evaluate


def material(images: int, features: int, classes: int, source: int, seed: int = 0) -> Sample:
    """Features whose directions have variances 1/k, class means along the first of them, and source probabilities.

    Of 2,048 directions 397 hold 80% of the variance, so that NLEEP fits its mixture in 397 dimensions.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(images) % classes)
    scales = 1 / np.sqrt(np.arange(1, features + 1))
    values = (
        0.7 * rng.normal(size=(classes, features))[labels] + rng.normal(size=(images, features))
    ) * scales
    rotation = np.linalg.qr(rng.normal(size=(features, features)))[0]
    logits = 3 * rng.normal(size=(classes, source))[labels] + rng.normal(size=(images, source))
    theta = np.exp(logits - logits.max(1, keepdims=True))
    return Sample(
        (values @ rotation + 0.5).astype(np.float32), labels, source=(theta / theta.sum(1, keepdims=True))
    )


def measure(sample: Sample) -> list[dict[str, Any]]:
    """Seconds and value of every score on both sides."""
    assert sample.labels is not None
    rows = []
    for name in textbook_scores.SCORES:
        start = time.perf_counter()
        outcome = evaluate([name], sample)[name]
        rows.append({"score": name, "seconds": time.perf_counter() - start, "value": outcome.value})
    for row in rows:
        of_source = row["score"] in ("leep", "nce")
        given = sample.source if of_source else sample.features
        start = time.perf_counter()
        row["textbook_value"] = textbook_scores.SCORES[row["score"]](
            np.asarray(given, np.float64), sample.labels
        )
        row["textbook_seconds"] = time.perf_counter() - start
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--csv", type=Path, help="file for the table")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--source", type=int, default=1000, help="source classes")
    options = parser.parse_args(arguments)
    rows = measure(material(options.images, options.features, options.classes, options.source))
    about = {
        "machine": hardware.describe().kind,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (jax, np, scipy, sklearn)},
    }
    print(
        f"{options.images:,} x {options.features:,}, {options.classes} classes; {about['cores']} cores, {about['machine']}"
    )
    print(f"{'score':20} {'seconds':>8} {'textbook':>9} {'value':>12} {'textbook':>12}")
    for row in rows:
        print(
            f"{row['score']:20} {row['seconds']:8.2f} {row['textbook_seconds']:9.2f} {row['value']:12.6g} "
            f"{row['textbook_value']:12.6g}"
        )
    ours, theirs = (sum(row[key] for row in rows) for key in ("seconds", "textbook_seconds"))
    print(f"{'all':20} {ours:8.2f} {theirs:9.2f}   textbook / ours {theirs / ours:.2f}")
    if options.json:
        options.json.write_text(
            json.dumps({**about, "rows": rows, "seconds": ours, "textbook": theirs}, indent=1) + "\n"
        )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *about])
            writer.writeheader()
            writer.writerows({**row, **about} for row in rows)


if __name__ == "__main__":
    main()
