"""Sliding-window segmentation of images larger than the training size."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from dapt_jax.errors import UserError
from dapt_jax.losses import SegmentationLoss
from dapt_jax.models.network import Network


@functools.cache
def probabilities_of(model: Network, objective: SegmentationLoss) -> Callable[..., jax.Array]:
    """Return the jitted function from parameters, statistics and images to probabilities of every pixel."""
    return jax.jit(
        lambda params, batch_stats, images: objective.probabilities(model(params, batch_stats, images))
    )


@functools.cache
def decide(objective: SegmentationLoss) -> Callable[..., jax.Array]:
    """Return the jitted function from probabilities to masks."""
    return jax.jit(objective.decide)


def corners(side: int, window: int, overlap: float) -> list[int]:
    """Return window starts along a side: evenly spaced, neighbours share at least `overlap`."""
    if window >= side:
        return [0]
    most = max(1, int(window * (1 - overlap)))
    count = -(-(side - window) // most) + 1
    return [round(corner) for corner in np.linspace(0, side - window, count)]


def border(window: int, overlap: float) -> int:
    """Return how many pixels images are mirrored beyond their border: the overlap, at most half a window."""
    return min(int(window * overlap), window // 2)


def weights(window: int) -> Float[np.ndarray, "w w"]:
    """Return weights of a window's pixels: a Gaussian about its centre, deviation an eighth of the side.

    Predictions near the border of a window, where the network sees least around, count least (Isensee et al.,
    arXiv 1809.10486).
    """
    offsets = (np.arange(window) - (window - 1) / 2) / (window / 8)
    one = np.exp(-0.5 * offsets**2)
    return np.maximum(np.outer(one, one), 1e-3).astype(np.float32)


def sliding(
    predict: Callable[[np.ndarray], Any],
    images: UInt8[np.ndarray, "k h w c"],
    window: int,
    overlap: float = 0.5,
    batch_size: int = 16,
) -> Float[np.ndarray, "k h w outputs"]:
    """Return probabilities of large images, averaged over overlapping windows.

    Images are mirrored beyond their border by the overlap, which makes edges as good as the middle: inside an
    image, the window that counts most for a pixel reaches beyond it by half an overlap or more. At an edge, the
    only window would end at the pixel itself, where a network sees its own padding instead of surroundings
    (and layers of stride 2 pad the last row and column alone: right and lower edges were worst).

    Args:
        predict: Function from windows [batch, window, window, c], in batches of one shape, to pixel
            probabilities.
        images: Images of any size from `window` on.
        window: Side of a window in pixels.
        overlap: Least share of a window that neighbours have in common.
        batch_size: Windows at a time.

    Raises:
        UserError: A side of the images is smaller than the window, or the overlap is not from 0 to less than
            1.
    """
    height, width = images.shape[1:3]
    if min(height, width) < window:
        raise UserError(f"images of {height} x {width} pixels; expected at least the window of {window}")
    if not 0 <= overlap < 1:
        raise UserError(f"an overlap of {overlap}; expected 0 to less than 1")
    margin = border(window, overlap) if max(height, width) > window else 0
    edges = (margin, margin)
    mirrored = np.pad(images, ((0, 0), edges, edges, (0, 0)), mode="reflect")
    windows = [
        (number, top, left)
        for number in range(len(images))
        for top in corners(height + 2 * margin, window, overlap)
        for left in corners(width + 2 * margin, window, overlap)
    ]
    weight = weights(window)[..., None]
    sides = mirrored.shape[:3]
    total = np.zeros((*sides, 0), np.float32)
    norm = np.zeros((*sides, 1), np.float32)
    for start in range(0, len(windows), batch_size):
        part = windows[start : start + batch_size]
        cut = [mirrored[number, top : top + window, left : left + window] for number, top, left in part]
        filled = np.stack(cut + [cut[-1]] * (batch_size - len(cut)))
        predicted = np.asarray(predict(filled))[: len(part)]
        if not start:
            total = np.zeros((*sides, predicted.shape[-1]), np.float32)
        for (number, top, left), each in zip(part, predicted, strict=True):
            window_of_image = number, slice(top, top + window), slice(left, left + window)
            total[window_of_image] += weight * each
            norm[window_of_image] += weight
    mean = total / norm
    return mean[:, margin : margin + height, margin : margin + width]
