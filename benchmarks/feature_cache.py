"""What a cached prefix costs and saves, boundary by boundary.

    python -m benchmarks.feature_cache --json out.json

A boundary lies below the first group that trains. `fill` computes its activations for all images once;
`cached` and `uncached` are one training step of what lies above it, from activations in memory and from
images. `break even` is the number of epochs after which filling has paid for itself: fill / (uncached -
cached epoch). By FLOPs it is 1 everywhere, since to fill is to run the prefix once over the images, as every
uncached epoch does. `disk ms` is what reading a batch of activations from files adds to a cached step (the
files are young, so the system may still have them in memory), and `FLOP per byte` how much forward work takes
as long as reading one byte: `cache.flops_per_byte`.
"""

import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import common, our_step
from dapt_jax.main import set_up_jax
from dapt_jax.models.classifier import HEAD
from dapt_jax.runtime import allocator
from dapt_jax.training import accounting
from dapt_jax.training.cache.store import ActivationCache, Prefix

LAST, POOLED = "last block", "pooled"
PLACES = ("quarter", "half", "three quarters", LAST, POOLED)


def boundary(model: str, place: str) -> int:
    """Groups below a place in a model."""
    groups = our_step.program(model, (HEAD,)).model.encoder.groups
    if place == POOLED:
        return len(groups)
    if place == LAST:
        return groups.index(our_step.trained_by(model, our_step.LAST)[0])
    return round(len(groups) * (PLACES.index(place) + 1) / 4)


def measure(
    model: str, place: str, corpus: tuple[object, str], batch: int, steps: int, rounds: int
) -> common.Row:
    """Times filling, and one step with and without the cache."""
    dataset, _ = corpus
    size, count = dataset.images.size, len(dataset)
    groups = our_step.program(model, (HEAD,)).model.encoder.groups
    made = our_step.program(model, (*groups[boundary(model, place) :], HEAD))
    params, batch_stats = jax.device_put(made.model.init(0))
    prefix = Prefix.of(made, 1)
    ActivationCache(1 << 40).get(prefix, params, batch_stats, dataset.images.take(range(1)))  # compiles
    fills, reads = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        kept = ActivationCache(1 << 40).in_memory(prefix, params, batch_stats, dataset.images)
        jax.block_until_ready(kept.x)
        fills.append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        store = ActivationCache.open(0, 1 << 40, Path(folder), "", print)
        filed = store.get(prefix, params, batch_stats, dataset.images, "disk")
        assert filed is not None
        order = np.random.default_rng(0).permutation(count)
        for start_row in range(0, count - batch + 1, batch):
            start = time.perf_counter()
            jax.block_until_ready(jax.device_put(filed.rows(0, order[start_row : start_row + batch])))
            reads.append(time.perf_counter() - start)
    cached, whole = (our_step.Step(made, size, batch, kind) for kind in ("cached", "whole"))
    times = [(cached.seconds(steps), whole.seconds(steps)) for _ in range(rounds)]
    step, uncached = (common.middle(each) for each in zip(*times, strict=True))
    cost = accounting.image_cost(made, size)
    return {
        "model": model,
        "boundary below": (*groups, HEAD)[made.mask.boundary],
        "images": count,
        "MiB": kept.nbytes / 2**20,
        "fill s": common.middle(fills),
        "fill images/s": count / common.middle(fills),
        "disk ms": 1000 * common.middle(reads),
        "cached ms": 1000 * step,
        "uncached ms": 1000 * uncached,
        "times faster": uncached / step,
        "FLOP ratio": (cost.prefix.model + cost.suffix.model) / cost.suffix.model,
        "break even epochs": common.middle(fills) / ((uncached - step) * count / batch),
        "FLOP per byte": (kept.flops / common.middle(fills))
        / (kept.nbytes / count * batch / common.middle(reads)),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures every boundary and prints the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--models", default="resnet50,efficientnet_lite0")
    parser.add_argument("--places", default=",".join(PLACES), help="where boundaries lie")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="per round")
    options = parser.parse_args(arguments)
    set_up_jax()
    corpus = common.images_of(options.data, options.images, options.size)
    rows = [
        measure(model, place, corpus, options.batch, options.steps, options.rounds)
        for model in common.words(options.models)
        for place in common.words(options.places)
    ]
    title = f"feature cache: {corpus[1]}, {options.size} px, batch {options.batch}; medians of {options.rounds} rounds"
    common.report(options, title, rows, images=corpus[1])


if __name__ == "__main__":
    allocator.restart_with_settings()
    main()
