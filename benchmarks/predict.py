"""Seconds and peak memory of `mode=predict` on many small images.

    python -m benchmarks.predict --count=100000 --folder=/tmp/predict

An encoder, whole or cut, with linear heads of five folds, of random weights, on PNG files of 64 x 64 pixels, which
are written first. A hundredth of them is predicted first: the two peaks show whether memory grows.
"""

import argparse
import csv
import dataclasses
import resource
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import common
from dapt_jax.inference import familiarity, stream
from dapt_jax.inference.target_model import About, Reading, TargetModel
from dapt_jax.losses import LOSSES
from dapt_jax.models import registry
from dapt_jax.settings import default, resolve

SIDE, FOLDS = 64, 5
DISTINCT = 4096
"""Distinct files; all others are links to them."""


def model(name: str, cut_after: str) -> TargetModel:
    """Return the model, of an encoder that ends with a layer group; whole for an empty name."""
    encoder, rng = registry.build(name), np.random.default_rng(0)
    encoder = encoder.truncate(cut_after) if cut_after else encoder
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
    paths = [folder / f"{number // 1000:05d}" / f"{number:07d}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            continue
        if number >= DISTINCT:
            path.hardlink_to(paths[number % DISTINCT])
            continue
        Image.fromarray(np.roll(patterns[number % 64], number // 64, 0)).save(path, compress_level=1)


def peak_mib() -> float:
    """Return the largest resident memory of the process so far in MiB (on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: list[str] | None = None) -> None:
    """Predict a hundredth of the images, then all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--cut", default="", help="last layer group of the encoder, such as stage2/block1")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--csv", help="file for the table, with the machine and the versions")
    options = parser.parse_args(arguments)
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    network = model(options.model, options.cut)
    network.write(folder / "model.safetensors")
    write_images(folder / "images", options.count)
    with (folder / "some.csv").open("w", newline="") as file:
        files = sorted((folder / "images").rglob("*.png"))[: max(1, options.count // 100)]
        csv.writer(file).writerows([("image",), *((path,) for path in files)])
    rows: list[common.Row] = []
    for place, count in (("some.csv", len(files)), ("images", options.count)):
        config = default()
        config.mode, config.predict.images = "predict", str(folder / place)
        config.predict.model = (str(folder / "model.safetensors"),)
        start, cpu = time.monotonic(), time.process_time()
        stream.run(resolve(config), folder / f"out-{count}")
        spent = {"seconds": time.monotonic() - start, "CPU s": time.process_time() - cpu}
        rows.append(
            {
                "images": count,
                **spent,
                "CPU ms per image": 1e3 * spent["CPU s"] / count,
                "peak MiB": peak_mib(),
            }
        )
    encoder = f"{network.encoder.name} to {network.encoder.groups[-1]}"
    title = f"mode=predict, {encoder} with heads of {FOLDS} folds, PNG files of {SIDE} x {SIDE}"
    rows = [{"encoder": encoder, **row} for row in rows]
    common.report(options, title, rows)


if __name__ == "__main__":
    main()
