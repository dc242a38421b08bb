"""Crops of images at test time."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Shaped


def centre(images: Shaped[np.ndarray, "b h w c"], side: int) -> Shaped[np.ndarray, "b side side c"]:
    """Return the central square; if it cannot be exactly central, it lies half a pixel up and left."""
    top, left = ((whole - side) // 2 for whole in images.shape[1:3])
    return images[:, top : top + side, left : left + side]


def ten(images: Shaped[np.ndarray, "b h w c"], side: int) -> Iterator[Shaped[np.ndarray, "b side side c"]]:
    """Yield the four corners and the centre, then their mirror images (Krizhevsky et al., 2012)."""
    for seen in (images, images[:, :, ::-1]):
        yield seen[:, :side, :side]
        yield seen[:, :side, -side:]
        yield seen[:, -side:, :side]
        yield seen[:, -side:, -side:]
        yield centre(seen, side)
