"""Drawing of SYNTHETIC blood cells: shapes, stains and optics, without any measurement of a patient.

Dyes are added by optical density (Beer-Lambert), so overlapping cells darken each other as under a
microscope. Lengths are in half frames: the frame runs from -1 to 1, and a radius of 0.5 is a quarter of the
image's side.
"""

import io
import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

LEUKOCYTES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil", "basophil")
BACKGROUND, CYTOPLASM, NUCLEUS = 0, 1, 2

# Optical density (red, green, blue) of one unit of each dye.
_EOSIN = (0.13, 0.44, 0.36)
_AZURE = (1.00, 1.35, 0.50)
_BLUE = (0.55, 0.34, 0.10)
_ORANGE = (0.10, 0.62, 0.80)
_DARK = (1.15, 1.30, 0.62)


@dataclass(frozen=True)
class Look:
    """Stain and camera of one smear.

    Attributes:
        light: Colour of the empty background, float32 [3], 0 to 1.
        dyes: Optical densities of eosin, azure, blue, orange and dark granules, float32 [5, 3].
        slope: Change of illumination across the frame, along x and y.
        vignette: Loss of light in the corners.
        scale: Size of every cell relative to the usual size.
        crowd: Mean number of red cells in a frame.
        blur: Radius of the blur in pixels of a 96-pixel image.
        noise: Standard deviation of the sensor's noise, in grey levels.
        quality: JPEG quality of the camera; 0 for none.
    """

    light: np.ndarray
    dyes: np.ndarray
    slope: np.ndarray
    vignette: float
    scale: float
    crowd: float
    blur: float
    noise: float
    quality: int


def draw_look(rng: np.random.Generator, stain: int, spread: float) -> Look:
    """Draw the parameters of one smear.

    Args:
        rng: Random number generator.
        stain: 0 for the development laboratory, 1 for another stain and scanner.
        spread: Variation of looks between smears; 1 is one laboratory, larger values are many.
    """
    base = np.array([_EOSIN, _AZURE, _BLUE, _ORANGE, _DARK])
    strength = np.exp(rng.normal(0, 0.16 * spread, (5, 1)))
    hue = np.exp(rng.normal(0, 0.06 * spread, (5, 3)))
    light = np.array([0.92, 0.90, 0.90]) + rng.normal(0, 0.02 * spread, 3)
    if stain == 1:
        # More alkaline: eosin turns grey-brown and the nuclei violet, under a warm lamp.
        base = base * np.array(
            [[2.0, 1.0, 1.0], [0.72, 1.0, 1.25], [0.8, 1.2, 2.2], [1.6, 0.85, 0.6], [0.75, 0.95, 1.1]]
        )
        light = light * np.array([1.03, 0.97, 0.90])
    return Look(
        light=np.clip(light, 0, 1).astype(np.float32),
        dyes=(base * strength * hue).astype(np.float32),
        slope=rng.normal(0, 0.05, 2),
        vignette=rng.uniform(0.08, 0.22) if stain == 1 else rng.uniform(0, 0.05),
        scale=(0.85 if stain == 1 else 1.0) * np.exp(rng.normal(0, 0.05 * spread)),
        crowd=rng.uniform(4, 12),
        blur=rng.uniform(0.9, 1.5) if stain == 1 else rng.uniform(0.3, 0.9),
        noise=rng.uniform(4, 8) if stain == 1 else rng.uniform(1.5, 4),
        quality=int(rng.integers(30, 60)) if stain == 1 else 0,
    )


