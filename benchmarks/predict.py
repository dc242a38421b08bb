"""Seconds and peak memory of `mode=predict` on many small images.

    python -m benchmarks.predict --count=100000 --folder=/tmp/predict

EfficientNet-Lite0 with linear heads of five folds, of random weights, on PNG files of 64 x 64 pixels, which are
written first. A tenth of them is predicted first: the two peaks show whether memory grows.
"""

import argparse
import csv
import dataclasses
import resource
import time
from pathlib import Path

import numpy as np
from PIL import Image

from dapt_jax.inference import familiarity, stream
from dapt_jax.inference.target_model import About, Reading, TargetModel
from dapt_jax.losses import LOSSES
from dapt_jax.models import registry
from dapt_jax.settings import default, resolve

SIDE, FOLDS = 64, 5


def model() -> TargetModel:
    """Return the model."""
    encoder, rng = registry.build("efficientnet_lite0"), np.random.default_rng(0)
    d = encoder.features
    members = tuple(
        {
            "shift": np.zeros(d, np.float32),
            "factor": np.ones(d, np.float32),
            "layer0": {"kernel": rng.normal(size=(5, d)).astype(np.float32), "bias": np.zeros(5, np.float32)},
        }
        for _ in range(FOLDS)
    )
    features = familiarity.fit(rng.normal(size=(500, d)).astype(np.float32), np.split(np.arange(500), 5))
    about = About(
        task="many",
        strategy="none",
        protocol="linear",
        seed=0,
        folds=tuple(range(FOLDS)),
        model=encoder.name,
        last_group=encoder.groups[-1],
        dtype="float32",
        loss="ce",
        loss_values=dataclasses.asdict(LOSSES["ce"](5)),
        reading=Reading(SIDE),
        classes=tuple("abcde"),
        threshold=features.threshold,
    )
    return TargetModel(about, encoder, *encoder.init(0), members, features)


def write_images(folder: Path, count: int) -> None:
    """Write noise of 64 patterns as PNG files, a thousand in a folder."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (64, SIDE, SIDE, 3), np.uint8)
    for number in range(count):
        path = folder / f"{number // 1000:05d}" / f"{number:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            Image.fromarray(np.roll(patterns[number % 64], number // 64, 0)).save(path, compress_level=1)


def peak_mib() -> float:
    """Return the largest resident memory of the process so far in MiB (on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Predict a tenth of the images, then all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    model().write(arguments.folder / "model.safetensors")
    write_images(arguments.folder / "images", arguments.count)
    with (arguments.folder / "tenth.csv").open("w", newline="") as file:
        files = sorted((arguments.folder / "images").rglob("*.png"))[: arguments.count // 10]
        csv.writer(file).writerows([("image",), *((path,) for path in files)])
    for place, count in (("tenth.csv", len(files)), ("images", arguments.count)):
        config = default()
        config.mode, config.predict.images = "predict", str(arguments.folder / place)
        config.predict.model = (str(arguments.folder / "model.safetensors"),)
        start, cpu = time.monotonic(), time.process_time()
        stream.run(resolve(config), arguments.folder / f"out-{count}")
        seconds = time.monotonic() - start
        spent = time.process_time() - cpu
        print(
            f"{count:,} images: {seconds:.0f} s, {spent:.0f} s of CPU, peak {peak_mib():,.0f} MiB", flush=True
        )


if __name__ == "__main__":
    main()
