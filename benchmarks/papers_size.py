"""Three jobs at the size of their papers: what each takes in all, and its first 1% for real beside the plan.

    python -m benchmarks.papers_size --csv benchmarks/results/papers_size.csv
    python -m benchmarks.papers_size --jobs mehmood2022 --share 0.01

1. `mehmood2022`: an arm of arXiv 2204.13280 (the head, the last block, then all of ResNet-50; 24,422 slices of 240 px,
   PNG). 2. `chexpert`: continual pre-training of arXiv 2108.05930 (all of ResNet-50, batch norm trained; 191,000
   radiographs of 390 x 320 px, JPEG, crops of 224 px from the file). 3. `reconstruct`: ViT-B without labels, its last
   four blocks (100,000 images of 224 px, JPEG).

Images are synthetic, of the true number of pixels and format. A few of them are trained on first: they give seconds for
each step and for each image whose frozen prefix is computed, from which the seconds of `--share` of the images, for
a few epochs, are predicted, and these are then run through the same loop. Memory is XLA's, of the compiled steps, beside
the plan's estimate. FLOPs are the plan's, and the ledger has to agree to the integer. What the whole job takes on
these cores follows from the pace of that run; on an accelerator from its published peak and an assumed share of it.
"""

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import dapt_jax as dj
from benchmarks import common, our_step
from dapt_jax.cost import hardware
from dapt_jax.data import sources
from dapt_jax.data.dataset import Dataset
from dapt_jax.models import registry
from dapt_jax.records.ledger import Row
from dapt_jax.runtime import allocator
from dapt_jax.settings import default, resolve
from dapt_jax.study import runs, strategies
from dapt_jax.training import accounting
from dapt_jax.training.cache.store import ActivationCache
from dapt_jax.training.context import RunContext
from dapt_jax.training.run import TrainData, TrainingRun

FEW = 6
"""Batches of images that are trained on first, for the pace."""

DEVICE, ASSUMED = "NVIDIA H100 80GB HBM3", 0.3
"""Accelerator for which hours are given, and the share of its bfloat16 peak that is assumed."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of a paper.

    Attributes:
        images: Images of its corpus.
        sides: Height and width of their files in pixels.
        suffix: Format of the files, a suffix.
        settings: Settings that differ from the defaults, by dotted name.
        phases: Phases, as in `custom_strategies`.
        scale: Factor of their epochs in the run of a share of the images.
    """

    images: int
    sides: tuple[int, int]
    suffix: str
    settings: dict[str, Any]
    phases: tuple[dict[str, Any], ...]
    scale: float


_SLICES = {"lr": 1e-5, "augment": False}
_DISK = {"cache.disk_mb": 65536}
JOBS = {
    "mehmood2022": Job(
        24422,
        (240, 240),
        ".png",
        {"model.name": "resnet50_keras", "model.image_size": 240, "adapt.batch_size": 16, **_DISK},
        (
            {"name": "head", "epochs": 1000, "trainable": ("head",), "lr": 1e-4, "augment": False},
            {**_SLICES, "name": "partial", "epochs": 100, "trainable": ("stage4/block3", "head")},
            {**_SLICES, "name": "full", "epochs": 50, "trainable": ("*",)},
        ),
        0.02,
    ),
    "chexpert": Job(
        191000,
        (320, 390),
        ".jpg",
        {
            "model.name": "resnet50",
            "model.image_size": 256,
            "adapt.batch_size": 32,
            "adapt.augment.flip": "horizontal",
            "adapt.augment.crop": 0.08,
            "adapt.augment.patch": 224,
            "adapt.augment.crop_from": 1024,
        },
        ({"name": "full", "epochs": 20, "trainable": ("*",), "lr": 2e-4, "batch_norm": "train"},),
        0.05,
    ),
    "reconstruct": Job(
        100000,
        (224, 224),
        ".jpg",
        {
            "model.name": "vit_base",
            "model.image_size": 224,
            "adapt.objective": "reconstruct",
            "adapt.batch_size": 32,
            **_DISK,
        },
        (
            {
                "name": "reconstruct",
                "epochs": 20,
                "trainable": ("block9..12", "top", "head"),
                "lr": 1e-4,
                "views": 1,
            },
        ),
        0.1,
    ),
}


