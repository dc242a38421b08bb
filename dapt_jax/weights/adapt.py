"""Conversion of arrays to another number of channels, patch grid or attention window."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import numpy as np

from dapt_jax.errors import UserError, nearest
from dapt_jax.models.encoder import Encoder, get_group
from dapt_jax.models.encoders import vit
from dapt_jax.parameters import Kind
from dapt_jax.weights.paths import flatten

Stem = Literal["auto", "sum", "repeat"]
"""Conversion of a stem for three channels to another number of channels; `auto` sums for one channel and
repeats for more."""


class Way(NamedTuple):
    """Function from the file's array, in our layout, to the network's, with its description."""

    convert: Callable[[np.ndarray], np.ndarray]
    words: str


def way(
    encoder: Encoder, path: str, found: tuple[int, ...], wanted: tuple[int, ...], stem: Stem = "auto"
) -> Way | None:
    """Return the conversion of an array to another shape, or None if the difference is an error.

    Args:
        encoder: The network.
        path: Path of the array.
        found: Shape in the file, in our layout.
        wanted: Shape in the network.
        stem: Conversion of the kernel that reads the images.

    Raises:
        UserError: `stem` is none of the three choices.
    """
    if path == first_kernel(encoder) and _differ_at(found, wanted, 2):
        return _channels(found[2], wanted[2], stem)
    kind = encoder.kinds.get(path)
    if kind is Kind.POSITION and _differ_at(found, wanted, 1):
        sides = [round((shape[1] - 1) ** 0.5) for shape in (found, wanted)]
        if [side**2 + 1 for side in sides] == [found[1], wanted[1]]:
            words = f"positions resampled from {sides[0]} x {sides[0]} to {sides[1]} x {sides[1]} patches"
            return Way(lambda array: np.asarray(vit.resampled(jax.numpy.asarray(array), sides[1])), words)
    if kind is Kind.RELATIVE_POSITION_BIAS and _differ_at(found, wanted, 0):
        sides = [round(shape[0] ** 0.5) for shape in (found, wanted)]
        if [side**2 for side in sides] == [found[0], wanted[0]]:
            old, new = ((side + 1) // 2 for side in sides)
            words = f"biases resampled from a window of {old} x {old} to {new} x {new}"
            return Way(lambda array: _windows(array, sides[0], sides[1]), words)
    return None


def first_kernel(encoder: Encoder) -> str:
    """Return the path of the kernel that reads the images."""
    first = encoder.groups[0]
    kernels = flatten(get_group(encoder.abstract()[0], first))
    path = next(
        path for path, leaf in kernels.items() if len(leaf.shape) == 4 and leaf.shape[2] == encoder.channels
    )
    return f"{first}/{path}"


def _differ_at(found: tuple[int, ...], wanted: tuple[int, ...], axis: int) -> bool:
    """Return whether two shapes differ only along one axis."""
    same = (
        len(found) == len(wanted) > axis
        and found[:axis] + found[axis + 1 :] == wanted[:axis] + wanted[axis + 1 :]
    )
    return same and found != wanted


def _channels(old: int, new: int, stem: Stem) -> Way:
    """Return the conversion of a stem's kernel to another number of channels.

    The response to an image with equal channels is unchanged.
    """
    if stem not in ("auto", "sum", "repeat"):
        raise UserError(f"unknown stem {stem!r}; {nearest(stem, ('auto', 'sum', 'repeat'))}")
    if stem == "sum" or (stem == "auto" and new == 1):
        words = f"stem summed from {old} channels to {new}" + (f", a {new}th in each" if new > 1 else "")
        return Way(lambda kernel: np.repeat(kernel.sum(2, keepdims=True) / new, new, 2), words)

    def repeat(kernel: np.ndarray) -> np.ndarray:
        index = np.arange(new) % old
        # A channel repeated k times has 1 / k of its weight.
        return kernel[:, :, index] / np.bincount(index, minlength=old)[index][:, None]

    return Way(repeat, f"stem repeated from {old} channels to {new}")


def _windows(table: np.ndarray, old: int, new: int) -> np.ndarray:
    """Return a table of relative positions resized to another window by bicubic interpolation."""
    grid = jax.numpy.asarray(table).reshape(old, old, -1)
    return np.asarray(jax.image.resize(grid, (new, new, grid.shape[2]), "cubic", antialias=False)).reshape(
        new**2, -1
    )
