"""SYNTHETIC blood-smear phantoms: a corpus, a development set and an external set without patient data.

The images are drawn, not photographed. They allow a study to be tried, tested and timed from end to end;
scores on them have no medical meaning.

`python -m dapt_jax.data.phantoms --out DIR` writes them as image files with a manifest, the format to use for
other data.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dapt_jax.data import phantom_cells as drawing
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.decode import ImageStore
from dapt_jax.errors import UserError, nearest

LEUKOCYTES = drawing.LEUKOCYTES
SMEAR_OBJECTS = ("erythrocyte", "leukocyte", "platelet")
CELLS_PER_SMEAR = 6
# Share of each class; rare classes are rare, as in blood, but present in small sets.
_SHARES = {"leukocytes": (0.30, 0.24, 0.19, 0.16, 0.11), "smear": (0.60, 0.25, 0.15)}


class Source(NamedTuple):
    """A predefined set: its cells, stain, smear numbers and default number of images."""

    kind: str
    stain: int
    number: int
    images: int


SOURCES = {
    "corpus": Source("smear", 0, 1, 2000),
    "development": Source("leukocytes", 0, 2, 400),
    "external": Source("leukocytes", 1, 3, 200),
}


class Cells(NamedTuple):
    """Drawn cells.

    Attributes:
        images: uint8 [n, size, size, 3].
        labels: int64 [n], index into `LEUKOCYTES`, or into `SMEAR_OBJECTS` for kind "smear".
        masks: uint8 [n, size, size]; 0 background, 1 cytoplasm, 2 nucleus (of white cells only).
        smears: str [n], the smear of each cell, used as the "patient".
    """

    images: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    smears: np.ndarray


def cells(n: int, *, size: int = 64, stain: int = 0, seed: int = 0, kind: str = "leukocytes") -> Cells:
    """Draw SYNTHETIC cells.

    Image i depends on the arguments other than `n` and on i: a larger `n` never changes the first images.
    Every `CELLS_PER_SMEAR` images share a smear with its own stain and light.

    Args:
        n: Number of images.
        size: Side in pixels, 16 or more.
        stain: 0 for the development laboratory, 1 for another stain, scanner and magnification.
        seed: Non-negative seed.
        kind: "leukocytes" for the five white cells, "smear" for windows on red cells, white cells and
            platelets of more varied smears.
    """
    if kind not in _SHARES:
        raise UserError(f"phantoms: no kind {kind!r}; {nearest(kind, _SHARES)}")
    if stain not in (0, 1):
        raise UserError(f"phantoms: no stain {stain}; valid: 0, 1")
    if size < 16:
        raise UserError(f"phantoms: {size} pixels are too few to draw a cell; expected 16 or more")
    if seed < 0:
        raise UserError(f"phantoms: seed {seed}; expected 0 or more")
    images = np.empty((n, size, size, 3), np.uint8)
    masks = np.empty((n, size, size), np.uint8)
    labels = np.empty(n, np.int64)
    tag = [seed, stain, sorted(_SHARES).index(kind)]
    for index in range(n):
        smear = index // CELLS_PER_SMEAR
        if index % CELLS_PER_SMEAR == 0:
            # 0 and 1 separate the random streams of smears and of cells.
            look = drawing.draw_look(
                np.random.default_rng([*tag, 0, smear]), stain, 1.8 if kind == "smear" else 1.0
            )
        rng = np.random.default_rng([*tag, 1, index])
        labels[index] = rng.choice(len(_SHARES[kind]), p=_SHARES[kind])
        images[index], masks[index] = _draw(rng, look, size, kind, int(labels[index]))
    smears = np.array(
        [f"{kind}-{stain}-{seed}-{index // CELLS_PER_SMEAR:05d}" for index in range(n)], dtype=str
    )
    return Cells(images, labels, masks, smears)


def _draw(
    rng: np.random.Generator, look: drawing.Look, size: int, kind: str, label: int
) -> tuple[np.ndarray, np.ndarray]:
    canvas = drawing.Canvas(rng, size)
    what = LEUKOCYTES[label] if kind == "leukocytes" else SMEAR_OBJECTS[label]
    if what == "leukocyte":
        what = LEUKOCYTES[rng.integers(len(LEUKOCYTES))]
    if what in LEUKOCYTES:
        drawing.draw_red_cells(canvas, look, clear=0.45 * look.scale)
        drawing.draw_leukocyte(canvas, look, what)
    elif what == "erythrocyte":
        drawing.draw_red_cells(canvas, look, clear=0.1)
        x, y = rng.normal(0, 0.08, 2)
        drawing.draw_red_cell(canvas, x, y, look.scale * rng.uniform(0.28, 0.36))
    else:
        drawing.draw_red_cells(canvas, look, clear=0.15)
        drawing.draw_platelet(canvas, look)
    return drawing.photograph(canvas, look), canvas.mask


def load_phantoms(name: str, n: int = 0, image_size: int = 64, seed: int = 0) -> Dataset:
    """Draw one of the predefined SYNTHETIC sets.

    Args:
        name: "corpus" (red cells, white cells, platelets; varied smears), "development" (five white cells) or
            "external" (the same five with another stain and scanner). No smear is in two sets.
        n: Number of images; 0 for the set's default.
        image_size: Side in pixels.
        seed: Non-negative seed.

    Returns:
        The set, with masks, and with its name in `columns["source"]`.
    """
    if name not in SOURCES:
        raise UserError(f"phantoms: no set {name!r}; {nearest(name, SOURCES)}")
    if n < 0:
        raise UserError(f"phantoms: n={n}; expected the number of images, or 0 for the usual")
    source = SOURCES[name]
    drawn = cells(
        n or source.images,
        size=image_size,
        stain=source.stain,
        seed=seed * len(SOURCES) + source.number,
        kind=source.kind,
    )
    names = [f"phantom/{name}/{seed}/{index:06d}" for index in range(len(drawn.labels))]
    return Dataset(
        name=f"phantoms-{name}",
        images=ImageStore.from_arrays(drawn.images, image_size, names),
        labels=drawn.labels,
        classes=LEUKOCYTES if source.kind == "leukocytes" else SMEAR_OBJECTS,
        groups=drawn.smears,
        columns={"source": np.full(len(drawn.labels), name)},
        masks=drawn.masks,
    )


def write(out: Path, n: int = 0, size: int = 96, seed: int = 0) -> Path:
    """Write the three sets as PNG files with one manifest.

    Args:
        out: Output folder for `SET/images/*.png`, `SET/masks/*.png` and `manifest.csv`.
        n: Number of images in each set; 0 for each set's default.
        size: Side in pixels.
        seed: Non-negative seed.

    Returns:
        Path of the manifest.
    """
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "mask", "patient", "source"])
        for name in SOURCES:
            dataset = load_phantoms(name, n, size, seed)
            for part in ("images", "masks"):
                (out / name / part).mkdir(parents=True, exist_ok=True)
            masks = dataset.load_masks()
            for index, label in enumerate(dataset.labels):
                image, mask = f"{name}/images/{index:06d}.png", f"{name}/masks/{index:06d}.png"
                Image.fromarray(dataset.images[index]).save(out / image)
                Image.fromarray(masks[index]).save(out / mask)
                writer.writerow([image, dataset.classes[label], mask, dataset.groups[index], name])
    return manifest


def main(arguments: Sequence[str] | None = None) -> None:
    """Write phantoms from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dapt_jax.data.phantoms",
        description="Write SYNTHETIC blood-smear phantoms with a manifest.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--n", type=int, default=0, help="images in each set (0: 2000, 400 and 200)")
    parser.add_argument("--size", type=int, default=96, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    manifest = write(options.out, options.n, options.size, options.seed)
    print(f"wrote {manifest}: SYNTHETIC images; set names are in its column 'source'")


if __name__ == "__main__":
    main()
