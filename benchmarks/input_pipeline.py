"""Images/s from JPEG and PNG files: dapt_jax's reader against `torch.utils.data.DataLoader` with Pillow.

    python -m benchmarks.input_pipeline --json out.json

Both decode, turn to RGB, resize with Pillow's anti-aliased bilinear filter to uint8 and batch; both have all
cores, dapt_jax as threads, the DataLoader as worker processes that stay, started before the clock is.
dapt_jax resizes grey images before it makes three channels of them, and decodes a JPEG of four times the size
that is wanted, or more, at a fraction of its size. The files are real images written out anew: grey slices
(CE-MRI) and colour cells (WBC), as JPEG and PNG.

`ratio` is that of a first epoch, in which both decode. `later epochs` is what dapt_jax gives once images are
in memory, as it keeps them; the DataLoader decodes again in every epoch, so `over 10 epochs` is the ratio
that a short training sees.
"""

import argparse
import contextlib
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import common, sides
from dapt_jax.runtime import allocator

MODULE = "benchmarks.input_pipeline"
OURS, THEIRS = "dapt_jax", "torch"
SOURCES = {"grey": "brain_mri/cemri/images", "colour": "wbc"}
FORMATS = {"jpeg": {"quality": 90}, "png": {"compress_level": 6}}


def write(folder: Path, data: Path, kind: str, form: str, count: int, side: int) -> tuple[list[str], str]:
    """Writes images of one size and format.

    Args:
        folder: where to.
        data: of real images.
        kind: `grey` or `colour`.
        form: `jpeg` or `png`.
        count: of files; sources are used again where there are fewer.
        side: in pixels.

    Returns:
        Their paths, and what they show.
    """
    found = sorted((data / SOURCES[kind]).rglob("*"))
    found = [path for path in found if path.suffix in (".jpg", ".bmp", ".png") and "mask" not in str(path)]
    if found:
        what = SOURCES[kind].partition("/")[0]
        images = [Image.open(found[number * len(found) // count]) for number in range(min(count, len(found)))]
    else:
        from dapt_jax.data import phantoms

        what = "SYNTHETIC phantoms"
        images = [Image.fromarray(image) for image in phantoms.cells(min(count, 32), size=96).images]
    mode = {"grey": "L", "colour": "RGB"}[kind]
    paths = []
    for number in range(count):
        image = images[number % len(images)].convert(mode).resize((side, side), Image.Resampling.BICUBIC)
        paths.append(str(folder / f"{kind}{number:05d}.{form}"))
        image.save(paths[-1], **FORMATS[form])
    return paths, what


def _ours(options: common.Row) -> None:
    """Serves passes over files by grain and the image store."""
    from dapt_jax.data import pipeline
    from dapt_jax.data.dataset import Dataset
    from dapt_jax.data.decode import ImageStore

    count, batch = len(options["paths"]), options["batch"]
    order = pipeline.Order(tuple(range(count)), batch, 0)

    def measure(what: Any) -> common.Row:
        seconds = []
        for budget in (0, 1 << 40):
            images = ImageStore.from_files(options["paths"], options["size"], cache_bytes=budget)
            if budget:
                images.verify()
            dataset = Dataset(
                "files", images, np.zeros(count, np.int64), ("a",), np.arange(count).astype(str)
            )
            start = time.perf_counter()
            for each in pipeline.batches(dataset, order, 1, threads=os.cpu_count() or 1):
                assert each["image"].shape[0] == batch
            seconds.append(time.perf_counter() - start)
        return {"images/s": count / seconds[0], "later epochs images/s": count / seconds[1]}

    sides.serve(measure)


def _theirs(options: common.Row) -> None:
    """Serves passes over files by a DataLoader."""
    import torch

    size = options["size"]

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(options["paths"])

        def __getitem__(self, row: int) -> torch.Tensor:
            with Image.open(options["paths"][row]) as image:
                pixels = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)

    workers = os.cpu_count() or 1
    loader = torch.utils.data.DataLoader(
        Files(), options["batch"], shuffle=True, num_workers=workers, persistent_workers=True
    )
    for _ in loader:  # starts the workers
        pass

    def measure(what: Any) -> common.Row:
        start, seen = time.perf_counter(), 0
        for each in loader:
            seen += len(each)
        return {"images/s": seen / (time.perf_counter() - start)}

    sides.serve(measure)


def _row(options: argparse.Namespace, side: int, kind: str, form: str) -> tuple[common.Row, Any]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        paths, what = write(Path(folder), Path(options.data), kind, form, options.images, side)
        shared = {"paths": paths, "size": options.size, "batch": options.batch}
        names = [OURS, THEIRS] if common.has_torch() else [OURS]
        started = {name: stack.enter_context(sides.Side(MODULE, {**shared, "side": name})) for name in names}
        found = sides.in_turn(started, options.rounds)
    row: common.Row = {"files": f"{kind} {form}", "images": what, "from px": side, "to px": options.size}
    for name, rounds in found.items():
        row |= {f"{name} {key}": common.middle([each[key] for each in rounds]) for key in rounds[0]}
    if THEIRS in found:
        ratios = common.ratios(found[OURS], found[THEIRS], "images/s")
        row |= {"ratio": common.middle(ratios), "ratio low": min(ratios), "ratio high": max(ratios)}
        first, later = row[f"{OURS} images/s"], row[f"{OURS} later epochs images/s"]
        row["over 10 epochs"] = 10 / row[f"{THEIRS} images/s"] / (1 / first + 9 / later)
    return row, found


def main(arguments: list[str] | None = None) -> None:
    """Measures every kind of file and prints the table."""
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument("--kinds", default="grey,colour")
    parser.add_argument("--formats", default="jpeg,png")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--file-sizes", default="256,512", help="side of the files' images in pixels")
    parser.add_argument("--size", type=int, default=128, help="side of the images that are wanted")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        side = json.loads(options.side)
        (_ours if side["side"] == OURS else _theirs)(side)
        return
    choices = (common.numbers(options.file_sizes), common.words(options.kinds), common.words(options.formats))
    rows, found = zip(*(_row(options, *choice) for choice in itertools.product(*choices)), strict=True)
    title = f"reading {options.images} files, batches of {options.batch}; medians of {options.rounds} rounds"
    common.report(options, title, rows, rounds=found)


if __name__ == "__main__":
    allocator.restart_with_settings()
    main()
