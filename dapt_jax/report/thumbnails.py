"""Small images of a page: contact sheets of the sets, and examples of predictions."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from dapt_jax.records import samples
from dapt_jax.records.study_records import Records
from dapt_jax.report.style import COLOURS

_SIDE = 192
_QUALITY = 80

SALIENCY = "saliency"
"""Title of a thumbnail that shows the saliency of the one before it."""
RED, BLUE = (214, 39, 40), (31, 119, 180)

Thumbnail = dict[str, str]
"""A thumbnail for a template: `data` (base64 of a JPEG), `alt`, `title` and `words`."""


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return the colour of the outline of each segment."""
    return {name: COLOURS[(1 + place) % len(COLOURS)] for place, name in enumerate(names)}


def jpeg(
    image: np.ndarray,
    regions: Mapping[str, np.ndarray] | None = None,
    quality: int = _QUALITY,
    side: int = _SIDE,
) -> str:
    """Return an image with the outlines of its segments as base64 of a JPEG.

    Args:
        image: uint8 [h, w, 3].
        regions: Pixels of each segment, bool [h, w].
        quality: Quality of the JPEG.
        side: Most pixels of a side; a smaller image is enlarged by a whole factor.
    """
    regions = regions or {}
    factor = max(1, side // max(image.shape[:2]))
    drawn = image.repeat(factor, 0).repeat(factor, 1)
    for name, colour in colours(list(regions)).items():
        region = regions[name].repeat(factor, 0).repeat(factor, 1)
        outline = region & ~ndimage.binary_erosion(region, iterations=2 if factor > 1 else 1)
        drawn[outline] = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    picture = Image.fromarray(drawn)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=0)
    return base64.b64encode(file.getvalue()).decode()


def sheets(workdir: Path) -> list[tuple[str, list[Thumbnail]]]:
    """Return a title and the thumbnails of each set of a study."""
    found = []
    for sheet in samples.read_sheets(workdir):
        images = [
            {
                "data": jpeg(image, side=128),
                "alt": f"Image of {sheet.title}",
                "title": str(label),
                "words": "",
            }
            for image, label in zip(sheet.images, sheet.labels, strict=True)
        ]
        shown = f"{sheet.title}: {len(images)} of {sheet.count:,} images, {sheet.size} x {sheet.size} pixels"
        found.append((shown, images))
    return found


def examples(workdir: Path, records: Records, task: str, strategy: str) -> list[tuple[str, list[Thumbnail]]]:
    """Return a title and the thumbnails of each kind of examples of a strategy, by split."""
    found = []
    for seed in records.seeds[:1]:
        for split in records.splits(task):
            if (each := samples.read_examples(workdir, strategy, seed, task, split)) is None:
                continue
            for kind in samples.KINDS:
                rows = np.flatnonzero(each.kinds == kind).tolist()
                title = f"{split}, {kind}: {strategy} seed {seed}, {each.protocol}"
                if rows:
                    found.append((title, [drawn for row in rows for drawn in _example(each, row)]))
    return found


def saliency_words(shown: Sequence[tuple[str, list[Thumbnail]]]) -> str:
    """Return what saliency beside examples is and is not; empty where there is none."""
    if not any(each["title"] == SALIENCY for _, images in shown for each in images):
        return ""
    return (
        "Saliency is by occlusion: one square of the image after another is replaced by the mean colour of the "
        "image. Where it is red, the probability of the predicted class falls without the square; where it is "
        "blue, it rises. The strongest colour is the largest change in that image. "
        "It shows what this one prediction depends on. It does not show that the reason is medically sound, "
        "where a finding is, or what other predictions depend on. Parts that can replace one another are not "
        "marked."
    )


def _example(found: samples.Examples, row: int) -> list[Thumbnail]:
    """Return the thumbnail of an example, and that of its saliency where it is known."""
    truth, said = str(found.labels[row]), str(found.predicted[row])
    words = f"predicted {said}, {found.probabilities[row]:.2f}"
    image = {
        "data": jpeg(found.images[row], side=128),
        "alt": f"Image of the class {truth}, {words}",
        "title": f"true {truth}",
        "words": f"{words}; {found.names[row]}",
    }
    drops = None if found.saliency is None else found.saliency[row]
    if drops is None or not np.isfinite(drops).all():
        return [image]
    fall, rise = float(drops.max()), -float(drops.min())
    changes = [
        f"{verb} by up to {size:.2f}" for verb, size in (("falls", fall), ("rises", rise)) if size >= 0.005
    ]
    change = f"{said} {', '.join(changes) or 'does not depend on one square'}"
    saliency = {
        "data": jpeg(heat(found.images[row], drops), side=128),
        "alt": f"Occlusion saliency of the image before it: {change}",
        "title": SALIENCY,
        "words": change,
    }
    return [image, saliency]


def heat(image: np.ndarray, drops: np.ndarray) -> np.ndarray:
    """Return an image in grey with its saliency in colour, uint8 [h, w, 3].

    Args:
        image: uint8 [h, w, 3].
        drops: float [rows, columns], above 0 drawn red and below 0 blue, relative to the largest magnitude.
    """
    size = (image.shape[1], image.shape[0])
    strength = drops / max(float(np.abs(drops).max()), 1e-6)
    strength = np.asarray(Image.fromarray(strength.astype(np.float32)).resize(size, Image.Resampling.NEAREST))
    grey = image.mean(2, keepdims=True).repeat(3, 2)
    opacity = 0.65 * np.abs(strength)[..., None]
    colour = np.where(strength[..., None] > 0, RED, BLUE)
    return np.asarray((1 - opacity) * grey + opacity * colour).round().astype(np.uint8)