class Canvas:
    """An image under construction: the amount of each dye and the mask at every pixel."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size = rng, size
        axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
        self.x, self.y = axis[None, :], axis[:, None]
        self.dyes = np.zeros((5, size, size), np.float32)
        self.mask = np.zeros((size, size), np.uint8)
        self.edge = np.float32(3.0 / size)

    def noise(self, cells: int) -> np.ndarray:
        """Return smooth noise with `cells` bumps across the frame, float32 [size, size], std about 0.7."""
        coarse = self.rng.standard_normal((cells, cells), dtype=np.float32)
        return np.asarray(Image.fromarray(coarse).resize((self.size, self.size), Image.Resampling.BICUBIC))

    def depth(
        self, x: float, y: float, radius: float, stretch: float = 1.0, angle: float = 0.0
    ) -> np.ndarray:
        """Return the distance inside the border of an ellipse (negative outside), float32 [size, size]."""
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        dx, dy = self.x - np.float32(x), self.y - np.float32(y)
        u, v = (dx * cos + dy * sin) / np.float32(stretch), (dy * cos - dx * sin) * np.float32(stretch)
        return np.float32(radius) - np.sqrt(u * u + v * v)

    def cover(self, depth: np.ndarray) -> np.ndarray:
        """Convert distances inside a border to coverage from 0 to 1."""
        return np.clip(depth / self.edge + np.float32(0.5), 0, 1)

    def specks(self, cells: int, threshold: float, contrast: float = 4.0) -> np.ndarray:
        """Return granules: the peaks of smooth noise, float32 [size, size] from 0 to 1."""
        return np.clip((self.noise(cells) - np.float32(threshold)) * np.float32(contrast), 0, 1)


def draw_red_cell(canvas: Canvas, x: float, y: float, radius: float) -> None:
    """Add a red cell: a disc of eosin, paler in its middle."""
    rng = canvas.rng
    inside = canvas.depth(x, y, radius, np.exp(rng.normal(0, 0.08)), rng.uniform(0, np.pi))
    pallor = np.float32(rng.uniform(0.25, 0.8)) * canvas.cover(
        (inside - np.float32(0.55 * radius)) * np.float32(0.25)
    )
    canvas.dyes[0] += canvas.cover(inside) * (np.float32(rng.uniform(0.75, 1.05)) - pallor)


def draw_red_cells(canvas: Canvas, look: Look, clear: float) -> None:
    """Scatter red cells over the frame; few of them reach into the `clear` radius around its centre."""
    rng = canvas.rng
    for x, y in rng.uniform(-1.25, 1.25, (rng.poisson(look.crowd), 2)):
        radius = look.scale * rng.uniform(0.26, 0.33)
        if np.hypot(x, y) > clear + radius * 0.8:
            draw_red_cell(canvas, x, y, radius)


def draw_platelet(canvas: Canvas, look: Look) -> None:
    """Add a platelet at the centre: a small, granular, violet fragment."""
    rng = canvas.rng
    radius = look.scale * rng.uniform(0.10, 0.18)
    x, y = rng.normal(0, 0.06, 2)
    inside = canvas.depth(
        x, y, radius, np.exp(rng.normal(0, 0.2)), rng.uniform(0, np.pi)
    ) + 0.04 * canvas.noise(12)
    canvas.dyes[1] += canvas.cover(inside) * (0.25 + 0.3 * canvas.specks(28, 0.0))


def draw_leukocyte(canvas: Canvas, look: Look, kind: str) -> None:
    """Draw a white cell of one of the five types at the centre, over the other cells, and its mask."""
    rng = canvas.rng
    low, high = {"lymphocyte": (0.36, 0.56), "monocyte": (0.50, 0.68)}.get(kind, (0.44, 0.60))
    radius = look.scale * rng.uniform(low, high)
    x, y = rng.normal(0, 0.07, 2)
    wobble = canvas.noise(6)
    ragged = 0.05 if kind == "monocyte" else 0.025
    inside = canvas.depth(x, y, radius, np.exp(rng.normal(0, 0.06)), rng.uniform(0, np.pi)) + ragged * wobble
    cell = canvas.cover(inside)
    core = np.minimum(_nucleus(canvas, kind, x, y, radius) + 0.022 * wobble.T, inside - 0.02)
    nucleus = canvas.cover(core)
    canvas.dyes *= 1 - cell

    body = cell * (1 - nucleus)
    texture = 1 + 0.2 * canvas.noise(24)
    pink, blue = {
        "neutrophil": (0.30, 0.16),
        "lymphocyte": (0.08, 0.50),
        "monocyte": (0.14, 0.46),
        "eosinophil": (0.30, 0.12),
        "basophil": (0.22, 0.22),
    }[kind]
    canvas.dyes[0] += body * texture * np.float32(pink * np.exp(rng.normal(0, 0.35)))
    canvas.dyes[2] += body * texture * np.float32(blue * np.exp(rng.normal(0, 0.35)))
    depth_of_stain = np.float32((0.8 if kind == "basophil" else 1.0) * np.exp(rng.normal(0, 0.15)))
    canvas.dyes[1] += nucleus * depth_of_stain * (1 + 0.16 * canvas.noise(16))

    if kind == "neutrophil":
        canvas.dyes[1] += body * canvas.specks(44, 0.3) * np.float32(rng.uniform(0.1, 0.35))
    elif kind == "eosinophil":
        canvas.dyes[3] += body * canvas.specks(30, -0.1) * np.float32(rng.uniform(0.45, 1.0))
    elif kind == "basophil":
        granules = cell * (1 - 0.5 * nucleus)
        canvas.dyes[4] += (
            granules * canvas.specks(22, rng.uniform(0.1, 0.5)) * np.float32(rng.uniform(0.6, 1.0))
        )
    elif kind == "monocyte":
        canvas.dyes *= 1 - 0.6 * body * canvas.specks(18, 0.8)

    canvas.mask[cell > 0.5] = CYTOPLASM
    canvas.mask[nucleus > 0.5] = NUCLEUS


def _nucleus(canvas: Canvas, kind: str, x: float, y: float, radius: float) -> np.ndarray:
    """Return the distance inside the border of the nucleus, float32 [size, size]."""
    rng = canvas.rng
    turn = rng.uniform(0, 2 * np.pi)
    if kind == "lymphocyte":
        shift = rng.uniform(0, 0.14) * radius
        share = rng.uniform(0.70, 0.90)
        return canvas.depth(x + shift * np.cos(turn), y + shift * np.sin(turn), share * radius, 1.04, turn)
    if kind == "monocyte":
        share, notch = rng.uniform(0.60, 0.76), rng.uniform(0.20, 0.55)
        whole = canvas.depth(x, y, share * radius, np.exp(rng.normal(0.12, 0.06)), turn)
        away = share + 0.35 - 0.55 * notch
        bay = canvas.depth(x - away * radius * np.sin(turn), y + away * radius * np.cos(turn), notch * radius)
        return np.minimum(whole, -bay)
    band = kind == "neutrophil" and rng.random() < 0.18
    if band:
        lobes, span, orbit, share = 9, rng.uniform(3.2, 4.4), 0.48, rng.uniform(0.20, 0.26)
    elif kind == "neutrophil":
        lobes = int(rng.choice([2, 3, 4, 5], p=[0.2, 0.4, 0.3, 0.1]))
        span, orbit, share = 1.45 * (lobes - 1), 0.44, rng.uniform(0.25, 0.33)
    elif kind == "eosinophil":
        lobes = int(rng.choice([2, 3], p=[0.8, 0.2]))
        span, orbit, share = rng.uniform(1.9, 2.7) * (lobes - 1) * 0.8, 0.44, rng.uniform(0.30, 0.38)
    else:
        lobes, span, orbit, share = 3, 3.6, 0.30, rng.uniform(0.34, 0.44)
    angles = turn + np.linspace(0, span, lobes) + (0 if band else 1) * rng.normal(0, 0.12, lobes)
    core = np.full((canvas.size, canvas.size), -2, np.float32)
    for angle in angles:
        lobe = share * radius * (1 if band else rng.uniform(0.85, 1.15))
        place = orbit * radius
        core = np.maximum(core, canvas.depth(x + place * np.cos(angle), y + place * np.sin(angle), lobe))
    for first, second in itertools.pairwise(angles):
        # The thread between neighbouring lobes.
        place = orbit * radius * np.cos((second - first) / 2)
        middle = (first + second) / 2
        thread = canvas.depth(
            x + place * np.cos(middle), y + place * np.sin(middle), 0.17 * radius, 1.6, middle + np.pi / 2
        )
        core = np.maximum(core, thread)
    return core


def photograph(canvas: Canvas, look: Look) -> np.ndarray:
    """Render the dyes on a canvas with the camera of `look`, uint8 [size, size, 3]."""
    rng, size = canvas.rng, canvas.size
    density = look.dyes.T @ canvas.dyes.reshape(5, -1)
    lamp = 1 + np.float32(look.slope[0]) * canvas.x + np.float32(look.slope[1]) * canvas.y
    lamp = lamp * (1 - np.float32(look.vignette) * (canvas.x**2 + canvas.y**2) * 0.5)
    pixels = np.exp(-density).reshape(3, size, size).transpose(1, 2, 0) * (look.light * 255) * lamp[..., None]
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(look.blur * size / 96))
    grain = rng.standard_normal((size, size, 3), dtype=np.float32) * np.float32(look.noise)
    pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
    if not look.quality:
        return pixels
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=look.quality)
    with Image.open(file) as image:
        return np.asarray(image)
