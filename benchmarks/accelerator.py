"""Checks and times one GPU (or TPU chip) against stored CPU losses and PyTorch, in one command of a few minutes.

    python -m benchmarks.accelerator --json accelerator.json --csv accelerator.csv

Needs no network and no data. Parts, each of which prints its rows as soon as it has them:

- `losses`: 20 steps of full, last-block and head training from fixed weights and images, compared with the losses
  of a CPU in `benchmarks/results/accelerator_losses.json`; with float32 products as the device does them by default
  (TensorFloat-32 on recent NVIDIA GPUs) and in full precision. The largest relative difference has to stay below
  `TOLERANCE`.
- `steps`: training steps by model, dtype, batch and strategy: images/s, model FLOPs utilisation (MFU), peak memory of
  the compiled program beside the plan's estimate, seconds of compilation; PyTorch's images/s with channels_last,
  autocast and torch.compile where the packages of the extra `benchmarks` import and see the same device.
- `loop`: a hybrid run through the real training loop: seconds of compilation before it and at the mask switch, and
  seconds of waiting for images.
- `input`: JPEG files of 256 px decoded to 224 px, in images/s, beside what the fastest step consumes.
- `quickstart`: seconds of the README's study.

On a CPU, `--smallest` runs every part but the last in about a minute.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import common, sides
from dapt_jax.runtime import allocator

MODULE = "benchmarks.accelerator"
STORED = Path(__file__).parent / "results" / "accelerator_losses.json"
PARTS = ("losses", "steps", "loop", "input", "quickstart")
HEAD_ONLY = "head"
LOSS_STEPS, LOSS_BATCH, LOSS_SIZE, LOSS_MODEL = 20, 8, 64, "resnet18"
TOLERANCE = {"highest": 1e-3, "default": 2e-2}
"""Largest relative difference of a loss from the CPU's, by precision of float32 products.