def write(folder: Path, job: Job, count: int) -> None:
    """Write synthetic images of two classes: smooth shapes with noise, grey, which compress as radiographs do."""
    rng = np.random.default_rng(0)
    height, width = job.sides
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number}{job.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, np.int16) + rng.integers(-8, 9, (height, width))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def run_of(job: Job, corpus: Dataset, scale: float) -> TrainingRun[Any]:
    """Return the run of a job on some of its images, its epochs scaled.

    Args:
        job: The job.
        corpus: Images.
        scale: Factor of the epochs of every phase, of which each keeps one.
    """
    config = default()
    config.weights, config.adapt.head_epochs = "random", 0
    config.adapt.balance_classes, config.corpus.val_fraction = False, 0.0
    config.update_from_flattened_dict(job.settings)
    config.custom_strategies.job = {"phases": job.phases}
    config.phases_scale = scale
    settings = resolve(config)
    arm = strategies.resolve("job", registry.build(settings.model.name), settings)
    return runs.adaptation_run(settings, arm, 0, corpus)


def train(run: TrainingRun[Any], context: RunContext) -> list[Row]:
    """Train a run and return its ledger's rows.

    Raises:
        RuntimeError: Its FLOPs are not the plan's.
    """
    rows = list(dj.train(run, None, context).costs)
    if (spent := sum(row.model_flops for row in rows)) != run.flops():
        raise RuntimeError(f"{spent} FLOPs in the ledger; expected {run.flops()}, as planned")
    return rows


def measure(name: str, share: float) -> list[common.Row]:
    """Return the rows of a job, one for each phase."""
    job = JOBS[name]
    count, size = math.ceil(job.images * share), job.settings["model.image_size"]
    peak = hardware.lookup(DEVICE, 1, "gpu").peak_for("bfloat16") * ASSUMED
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), job, count)
        corpus = sources.load({"kind": "folder", "path": "."}, data_dir=folder, image_size=size)
        few = run_of(job, corpus.take(np.arange(FEW * job.settings["adapt.batch_size"])), job.scale)
        context = RunContext()
        compiled = train(few, context)
        memory = [our_step.memory_of(each) / 2**20 for each in context.executables.values()]
        before = train(few, dataclasses.replace(context, cache=ActivationCache()))
        run = run_of(job, corpus, job.scale)
        rows = train(run, dataclasses.replace(context, cache=ActivationCache()))
    everything = np.resize(np.arange(count), job.images)
    data = TrainData(corpus.take(everything), np.arange(job.images), np.arange(0))
    whole = dataclasses.replace(run_of(job, corpus, 1.0), data=data)
    found: list[common.Row] = []
    for number, (row, pace, program) in enumerate(zip(rows, before, run.programs, strict=True)):
        steps = program.phase.epochs * run.steps_per_epoch
        predicted = pace.train_s / pace.steps * steps + pace.cache_s / len(few.train_rows) * count
        seconds = row.train_s + row.cache_s
        fills = whole.fill_flops(number) + whole.target_fill_flops(number)
        each = whole.flops_per_image(number)
        total = each * job.images * whole.phases[number].epochs + fills
        decision = whole.cache_decision(whole.programs[number])
        found.append(
            {
                "job": name,
                "phase": program.phase.name,
                "images": count,
                "epochs": program.phase.epochs,
                "TFLOP": row.model_flops / 1e12,
                "predicted s": predicted,
                "s": seconds,
                "ratio": seconds / predicted,
                "waiting s": row.data_s,
                "compile s": compiled[number].compile_s,
                "planned MiB": accounting.peak_bytes(program, size, run.batch_size) / 2**20,
                "PFLOP in all": total / 1e15,
                "hours here": total / row.model_flops * seconds / 3600,
                "cache": decision.tier if decision.cached else "",
                "cache GiB": decision.bytes / 2**30 if decision.cached else 0,
                "hours on an H100": total / peak / 3600,
                "images/s on an H100": 0 if decision.cached else peak / each,
            }
        )
    for row, peak_mib in zip(found, memory, strict=True):
        row["XLA MiB"] = peak_mib
    return found


def main(arguments: list[str] | None = None) -> None:
    """Runs the share of every job and prints the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--share", type=float, default=0.01, help="of the images")
    options = parser.parse_args(arguments)
    rows = [row for name in common.words(options.jobs) for row in measure(name, options.share)]
    common.report(options, f"{options.share:.1%} of the images of each job, and the whole job", rows)


if __name__ == "__main__":
    allocator.restart_with_settings()
    main()
