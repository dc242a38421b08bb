"""Position of the pixels of a slice in the patient, and the alignment of a mask with its image."""

from dataclasses import dataclass

import numpy as np

_TOLERANCE = 0.25
"""Tolerance for corners, as a fraction of a pixel: headers are rounded, and half a pixel is another pixel."""


@dataclass(frozen=True)
class Geometry:
    """Grid of a slice in world coordinates: millimetres to the right, anterior and superior (RAS+).

    Attributes:
        origin: Centre of the first pixel of the first row, [3].
        down: Step to the next row, [3].
        across: Step to the next pixel of a row, [3].
    """

    origin: np.ndarray
    down: np.ndarray
    across: np.ndarray

    @property
    def spacing(self) -> tuple[float, float]:
        """Height and width of a pixel in millimetres."""
        return float(np.linalg.norm(self.down)), float(np.linalg.norm(self.across))

    def corners(self, shape: tuple[int, int]) -> np.ndarray:
        """Return the world coordinates of the four corner pixels, [4, 3]."""
        down, across = (shape[0] - 1) * self.down, (shape[1] - 1) * self.across
        return np.stack([self.origin, self.origin + down, self.origin + across, self.origin + down + across])

    def turned(self, shape: tuple[int, int], turn: "Turn") -> "Geometry":
        """Return the geometry of an array of this shape after `Turn.apply`."""
        origin, down, across = self.origin, self.down, self.across
        if turn.rows:
            origin, down = origin + (shape[0] - 1) * down, -down
        if turn.columns:
            origin, across = origin + (shape[1] - 1) * across, -across
        return Geometry(origin, across, down) if turn.swap else Geometry(origin, down, across)

    def __str__(self) -> str:
        place, down, across = (
            "(" + ", ".join(f"{value:.4g}" for value in vector) + ")"
            for vector in (self.origin, self.down, self.across)
        )
        return f"first pixel at {place} mm, rows by {down}, columns by {across}"


@dataclass(frozen=True)
class Turn:
    """One of the eight ways to place a rectangle on another: rows and columns reversed, then exchanged."""

    rows: bool
    columns: bool
    swap: bool

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Turn an array [h, w] or [h, w, c]."""
        values = values[:: -1 if self.rows else 1, :: -1 if self.columns else 1]
        return values.swapaxes(0, 1) if self.swap else values

    @property
    def inverse(self) -> "Turn":
        """The inverse of this turn."""
        return Turn(self.columns, self.rows, True) if self.swap else self


_TURNS = [
    Turn(rows, columns, swap) for swap in (False, True) for rows in (False, True) for columns in (False, True)
]


def turn_onto(
    mask: Geometry, mask_shape: tuple[int, int], image: Geometry, image_shape: tuple[int, int]
) -> Turn | None:
    """Return the turn that aligns a mask with its image in world coordinates; None if there is none.

    Args:
        mask: The grid of the mask.
        mask_shape: Height and width of the mask.
        image: The grid of the image.
        image_shape: Height and width of the image.
    """
    wanted = image.corners(image_shape)
    near = _TOLERANCE * min(*image.spacing, *mask.spacing)
    for turn in _TURNS:
        shape = mask_shape[::-1] if turn.swap else mask_shape
        if shape != image_shape:
            continue
        # For a single row or column, the step shows nothing that the corners show: compare the covered area.
        found = mask.turned(mask_shape, turn)
        apart = np.linalg.norm(found.corners(shape) - wanted, axis=1).max()
        steps = max(np.linalg.norm(found.down - image.down), np.linalg.norm(found.across - image.across))
        if apart <= near and steps <= near:
            return turn
    return None
