"""Linear heads: the same scores as scikit-learn on three real sets, and the time of many against that of one.

    python -m benchmarks.heads --agreement --data ../shared/data --csv benchmarks/results/heads.csv

*Agreement*: features of an ImageNet EfficientNet-Lite0 of three sets, five folds by patient. `AUC` is that of
`training.linear_head`, with the strength that inner folds choose; `scikit-learn` that of `LogisticRegression` on
features that `StandardScaler` has scaled, over the same folds, inner folds and strengths, in float64. `seconds`
is the time of all heads, compiled before.

*Cost*: 10 seeds x 5 folds x 9 strengths on random features with a weak signal, against one scikit-learn head of
the same features at the middle strength, and the same with five inner folds, as a study runs them.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

import dapt_jax as dj
from benchmarks import common
from dapt_jax.data import near_duplicates
from dapt_jax.data.splits import grouped_folds
from dapt_jax.losses import make
from dapt_jax.main import set_up_jax
from dapt_jax.runtime import allocator
from dapt_jax.settings.training import HeadSettings
from dapt_jax.training import linear_head

CLASSES = 3
STRENGTHS = HeadSettings().strengths
TYPES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil")
SETS: dict[str, dict[str, object]] = {
    "blood cells": {
        "path": "wbc/manifest.csv", "where": "source=dataset1", "classes": TYPES, "drop_classes": ("basophil",),
    },
    "brain MRI": {"path": "brain_mri/manifest.csv", "where": "split=dev"},
    "chest radiographs": {"path": "cxr/manifest.csv", "where": "split=dev"},
}  # fmt: skip


def inner_folds(labels: np.ndarray, groups: np.ndarray, rows: np.ndarray) -> linear_head.Inner:
    """Five inner folds of a fold's training rows."""
    parts = grouped_folds(labels[rows], groups[rows], 5, 0)
    return [(rows[fit], rows[held]) for fit, held in parts]


def scikit_learn(
    features: np.ndarray, labels: np.ndarray, rows: np.ndarray, strength: float
) -> tuple[StandardScaler, LogisticRegression]:
    """Scaler and head of some rows, of the strength as `linear_head.fit` defines it."""
    x = features[rows].astype(np.float64)
    scaler = StandardScaler().fit(x)
    scaler.scale_ = np.where(x.std(0) > 1e-6, x.std(0), np.inf)
    penalty = len(rows) * strength * np.isfinite(scaler.scale_).sum()
    c = (2 if labels.max() == 1 else 1) / penalty
    return scaler, LogisticRegression(C=c, max_iter=5000).fit(scaler.transform(x), labels[rows])


