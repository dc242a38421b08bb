"""The seven arms of arXiv 2204.13280 at a small scale: dapt_jax with its cache, without it, and PyTorch.

    python -m benchmarks.paper_protocol --json out.json

The paper's epochs (1,000 of the head, then 150; hybrids 100 and 50) divided by `--divide`; its batch of 16,
Adam, rates of 1e-4 and 1e-5, frozen batch norm, no augmentation. ResNet-50 with random weights whose
batch-norm statistics are those of the corpus; images are as many of each class, split by patient. All three
sides start from the same weights and see the same batches in the same order, so their scores (macro AUC on
the held-out images) have to agree. dapt_jax runs its real loop, data reading included; PyTorch has all images
decoded in memory. Each arm stands alone: nothing is reused between arms.

`wall` is all seconds, compilation included: every arm of dapt_jax runs in a process of its own that finds no
compiled program, what a user waits for at first. `compile` is that part of it, which the paper's fifty times
longer run would not notice, and `ratio` leaves it out. Figures are medians over `--rounds`, in which the sides
take turns; `lowest` and `highest` are those of the ratio with compiling. FLOPs are model FLOPs; PyTorch's are
those of the same mathematics without a cache. Energy is that of `cost.energy`.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, sides
from dapt_jax.runtime import allocator

MODULE = "benchmarks.paper_protocol"
CACHED, UNCACHED, THEIRS = "cached", "uncached", "torch"
CACHE_MODES = {CACHED: "auto", UNCACHED: "off"}
ARMS = ("full", "l1sb", "l2sb", "l1sb_pft", "l2sb_pft", "f1b", "f2b")


def strategy(model: str, arm: str, divide: int) -> Any:
    """An arm as `configs/mehmood2022.py` has it, for any residual network, its epochs divided.

    Returns:
        `dapt_jax.study.strategies.Strategy`.
    """
    from dapt_jax.models import registry
    from dapt_jax.models.classifier import HEAD
    from dapt_jax.study.built_in_strategies import last_groups
    from dapt_jax.study.strategies import Strategy
    from dapt_jax.training.phases import Phase

    encoder = registry.build(model)
    if arm.startswith("f"):
        stage = {"f1b": "stage1/", "f2b": "stage2/"}.get(arm, "stage4/")
        encoder = encoder.truncate([group for group in encoder.groups if group.startswith(stage)][-1])
    partial = (*last_groups(encoder, 2 if arm.startswith("l2") else 1), HEAD)

    def phase(name: str, epochs: int, trained: tuple[str, ...], lr: float = 1e-5) -> Phase:
        return Phase(name, max(1, epochs // divide), trained, lr, augment=False)

    head = phase("head", 1000, (HEAD,), 1e-4)
    if arm.endswith("_pft"):
        return Strategy(
            arm, encoder, (head, phase("partial", 100, partial), phase("full", 50, ("*",))), "random"
        )
    later = phase("partial", 150, partial) if arm.startswith("l") else phase("full", 150, ("*",))
    return Strategy(arm, encoder, (head, later), "random")


def make_run(options: common.Row, arm: str, dataset: Any, cache: str) -> Any:
    """The run of an arm on all images of a corpus, as a study would make it."""
    from dapt_jax.settings import default, resolve
    from dapt_jax.study import runs

    config = default()
    config.adapt.batch_size, config.adapt.balance_classes = options["batch"], False
    config.cache.mode, config.corpus.val_fraction = cache, 0.0
    return runs.adaptation_run(
        resolve(config), strategy(options["model"], arm, options["divide"]), 0, dataset
    )


def calibrated(model: Any, images: np.ndarray) -> tuple[Any, Any]:
    """Random parameters, and the statistics that batch norm sees with them on a batch of images.

    Without these, activations would grow from block to block, for frozen batch norm would normalise nothing.
    """
    import jax

    from dapt_jax.models.encoders.resnet import TORCHVISION

    params, batch_stats = model.init(0)
    x = model.prefix(params, batch_stats, jax.numpy.asarray(images), 0)
    _, moved = jax.jit(lambda p, s, x: model.encoder.apply(p, s, x, batch_norm="train"))(
        params, batch_stats, x
    )
    kept = TORCHVISION.momentum
    return params, jax.tree.map(
        lambda old, new: (np.asarray(new) - kept * old) / (1 - kept), batch_stats, moved
    )


def _prepare(options: argparse.Namespace, folder: Path) -> tuple[common.Row, Any, Any]:
    """Puts images, weights and order of every arm into a folder, for all sides; returns corpus and held-out images too."""
    from dapt_jax.data.splits import grouped_holdout
    from dapt_jax.weights import export

    dataset, what = common.images_of(options.data, options.images, options.size)
    train, test = grouped_holdout(dataset.labels, dataset.groups, 0.25, 0)
    shared = {
        "model": options.model, "divide": options.divide, "batch": options.batch, "folder": str(folder), "what": what,
        "size": options.size, "classes": dataset.classes,
    }  # fmt: skip
    corpus, held_out = dataset.take(train), dataset.take(test)
    images, seen = (part.images.batch(np.arange(len(part))) for part in (corpus, held_out))
    np.savez(folder / "corpus.npz", images=images, labels=corpus.labels, groups=corpus.groups, held_out=seen)
    for arm in common.words(options.arms):
        run = make_run(shared, arm, corpus, "off")
        params, batch_stats = calibrated(run.programs[0].model, images[:64])
        export.write(folder / f"{arm}.npz", params, batch_stats)
        _write_for_torch(folder, arm, run, params, batch_stats)
    return shared, corpus, held_out


def _write_for_torch(folder: Path, arm: str, run: Any, params: Any, batch_stats: Any) -> None:
    """Weights under their torch names and in its layout, and per phase the names that train and the batches."""
    from benchmarks import our_step
    from dapt_jax.weights.paths import flatten

    names = our_step.torch_names(run.programs[0])
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    arrays = (flatten(params) | flatten(batch_stats)).items()
    np.savez(
        folder / f"{arm}-torch.npz", **{names[path]: np.transpose(a, axes[np.ndim(a)]) for path, a in arrays}
    )
    phases, first = [], 0
    for program in run.programs:
        epochs = [run.order.epoch(first + number) for number in range(program.phase.epochs)]
        first += program.phase.epochs
        phases.append(
            {
                "names": sorted(names[path] for path in program.mask.trainable),
                "lr": program.phase.lr,
                "epochs": [(rows.tolist(), weights.tolist()) for rows, weights in epochs],
            }
        )
    last = run.programs[0].model.encoder.groups[-1]
    keep = 0 if last.startswith("stage4") else int(last.removeprefix("stage")[0])
    (folder / f"{arm}-torch.json").write_text(json.dumps({"phases": phases, "keep": keep}))


def _our_side(options: common.Row) -> None:
    """Serves arms run by dapt_jax's own loop."""
    from dapt_jax.data.dataset import Dataset
    from dapt_jax.data.decode import ImageStore
    from dapt_jax.main import set_up_jax
    from dapt_jax.training import loop
    from dapt_jax.training.cache.store import ActivationCache
    from dapt_jax.training.context import RunContext
    from dapt_jax.training.evaluate import forward_fn
    from dapt_jax.weights import locate

    set_up_jax()
    folder = Path(options["folder"])
    corpus = np.load(folder / "corpus.npz")
    images = ImageStore.from_arrays(corpus["images"], options["size"])
    dataset = Dataset("corpus", images, corpus["labels"], tuple(options["classes"]), corpus["groups"])

    def measure(what: Any) -> common.Row:
        arm, cache = what
        run = make_run(options, arm, dataset, cache)
        model = run.programs[0].model
        params, batch_stats, _ = locate.load(str(folder / f"{arm}.npz"), model, seed=0)
        context = RunContext(cache=ActivationCache(4 << 30))
        start = time.perf_counter()
        trained = loop.train(run, params, batch_stats, context)
        wall = time.perf_counter() - start
        rows = trained.costs
        logits = forward_fn(model, None)(trained.params, trained.batch_stats, corpus["held_out"])
        return {
            "wall_s": wall,
            "compile_s": sum(row.compile_s for row in rows),
            "cache_s": sum(row.cache_s for row in rows),
            "flops": sum(row.model_flops for row in rows),
            "kwh": sum(row.energy_kwh for row in rows),
            "energy_source": rows[0].energy_source,
            "logits": np.asarray(logits).tolist(),
        }

    sides.serve(measure)


