"""What label-free adaptation costs: FLOPs and memory by the plan, and seconds beside PyTorch with lightly.

    python -m benchmarks.label_free --json out.json

Four tables, of which `--parts` chooses some:

    flops    FLOPs of every arm, and their share of the same objective with all layers trained, new views in every
             epoch, and the teacher run with every batch, by the plan; `--epochs-of-ratios` epochs (distil 100)
    seconds  of EfficientNet-Lite0, all layers and from stage6 above a cached prefix, by objective
    peer     SimCLR of the same encoder, images, batch, views and epochs: dapt_jax and PyTorch with the building
             blocks of lightly, full and from stage6; PyTorch runs the frozen layers with every batch
    memory   peak of a step of ViT-S that trains low-rank updates of the last four blocks above cached tokens, and
             of one that trains all, by XLA's buffer assignment, beside the plan's estimate

Sides are processes of their own and take turns. Seconds of an arm hold everything but compilation and the
evaluation after every epoch, which the peer does not have; what is computed once counts once in
`--epochs-of-ratios` epochs, of which `--epochs` are run. CPU seconds are of all threads of the process: on a
machine that others use they say more than seconds do. That cached and uncached runs, resumed runs, merged
updates and other numbers of devices give equal numbers is for tests: tests/test_label_free_training.py,
tests/test_few_parameters.py, tests/test_runtime_sharding.py.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import common, our_step, sides
from dapt_jax.data.augment import Augment
from dapt_jax.data.dataset import Dataset
from dapt_jax.main import set_up_jax
from dapt_jax.models import registry
from dapt_jax.models.classifier import HEAD
from dapt_jax.models.lora import LoraSettings
from dapt_jax.models.trunk import Trunk
from dapt_jax.objectives import Distil, Objective, Reconstruct, TwoViews
from dapt_jax.runtime import allocator
from dapt_jax.training import accounting, label_free, loop, patterns
from dapt_jax.training.cache.policy import Caching
from dapt_jax.training.callbacks import Callback
from dapt_jax.training.context import RunContext
from dapt_jax.training.phases import Phase
from dapt_jax.training.run import RunTag, TrainData, TrainingRun

MODULE = "benchmarks.label_free"
PARTS = ("flops", "seconds", "peer", "memory")
OURS, THEIRS = "dapt_jax", "torch"
LITE, SMALL = "efficientnet_lite0", "vit_small_dinov2"
FROM_STAGE6 = ("stage6", "stage7", "top", HEAD)
DISTIL_EPOCHS = 100
AUGMENT = Augment(flip="dihedral", brightness=0.3, contrast=0.3, crop=0.5)
VIEWS = {"reconstruct": 4, "distil": 4, "two_views": 8}


def objective_of(name: str) -> Objective:
    """Return an objective of EfficientNet-Lite0; the teacher of distil is ViT-S/14 at 112 pixels."""
    if name == "reconstruct":
        return Reconstruct(Trunk(registry.build(LITE)))
    if name == "distil":
        return Distil(Trunk(registry.build(SMALL), reads="pooled", side=112))
    return TwoViews()


def run_of(
    name: str, trainable: tuple[str, ...], views: int, epochs: int, data: Dataset, batch: int
) -> TrainingRun:
    """Return the run of an arm on all images of a data set, without held-out ones.

    Args:
        name: Objective.
        trainable: Patterns of what trains.
        views: Fixed views per image; 0 for new ones in every epoch, where nothing can be cached.
        epochs: Passes over the images.
        data: The images.
        batch: Images per step.
    """
    objective, phases = objective_of(name), (Phase("arm", epochs, trainable, 1e-4, views=views),)
    model = label_free.pretext(registry.build(LITE), objective, phases)
    return TrainingRun(
        model,
        phases,
        TrainData(data, np.arange(len(data))),
        objective,
        batch_size=batch,
        augment=AUGMENT,
        caching=Caching("auto", 1 << 33, 0),
        tag=RunTag(name),
        teacher_weights=functools.partial(_drawn, objective) if name == "distil" else None,
    )


def _drawn(objective: Objective) -> tuple[Any, Any]:
    assert objective.teacher is not None
    return objective.teacher.init(0)


def flops_rows(data: Dataset, epochs: int) -> list[common.Row]:
    """Return the cost of every arm by the plan, per image and epoch."""
    rows = []
    for name, views in VIEWS.items():
        passes = DISTIL_EPOCHS if name == "distil" else epochs
        online = run_of(name, ("*",), 0, passes, data, 32).flops()
        for arm, trainable, own in (
            ("full, online", ("*",), 0),
            ("full", ("*",), views),
            ("from stage6, cached", FROM_STAGE6, views),
        ):
            if name == "two_views" and arm == "full":
                continue  # views that are fixed save nothing where all layers train and there are no targets
            total = run_of(name, trainable, own, passes, data, 32).flops()
            rows.append(
                {
                    "objective": name,
                    "arm": arm,
                    "epochs": passes,
                    "views": own or "new",
                    "MFLOP": total / len(data) / passes / 1e6,
                    "of full": total / online,
                }
            )
    return rows


class StopAfter(Callback):
    """Callback that ends a run after some epochs."""

    def __init__(self, epochs: int):
        """Stop after a number of epochs."""
        self._epochs = epochs

    def after_epoch(
        self, phase: int, epoch: int, params: Any, batch_stats: Any, metrics: Mapping[str, float]
    ) -> bool:
        """Return whether the epochs are done."""
        return epoch + 1 >= self._epochs


def _our_side(options: common.Row) -> None:
    data, _ = common.images_of(options["data"], options["images"], options["size"])
    run = run_of(
        options["objective"],
        tuple(options["trainable"]),
        options["views"],
        options["epochs_of_ratios"],  # of a phase as short as what is run, no prefix would be worth caching
        data,
        options["batch"],
    )
    weights, context = run.model.init(0), RunContext(callbacks=(StopAfter(options["epochs"]),))

    def measure(_: Any) -> common.Row:
        """Train anew, with what the process has compiled; nothing is cached from the round before."""
        new = RunContext()
        own = dataclasses.replace(context, ledger=new.ledger, cache=new.cache)
        start = time.process_time()
        (row,) = loop.train(run, *weights, own).costs
        cpu = time.process_time() - start
        trained = row.train_s + row.data_s
        cpu /= row.cache_s + trained + row.eval_s  # by second: all of them compute on all cores
        found = {"once": row.cache_s, "epoch": trained / options["epochs"]}
        return found | {f"cpu {name}": cpu * seconds for name, seconds in found.items()}

    measure(None)
    sides.serve(measure)


def _their_side(options: common.Row) -> None:
    from benchmarks import lightly_side

    data, _ = common.images_of(options["data"], options["images"], options["size"])
    images = data.images.batch(np.arange(len(data)))
    trainer = lightly_side.SimCLR(images, options["names"], options["batch"], options["workers"])
    trainer.epoch()

    def measure(_: Any) -> common.Row:
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(options["epochs"]):
            trainer.epoch()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        found = {"once": 0.0, "epoch": seconds / options["epochs"]}
        return found | {"cpu once": 0.0, "cpu epoch": cpu / options["epochs"]}

    sides.serve(measure)


def seconds_row(options: argparse.Namespace, arms: dict[str, common.Row], title: common.Row) -> Any:
    """Measure some arms in turn, and return a row with the seconds of each and their rounds."""
    with contextlib.ExitStack() as stack:
        started = {name: stack.enter_context(sides.Side(MODULE, arm)) for name, arm in arms.items()}
        found = sides.in_turn(started, options.rounds)
    row = dict(title)
    for name, rounds in found.items():
        for each in rounds:
            for kind, prefix in (("seconds", ""), ("cpu", "cpu ")):
                each[kind] = each[f"{prefix}once"] + options.epochs_of_ratios * each[f"{prefix}epoch"]
        row[f"{name} once s"] = common.middle(each["once"] for each in rounds)
        row[f"{name} epoch s"] = common.middle(each["epoch"] for each in rounds)
        row[f"{name} epoch CPU s"] = common.middle(each["cpu epoch"] for each in rounds)
    return row, found


def shared(options: argparse.Namespace) -> common.Row:
    """Return what every side is told."""
    return {
        key: getattr(options, key)
        for key in ("data", "images", "size", "batch", "epochs", "epochs_of_ratios", "workers")
    }


def arm_of(options: argparse.Namespace, name: str, is_full: bool) -> common.Row:
    """Return what a side of dapt_jax is told of an arm."""
    trained, views = (("*",), 0) if is_full else (FROM_STAGE6, VIEWS[name])
    return {**shared(options), "side": OURS, "objective": name, "trainable": trained, "views": views}


def seconds_rows(options: argparse.Namespace) -> tuple[list[common.Row], list[Any]]:
    """Return the seconds of full and cached arms by objective."""
    rows, rounds = [], []
    for name in common.words(options.objectives):
        arms = {"full": arm_of(options, name, True), "cached": arm_of(options, name, False)}
        row, found = seconds_row(options, arms, {"objective": name, "views": VIEWS[name]})
        rows.append(row | _ratio("cached / full", found["cached"], found["full"]))
        rounds.append(found)
    return rows, rounds


def peer_rows(options: argparse.Namespace) -> tuple[list[common.Row], list[Any]]:
    """Return the seconds of SimCLR in dapt_jax and in PyTorch, full and from stage6."""
    rows, rounds = [], []
    for is_full in (True, False):
        ours = arm_of(options, "two_views", is_full)
        made = our_step.program(LITE, tuple(ours["trainable"]))
        names = our_step.torch_names(made)
        trained = sorted(names[path] for path in made.mask.trainable if not path.startswith(f"{HEAD}/"))
        arms = {OURS: ours, THEIRS: {**shared(options), "side": THEIRS, "names": trained}}
        row, found = seconds_row(
            options, arms, {"trains": "all" if is_full else "from stage6, ours above a cached prefix"}
        )
        rows.append(row | _ratio("torch / dapt_jax", found[THEIRS], found[OURS]))
        rounds.append(found)
    return rows, rounds


def _ratio(title: str, above: list[common.Row], below: list[common.Row]) -> common.Row:
    ratios = common.ratios(above, below, "seconds")
    found = {title: common.middle(ratios), "low": min(ratios), "high": max(ratios)}
    return found | {"by CPU": common.middle(common.ratios(above, below, "cpu"))}


def has_lightly() -> bool:
    """Return whether the PyTorch side can run; say in one line why where it cannot."""
    if importlib.util.find_spec("lightly") is None:
        print("PyTorch side left out: lightly not installed; expected pip install lightly", flush=True)
        return False
    return common.has_torch()


def memory_rows(batch: int) -> list[common.Row]:
    """Return the peak memory of a step of ViT-S by XLA's buffer assignment and by the plan, in MiB."""
    rows, size = [], 112
    encoder = registry.build(SMALL)
    objective = Reconstruct(Trunk(encoder))
    for title, trainable in (
        ("all layers", ("*",)),
        ("low-rank updates of the last 4 blocks, tokens cached", ("block9..12:lora", HEAD)),
    ):
        phases = (Phase("arm", 1, trainable, 1e-4, views=1),)
        model = label_free.pretext(patterns.with_lora(encoder, phases, LoraSettings()), objective, phases)
        data, _ = common.images_of("", batch, size)
        run = TrainingRun(model, phases, TrainData(data, np.arange(batch)), objective, batch_size=batch)
        (program,) = run.programs
        state = jax.eval_shape(program.init_state, *model.abstract())
        x = accounting.boundary_shape(model, program.mask.boundary, size)
        batched = {
            "label": objective.label_shape(batch, size),
            "weight": jax.ShapeDtypeStruct((batch,), np.float32),
            "index": jax.ShapeDtypeStruct((batch,), np.int32),
        }
        if program.mask.boundary:
            step, images = program.activation_step, {"x": jax.ShapeDtypeStruct((batch, *x.shape), x.dtype)}
        else:
            step, images = (
                program.train_step,
                {"image": jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8)},
            )
        rng = {**our_step.DRAW, "epoch": np.int32(0)}
        compiled = (
            jax.jit(step, donate_argnums=0).lower(state, {**batched, **images}, rng, our_step.LR).compile()
        )
        said = compiled.memory_analysis()
        held = said.argument_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
        peak, planned = held + said.temp_size_in_bytes, accounting.peak_bytes(program, size, batch)
        rows.append(
            {
                "trains": title,
                "batch": batch,
                "peak MiB": peak / 2**20,
                "plan MiB": planned / 2**20,
                "plan / peak": planned / peak,
            }
        )
    for row in rows:
        row["of all layers"] = row["peak MiB"] / rows[0]["peak MiB"]
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure the chosen parts and print their tables."""
    parser = common.parser(__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--objectives", default=",".join(VIEWS), help="of the part seconds")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2, help="that are run in each round")
    parser.add_argument("--epochs-of-ratios", type=int, default=20)
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes that read for PyTorch; their CPU seconds do not count",
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    set_up_jax()
    if options.side:
        side = json.loads(options.side)
        (_our_side if side["side"] == OURS else _their_side)(side)
        return
    parts, made = common.words(options.parts), {}
    if "flops" in parts:
        data, _ = common.images_of("", 40, options.size)
        made["flops"] = flops_rows(data, options.epochs_of_ratios), []
    if "memory" in parts:
        made["memory"] = memory_rows(32), []
    if "seconds" in parts:
        made["seconds"] = seconds_rows(options)
    if "peer" in parts and has_lightly():
        made["peer"] = peer_rows(options)
    for part, (rows, rounds) in made.items():
        own = argparse.Namespace(**vars(options))
        own.json, own.csv = (
            path and path.replace(".", f"_{part}.", 1) if len(made) > 1 else path
            for path in (options.json, options.csv)
        )
        common.report(own, f"label-free adaptation: {part}", rows, rounds=rounds)


if __name__ == "__main__":
    allocator.restart_with_settings()
    main()