def chosen_by_scikit_learn(
    features: np.ndarray, labels: np.ndarray, rows: np.ndarray, inner: linear_head.Inner
) -> np.ndarray:
    """Probabilities of all rows by a head whose strength the inner folds choose by their log-loss."""
    losses = np.zeros(len(STRENGTHS))
    for fit, held in inner:
        for number, strength in enumerate(STRENGTHS):
            scaler, head = scikit_learn(features, labels, fit, strength)
            said = head.predict_proba(scaler.transform(features[held]))
            losses[number] += log_loss(labels[held], said, labels=head.classes_) * len(held)
    scaler, head = scikit_learn(features, labels, rows, STRENGTHS[losses.argmin()])
    return head.predict_proba(scaler.transform(features))


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean AUC of each class against the rest."""
    return float(
        np.mean([roc_auc_score(labels == each, probabilities[:, each]) for each in range(labels.max() + 1)])
    )


def agreement(name: str, folder: Path) -> common.Row:
    """Scores of one real set by both."""
    spec = {**SETS[name], "path": str(folder / str(SETS[name]["path"]))}
    data = dj.load_dataset("manifest", image_size=96, **spec)
    features = dj.extract_features(dj.load_encoder("efficientnet_lite0", weights="imagenet"), data)
    labels, groups = data.labels, near_duplicates.merged(data).groups
    folds = grouped_folds(labels, groups, 5, 0)
    splits = [rows for rows, _ in folds]
    inner = [inner_folds(labels, groups, rows) for rows in splits]
    objective = make(classes=len(data.classes))
    linear_head.fit(features, labels, splits, inner, objective, STRENGTHS)
    start = time.perf_counter()
    heads = linear_head.fit(features, labels, splits, inner, objective, STRENGTHS)
    seconds = time.perf_counter() - start
    ours = heads.probabilities(features)
    start = time.perf_counter()
    theirs = [chosen_by_scikit_learn(features, labels, *each) for each in zip(splits, inner, strict=True)]
    their_seconds = time.perf_counter() - start
    scores = [
        np.mean([auc(labels[held], of[fold][held]) for fold, (_, held) in enumerate(folds)])
        for of in (ours, theirs)
    ]
    return {
        "what": name, "rows": len(labels), "features": features.shape[1], "heads": 5 * (5 * len(STRENGTHS) + 1),
        "AUC": scores[0], "scikit-learn": scores[1], "difference": abs(scores[0] - scores[1]),
        "seconds": seconds, "scikit-learn s": their_seconds, "GFLOP": heads.flops / 1e9,
    }  # fmt: skip


def random_data(rows: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [rows, features] with a weak signal, and labels [rows]."""
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=rows).astype(np.int32)
    x = rng.standard_normal((rows, features), np.float32)
    x[:, :CLASSES] += np.eye(CLASSES, dtype=np.float32)[labels]
    return x, labels


def cost(options: argparse.Namespace) -> list[common.Row]:
    """Times of one head, of all, and of all with their inner folds."""
    features, labels = random_data(options.rows, options.features)
    groups = np.arange(len(labels)).astype(str)
    splits = [
        train
        for seed in range(options.seeds)
        for train, _ in grouped_folds(labels, groups, options.folds, seed)
    ]
    objective = make(classes=CLASSES)
    # A fold that is its own only inner fold: each strength once, and the best of them again.
    path: list[linear_head.Inner] = [[(rows, rows)] for rows in splits]
    nested = [inner_folds(labels, groups, rows) for rows in splits] if options.nested else []

    def one() -> int:
        scikit_learn(features, labels, splits[0], STRENGTHS[len(STRENGTHS) // 2])
        return 0

    def many(inner: list[linear_head.Inner]) -> int:
        heads = linear_head.fit(features, labels, splits, inner, objective, STRENGTHS)
        jax.block_until_ready(heads.kernel)
        return heads.flops

    runs = [("one head, scikit-learn", 1, one), (f"{len(splits)} folds x {len(STRENGTHS)} strengths",
            len(splits) * len(STRENGTHS), lambda: many(path))]  # fmt: skip
    if nested:
        heads = len(splits) * (5 * len(STRENGTHS) + 1)
        runs.append((f"{len(splits)} folds, nested", heads, lambda: many(nested)))
    rows: list[common.Row] = []
    for what, heads, run in runs:
        seconds, work = [], 0
        for number in range(options.rounds + 1):
            start = time.perf_counter()
            work = run()
            seconds += [time.perf_counter() - start] if number else []
        middle = common.middle(seconds)
        first = rows[0]["seconds"] if rows else middle
        rows.append(
            {
                "what": what, "rows": options.rows, "features": options.features, "heads": heads,
                "seconds": middle, "times one": middle / float(first), "GFLOP": work / 1e9,
            }
        )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--agreement", action="store_true", help="the real sets as well")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--nested", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    set_up_jax()
    rows = [agreement(name, Path(options.data)) for name in SETS] if options.agreement else []
    rows += cost(options)
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name, "") for name in names} for row in rows]
    common.report(options, f"linear heads on frozen features; medians of {options.rounds} rounds", rows)


if __name__ == "__main__":
    allocator.restart_with_settings()
    main()