def _torch_side(options: common.Row) -> None:
    """Serves arms run by PyTorch."""
    from benchmarks import torch_side
    from dapt_jax.cost import hardware
    from dapt_jax.cost.energy import EnergyMeter

    folder = Path(options["folder"])
    corpus = np.load(folder / "corpus.npz")
    images, labels, held_out = (corpus[name] for name in ("images", "labels", "held_out"))

    def measure(arm: str) -> common.Row:
        about = json.loads((folder / f"{arm}-torch.json").read_text())
        made = torch_side.network(options["model"], len(options["classes"]), about["keep"])
        arrays = np.load(folder / f"{arm}-torch.npz")
        torch_side.fill(made, {name: arrays[name] for name in arrays.files})
        meter = EnergyMeter(hardware.lookup("cpu", 1, "cpu"))
        meter.start()
        start = time.perf_counter()
        trainer = torch_side.Trainer(made)
        for phase in about["phases"]:
            trainer.train_only(phase["names"], phase["lr"])
            for indices, weights in phase["epochs"]:
                for rows, weight in zip(indices, weights, strict=True):
                    trainer.step(images[rows], labels[rows], np.asarray(weight, np.float32))
        wall = time.perf_counter() - start
        kwh, source = meter.stop()
        logits = trainer.forward(held_out)
        return {
            "wall_s": wall,
            "compile_s": 0.0,
            "kwh": kwh,
            "energy_source": source,
            "logits": logits.tolist(),
        }

    sides.serve(measure)