Twenty steps of Adam amplify rounding: full precision differs by the order of sums alone, TensorFloat-32 by
products with 10 bits of mantissa.
"""


def losses(strategy: str, precision: str) -> list[float]:
    """Return the loss of each of the first 20 steps of a strategy, from fixed weights and images.

    Args:
        strategy: `full`, `last block` or `head`.
        precision: Precision of float32 products, as `jax.default_matmul_precision` takes it.
    """
    import jax

    from benchmarks import our_step
    from dapt_jax.models.classifier import HEAD

    trained = (HEAD,) if strategy == HEAD_ONLY else our_step.trained_by(LOSS_MODEL, strategy)
    made = our_step.program(LOSS_MODEL, trained)
    rng = np.random.default_rng(0)
    found, before = [], 0.0
    with jax.default_matmul_precision(precision):
        state = jax.device_put(made.init_state(*made.model.init(0)))
        step = jax.jit(made.train_step, donate_argnums=0)
        for _ in range(LOSS_STEPS):
            labels = rng.integers(0, our_step.CLASSES, LOSS_BATCH).astype(np.int32)
            # The mean brightness tells the class, so that losses fall and a wrong gradient shows.
            noise = rng.integers(0, 128, (LOSS_BATCH, LOSS_SIZE, LOSS_SIZE, 3))
            batch = {
                "image": (noise + 60 * labels[:, None, None, None]).astype(np.uint8),
                "label": labels,
                "weight": np.ones(LOSS_BATCH, np.float32),
                "index": np.arange(LOSS_BATCH, dtype=np.int32),
            }
            state = step(state, batch, our_step.DRAW, our_step.LR)
            total = float(state["loss"])
            found.append((total - before) / LOSS_BATCH)
            before = total
    return found


def loss_rows() -> list[common.Row]:
    """Return the comparison with the stored losses of a CPU, by strategy and precision."""
    stored = json.loads(STORED.read_text())
    rows = []
    for strategy, expected in stored.items():
        for precision, limit in TOLERANCE.items():
            here = losses(strategy, precision)
            differs = max(abs(a - b) / abs(b) for a, b in zip(here, expected, strict=True))
            rows.append(
                {
                    "part": "losses",
                    "strategy": strategy,
                    "precision": precision,
                    "largest relative difference": differs,
                    "allowed": limit,
                    "holds": differs <= limit,
                }
            )
    return rows


def step_row(model: str, dtype: str, batch: int, kind: str, size: int, steps: int) -> common.Row:
    """Return one row of the part `steps`, without PyTorch.

    Args:
        model: Architecture.
        dtype: Dtype of activations.
        batch: Images of a step.
        kind: `full`, `last block`, or `cached last block`: from activations at the boundary.
        size: Side of the images in pixels.
        steps: Steps that are timed.
    """
    import jax

    from benchmarks import our_step
    from dapt_jax.cost import hardware
    from dapt_jax.training import accounting

    strategy = our_step.FULL if kind == our_step.FULL else our_step.LAST
    made = our_step.program(model, our_step.trained_by(model, strategy), dtype)
    is_cached = kind.startswith("cached")
    start = time.perf_counter()
    step = our_step.Step(made, size, batch, "cached" if is_cached else "whole")
    first = time.perf_counter() - start
    seconds = step.seconds(steps)
    cost = accounting.image_cost(made, size)
    flops = batch * (cost.suffix.model + (0 if is_cached else cost.prefix.model))
    peak = hardware.describe().peak_for(dtype) / jax.device_count()
    utilisation = hardware.utilisation(flops, seconds, peak)
    compiled = step.memory_bytes()
    return {
        "part": "steps",
        "model": model,
        "dtype": dtype,
        "batch": batch,
        "strategy": kind,
        "images/s": batch / seconds,
        "MFU": utilisation,
        "peak MiB": compiled / 2**20 if compiled else None,
        "plan MiB": accounting.peak_bytes(made, size, batch) / 2**20,
        "first step s": first,
        "state donated": step.donates(),
    }


def _torch_images_per_s(row: common.Row, size: int, steps: int, device: str) -> float | None:
    """Return PyTorch's images/s for a row, measured in a process of its own; None where it fails."""
    from benchmarks import our_step

    strategy = our_step.FULL if row["strategy"] == our_step.FULL else our_step.LAST
    made = our_step.program(row["model"], our_step.trained_by(row["model"], strategy), row["dtype"])
    names = our_step.torch_names(made)
    options = {
        "model": row["model"],
        "outputs": our_step.CLASSES,
        "dtype": row["dtype"],
        "names": sorted(names[path] for path in made.mask.trainable),
        "size": size,
        "batch": row["batch"],
        "device": device,
        "compile": device != "cpu",
    }
    try:
        with sides.Side(MODULE, options) as side:
            return row["batch"] / side.measure(steps)["seconds"]
    except SystemExit as error:
        print(f"PyTorch: {error}", flush=True)
        return None


def _torch_device() -> str:
    """Return the device of the PyTorch side that corresponds to JAX's; empty where there is none."""
    import jax

    if not common.has_torch():
        return ""
    if jax.default_backend() == "cpu":
        return "cpu"
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return "" if subprocess.run([sys.executable, "-c", code], check=False).returncode else "cuda"


def step_rows(options: argparse.Namespace) -> Iterator[common.Row]:
    """Yield the rows of the part `steps`."""
    from benchmarks import our_step

    device = _torch_device()
    for model in common.words(options.models):
        for dtype in common.words(options.dtypes):
            for kind in (our_step.FULL, our_step.LAST, f"cached {our_step.LAST}"):
                for batch in common.numbers(options.batches):
                    row = step_row(model, dtype, batch, kind, options.size, options.steps)
                    if device and not kind.startswith("cached"):
                        theirs = _torch_images_per_s(row, options.size, options.steps, device)
                        row |= {"torch images/s": theirs, "ratio": theirs and row["images/s"] / theirs}
                    yield row


