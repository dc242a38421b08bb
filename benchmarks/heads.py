"""All linear heads of a task at once, 10 seeds x 5 folds x 9 settings, against ONE of them by the plain loop.

    python -m benchmarks.heads --json out.json

Features are random with a weak signal. The plain loop is one jitted step of `optax.adamw` per batch, batches
gathered on the host; `training.head_sweep` trains all heads in one program. The first run of each compiles
and is left out. `times one` is the time in that of the one head; `differs by` compares that head's kernel
with the same head of the many.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from dapt_jax.data.pipeline import Order
from dapt_jax.data.splits import grouped_folds
from dapt_jax.losses import ClassificationLoss
from dapt_jax.losses.cross_entropy import CrossEntropy
from dapt_jax.main import set_up_jax
from dapt_jax.runtime import allocator
from dapt_jax.training import head_sweep

CLASSES = 3
LRS, DECAYS = (1e-4, 3e-4, 1e-3), (0.0, 1e-4, 1e-2)


def data(rows: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [rows, features] and labels [rows]."""
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=rows).astype(np.int32)
    x = rng.standard_normal((rows, features), np.float32)
    x[:, :CLASSES] += np.eye(CLASSES, dtype=np.float32)[labels]
    return x, labels


def plain_loop(
    features: np.ndarray,
    labels: np.ndarray,
    split: head_sweep.Split,
    settings: head_sweep.HeadSettings,
    point: head_sweep.HyperParams,
) -> Any:
    """One head, step by step.

    Returns:
        Its parameters, kernel (inputs, outputs).
    """
    tx, step = _adamw(settings.objective, point)
    mean, spread = features[split.rows].mean(0), features[split.rows].std(0)
    x = (features - mean) / spread
    params = {"kernel": jnp.zeros((features.shape[1], CLASSES)), "bias": jnp.zeros(CLASSES)}
    order, state = Order(tuple(map(int, split.rows)), settings.batch_size, split.order), tx.init(params)
    for epoch in range(settings.epochs):
        for rows, weights in zip(*order.epoch(epoch), strict=True):
            params, state = step(params, state, x[rows], labels[rows], weights)
    return jax.block_until_ready(params)


@functools.cache
def _adamw(
    objective: ClassificationLoss, point: head_sweep.HyperParams
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """The optimizer, and its jitted step."""
    tx = optax.adamw(point.lr, weight_decay=point.weight_decay, mask={"kernel": True, "bias": False})

    def step(params: Any, state: Any, x: Any, y: Any, weights: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.sum(objective(x @ params["kernel"] + params["bias"], y) * weights) / weights.sum()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return tx, jax.jit(step)


def measure(options: argparse.Namespace) -> list[common.Row]:
    """Times both."""
    features, labels = data(options.rows, options.features)
    settings = head_sweep.HeadSettings(
        (), CrossEntropy(CLASSES), options.epochs, options.batch, standardise=True
    )
    points = [head_sweep.HyperParams(lr, decay) for lr, decay in itertools.product(LRS, DECAYS)][
        : options.points
    ]
    splits: list[head_sweep.Split] = []
    for seed in range(options.seeds):
        folds = grouped_folds(labels, np.arange(len(labels)).astype(str), options.folds, seed)
        splits += head_sweep.of_folds([train for train, _ in folds], seed)
    many_s, one_s = [], []
    for number in range(options.rounds + 1):
        start = time.perf_counter()
        one = plain_loop(features, labels, splits[0], settings, points[0])
        middle = time.perf_counter()
        many = head_sweep.train(features, labels, splits, settings, [points] * len(splits))
        jax.block_until_ready(many.params)
        if number:
            one_s.append(middle - start)
            many_s.append(time.perf_counter() - middle)
    off = np.abs(np.asarray(many.params["layer0"]["kernel"][0, 0]).T - np.asarray(one["kernel"])).max()
    ratios = [a / b for a, b in zip(many_s, one_s, strict=True)]
    per_head = (
        len(splits[0].rows)
        * options.epochs
        * head_sweep.flops_per_image(options.features, (), settings.objective)
    )
    shared = {"rows": options.rows, "features": options.features, "epochs": options.epochs}
    return [
        {
            "what": "one head, plain loop", "heads": 1, **shared, "s": common.middle(one_s),
            "GFLOP": per_head / 1e9, "times one": 1.0, "lowest": 1.0, "highest": 1.0, "differs by": 0.0,
        },
        {
            "what": f"{options.seeds} seeds x {options.folds} folds x {len(points)} settings",
            "heads": len(splits) * len(points), **shared, "s": common.middle(many_s), "GFLOP": many.flops / 1e9,
            "times one": common.middle(ratios), "lowest": min(ratios), "highest": max(ratios), "differs by": float(off),
        },
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--points", type=int, default=9, help="rates x weight decays, at most 9")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args(arguments)
    set_up_jax()
    rows = measure(options)
    common.report(options, f"heads on frozen features; medians of {options.rounds} rounds", rows)


if __name__ == "__main__":
    allocator.restart_with_settings()
    main()
