"""Crops of images at test time."""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from jaxtyping import Array, Shaped

Pixels = TypeVar("Pixels", np.ndarray, Array)
"""Images in memory, or within a program."""


def seen(images: Shaped[Pixels, "b h w c"], side: int, number: int) -> list[Shaped[Pixels, "b side side c"]]:
    """Return the squares of which a network sees each image: ten of them, or the central one for `number` 1."""
    return list(ten(images, side)) if number == 10 else [centre(images, side)]


def centre(images: Shaped[Pixels, "b h w c"], side: int) -> Shaped[Pixels, "b side side c"]:
    """Return the central square; if it cannot be exactly central, it lies half a pixel up and left."""
    top, left = ((whole - side) // 2 for whole in images.shape[1:3])
    return images[:, top : top + side, left : left + side]


def ten(images: Shaped[Pixels, "b h w c"], side: int) -> Iterator[Shaped[Pixels, "b side side c"]]:
    """Yield the four corners and the centre, then their mirror images (Krizhevsky et al., 2012)."""
    for seen in (images, images[:, :, ::-1]):
        yield seen[:, :side, :side]
        yield seen[:, :side, -side:]
        yield seen[:, -side:, :side]
        yield seen[:, -side:, -side:]
        yield centre(seen, side)