def _measure(options: argparse.Namespace, folder: Path) -> tuple[list[common.Row], str]:
    from dapt_jax import metrics

    shared, corpus, held_out = _prepare(options, folder)

    def score(logits: Any) -> float:
        values = np.exp(np.asarray(logits) - np.max(logits, axis=1, keepdims=True))
        probabilities = values / values.sum(1, keepdims=True)
        return metrics.classification(held_out.labels, probabilities, held_out.classes)[0].value

    rows, names = [], common.words(options.sides)
    if THEIRS in names and not common.has_torch():
        names.remove(THEIRS)
    with contextlib.ExitStack() as stack:
        if THEIRS in names:
            theirs = stack.enter_context(sides.Side(MODULE, {**shared, "side": THEIRS}))
        for arm in common.words(options.arms):
            planned = make_run(shared, arm, corpus, "off").flops()
            found: dict[str, list[common.Row]] = {name: [] for name in names}
            for number in range(options.rounds):
                for name in names[:: 1 if number % 2 == 0 else -1]:
                    measured = theirs.measure(arm) if name == THEIRS else _afresh(shared, arm, name)
                    found[name].append({"flops": planned, **measured})
            base = found[THEIRS if THEIRS in found else names[-1]]
            for name, rounds in found.items():
                rows.append({"arm": arm, "side": name, **_row(rounds, base, score)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows, shared["what"]


def _afresh(shared: common.Row, arm: str, name: str) -> common.Row:
    """Runs an arm in a process of its own that finds no compiled program, as the first run of a user does."""
    with tempfile.TemporaryDirectory() as empty:
        own = {**os.environ, **allocator.settings(os.environ), "XDG_CACHE_HOME": empty}
        own.pop("JAX_COMPILATION_CACHE_DIR", None)
        with sides.Side(MODULE, {**shared, "side": "dapt_jax"}, own) as side:
            return side.measure((arm, CACHE_MODES[name]))


def _row(rounds: list[common.Row], base: list[common.Row], score: Callable[[Any], float]) -> common.Row:
    """Returns medians over the rounds of a side, and of its ratios to another side round by round."""

    def median(key: str) -> float:
        return common.middle(each[key] for each in rounds)

    def ratio(*keys: str) -> list[float]:
        seconds = (
            [each[keys[0]] - sum(each[key] for key in keys[1:]) for each in side] for side in (base, rounds)
        )
        return [their / own for their, own in zip(*seconds, strict=True)]

    waited = ratio("wall_s")
    last = rounds[-1]
    return {
        "wall s": median("wall_s"),
        "compile s": median("compile_s"),
        "TFLOP": last["flops"] / 1e12,
        "Wh": 1000 * median("kwh"),
        "energy from": last["energy_source"],
        "AUC": score(last["logits"]),
        "logits differ by": float(np.abs(np.subtract(last["logits"], base[-1]["logits"])).max()),
        "ratio": common.middle(ratio("wall_s", "compile_s")),
        "ratio with compile": common.middle(waited),
        "lowest": min(waited),
        "highest": max(waited),
        "FLOP ratio": base[-1]["flops"] / last["flops"],
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs the arms and prints the table."""
    parser = common.parser(__doc__, rounds=1)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--model", default="resnet50", help="a residual network of torchvision's layout")
    parser.add_argument("--images", type=int, default=320, help="a quarter of them is held out")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--divide", type=int, default=50, help="the paper's epochs by this")
    parser.add_argument(
        "--sides", default=f"{CACHED},{UNCACHED},{THEIRS}", help="ratios are to the last of them"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        side = json.loads(options.side)
        (_torch_side if side["side"] == THEIRS else _our_side)(side)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows, what = _measure(options, Path(folder))
    title = f"paper protocol / {options.divide}: {options.model}, {options.images} images ({what}), {options.size} px"
    common.report(options, f"{title}; ratio to PyTorch", rows, images=what)


if __name__ == "__main__":
    allocator.restart_with_settings()
    main()