def loop_row(size: int, count: int) -> common.Row:
    """Return what the mask switch of a hybrid run through the real training loop costs.

    Args:
        size: Side of the images in pixels.
        count: Images, drawn as phantoms.
    """
    from benchmarks import our_step
    from dapt_jax.losses.cross_entropy import CrossEntropy
    from dapt_jax.models import registry
    from dapt_jax.models.classifier import Classifier
    from dapt_jax.training import loop
    from dapt_jax.training.context import RunContext
    from dapt_jax.training.phases import Phase
    from dapt_jax.training.run import TrainData, TrainingRun

    dataset, _ = common.images_of("absent", count, size)
    model = Classifier(registry.build(LOSS_MODEL), len(dataset.classes))
    phases = (
        Phase("partial", 2, our_step.trained_by(LOSS_MODEL, our_step.LAST), 1e-4),
        Phase("full", 2, ("*",), 1e-5),
    )
    data = TrainData(dataset, np.arange(len(dataset)))
    run = TrainingRun(model, phases, data, CrossEntropy(len(dataset.classes)), batch_size=LOSS_BATCH)
    partial, full = loop.train(run, *model.init(0), RunContext()).costs
    return {
        "part": "loop",
        "model": LOSS_MODEL,
        "compile s before": partial.compile_s,
        "compile s at the switch": full.compile_s,
        "ms of a partial step": 1e3 * partial.train_s / partial.steps,
        "ms of a full step": 1e3 * full.train_s / full.steps,
        "input wait s": partial.data_s + full.data_s,
    }


def input_row(size: int, count: int, needed: float) -> common.Row:
    """Return images/s that reading JPEG files delivers, beside what the fastest uncached step takes.

    Args:
        size: Side of the images that the model sees.
        count: Files.
        needed: Images/s of the fastest step that reads images.
    """
    from benchmarks import input_pipeline

    with tempfile.TemporaryDirectory() as folder:
        paths, _ = input_pipeline.write(Path(folder), Path("absent"), "colour", "jpeg", count, 256)
        options = {"paths": paths, "size": size, "batch": 32, "side": input_pipeline.OURS}
        with sides.Side(input_pipeline.MODULE, options) as side:
            found = side.measure()
    return {
        "part": "input",
        "images/s": found["images/s"],
        "later epochs images/s": found["later epochs images/s"],
        "needed images/s": needed,
        "keeps up": found["later epochs images/s"] >= needed,
    }


def quickstart_row() -> common.Row:
    """Return the seconds of the README's study in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "dapt_jax.main",
            "--config=configs/quickstart.py",
            f"--workdir={folder}",
        ]
        start = time.perf_counter()
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    return {"part": "quickstart", "seconds": seconds, "exit code": done.returncode}


def measure(options: argparse.Namespace) -> Iterator[common.Row]:
    """Yield all rows of the chosen parts."""
    parts = common.words(options.parts)
    if "losses" in parts:
        yield from loss_rows()
    fastest = 0.0
    if "steps" in parts:
        for row in step_rows(options):
            if not row["strategy"].startswith("cached"):
                fastest = max(fastest, row["images/s"])
            yield row
    if "loop" in parts:
        yield loop_row(options.size, 8 * LOSS_BATCH)
    if "input" in parts:
        yield input_row(options.size, options.files, fastest)
    if "quickstart" in parts:
        yield quickstart_row()


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table for each part, and write the files."""
    parser = common.parser(__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--models", default="resnet50,efficientnet_lite0,vit_base")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batches", default="64,256")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed in each row")
    parser.add_argument("--files", type=int, default=2048, help="JPEG files of the part input")
    parser.add_argument(
        "--smallest", action="store_true", help="the smallest size of every part, without quickstart"
    )
    parser.add_argument("--store-losses", action="store_true", help="store this CPU's losses, and stop")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        from benchmarks import torch_side

        step = torch_side.Step(json.loads(options.side))
        sides.serve(lambda steps: {"seconds": step.seconds(steps)})
        return
    from dapt_jax.main import set_up_jax

    set_up_jax()
    if options.store_losses:
        found = {name: losses(name, "highest") for name in ("full", "last block", HEAD_ONLY)}
        STORED.write_text(json.dumps(found, indent=1) + "\n")
        return
    if options.smallest:
        options.parts = options.parts.replace(",quickstart", "")
        options.models, options.dtypes, options.batches = "resnet18", "float32", "2"
        options.size, options.steps, options.files = 32, 1, 8
    rows = []
    for row in measure(options):
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    import jax

    device = jax.devices()[0].device_kind
    for part in dict.fromkeys(row["part"] for row in rows):
        common.report(
            argparse.Namespace(csv=None, json=None),
            f"{part} on {device}",
            [
                {key: value for key, value in row.items() if key != "part"}
                for row in rows
                if row["part"] == part
            ],
        )
    common.write(options, f"accelerator: {device}", rows, device=device, devices=jax.device_count())


if __name__ == "__main__":
    allocator.restart_with_settings()
    main()
