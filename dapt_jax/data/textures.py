"""SYNTHETIC textures: a generic set for pre-training, without medical images and without photographs.

Twelve families of patterns (gratings, checks, dots, noise of several colours, cells, ...) in random colours,
scales and orientations, under uneven light. An encoder that distinguishes them has learnt edges, scales and
colours, as on natural images.
"""

from collections.abc import Callable

import numpy as np
import scipy

from dapt_jax.data.dataset import Dataset
from dapt_jax.data.decode import ImageStore
from dapt_jax.errors import UserError

Grid = tuple[np.ndarray, np.ndarray]
Pattern = Callable[[np.random.Generator, Grid, float], np.ndarray]


def _noise(rng: np.random.Generator, grid: Grid, power: float) -> np.ndarray:
    """Return noise with an amplitude that decreases with a power of the frequency."""
    size = grid[0].shape[0]
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=(size, size))) * frequency**-power
    return np.fft.irfft2(spectrum, s=(size, size))


def _bumps(rng: np.random.Generator, grid: Grid, scale: float, draw: Callable[..., np.ndarray]) -> np.ndarray:
    """Return the pointwise maximum of several bumps at random places."""
    places = rng.uniform(-1.2, 1.2, (int(rng.integers(12, 30)), 2))
    distances = np.hypot(grid[0][..., None] - places[:, 0], grid[1][..., None] - places[:, 1])
    return draw(np.sort(distances, -1), scale)


PATTERNS: dict[str, Pattern] = {
    "grating": lambda rng, g, s: np.sin(g[0] * s),
    "square_wave": lambda rng, g, s: np.sign(np.sin(g[0] * s)),
    "checks": lambda rng, g, s: np.sign(np.sin(g[0] * s) * np.sin(g[1] * s)),
    "plaid": lambda rng, g, s: np.sin(g[0] * s) + np.sin(g[1] * s * 1.7),
    "rings": lambda rng, g, s: np.sin(np.hypot(g[0], g[1]) * s * 1.5),
    "rays": lambda rng, g, s: np.sin(np.arctan2(g[1], g[0]) * np.round(s / 2 + 2)),
    "waves": lambda rng, g, s: np.sin(g[0] * s + 2 * np.sin(g[1] * s / 2)),
    "white_noise": lambda rng, g, s: _noise(rng, g, 0.0),
    "pink_noise": lambda rng, g, s: _noise(rng, g, 1.0),
    "clouds": lambda rng, g, s: _noise(rng, g, 2.0),
    "dots": lambda rng, g, s: _bumps(rng, g, s, lambda d, s: np.exp(-((d[..., 0] * s) ** 2))),
    "cells": lambda rng, g, s: _bumps(rng, g, s, lambda d, s: np.minimum(d[..., 1] - d[..., 0], 0.2)),
}


def load_textures(name: str = "all", n: int = 3000, image_size: int = 64, seed: int = 0) -> Dataset:
    """Draw SYNTHETIC textures; image i depends on the arguments other than `n` and on i.

    Args:
        name: "all", the only set.
        n: Number of images; classes alternate.
        image_size: Side in pixels, 8 or more.
        seed: Non-negative seed.

    Raises:
        UserError: The set does not exist, or has no images.
    """
    if name != "all" or n < 1 or image_size < 8 or seed < 0:
        raise UserError(
            f"textures: name {name!r}, n={n}, {image_size} pixels, seed {seed}; expected 'all', 1 or more, "
            "8 or more, 0 or more"
        )
    classes = tuple(PATTERNS)
    labels = np.arange(n) % len(classes)
    images = np.stack(
        [
            _draw(np.random.default_rng([seed, index]), classes[labels[index]], image_size)
            for index in range(n)
        ]
    )
    names = [f"texture/{seed}/{index:06d}" for index in range(n)]
    return Dataset(
        name="textures",
        images=ImageStore.from_arrays(images, image_size, names),
        labels=labels,
        classes=classes,
        groups=np.asarray(names),
    )


def _draw(rng: np.random.Generator, name: str, size: int) -> np.ndarray:
    axis = np.linspace(-1, 1, size)
    x, y = np.meshgrid(axis - rng.uniform(-0.5, 0.5), axis - rng.uniform(-0.5, 0.5))
    turn = rng.uniform(0, np.pi)
    grid = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    value = PATTERNS[name](rng, grid, float(rng.uniform(4, 16)))
    value = scipy.ndimage.gaussian_filter(value, float(rng.uniform(0, 0.8)))
    value = (value - value.min()) / max(float(np.ptp(value)), 1e-9)
    low, high = rng.uniform(0, 255, (2, 3))
    light = 1 + rng.uniform(-0.3, 0.3) * x + rng.uniform(-0.3, 0.3) * y
    image = (low + (high - low) * value[..., None]) * light[..., None] + rng.normal(0, 4, (size, size, 3))
    return np.clip(image, 0, 255).astype(np.uint8)
