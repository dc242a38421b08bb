"""Images that are given as an array rather than as files."""

import numpy as np
from jaxtyping import UInt8

from dapt_jax.errors import UserError

_EXPECTED = "[n, h, w, 3], or [n, h, w] for grey images"


def as_uint8(images: object) -> UInt8[np.ndarray, "n h w c"]:
    """Return an array of images as uint8 with one or three channels, without guessing what its values mean.

    >>> as_uint8(np.full((2, 8, 8), 0.5)).shape
    (2, 8, 8, 1)

    Args:
        images: uint8, or floats from 0 to 1; [n, h, w, 3], [n, h, w, 1] or [n, h, w].

    Raises:
        UserError: The array has another type, shape or range, or no image.
    """
    try:
        found = np.asarray(images)
    except ValueError as error:
        raise UserError(f"images differ in shape; expected one array {_EXPECTED}") from error
    if found.dtype.kind not in "uf":
        raise UserError(f"images are {found.dtype}; expected uint8, or floats from 0 to 1, {_EXPECTED}")
    shape = list(found.shape)
    if found.ndim == 3 and found.shape[-1] in (1, 2, 3, 4):
        raise UserError(f"images are {shape}, one image; expected {_EXPECTED}: images[None]")
    if found.ndim == 3:
        found = found[..., None]
    if found.ndim != 4 or found.shape[-1] not in (1, 3) or not found.size:
        raise UserError(f"images are {shape}; expected {_EXPECTED}")
    if found.dtype.kind == "f":
        if not np.isfinite(found).all() or found.min() < 0 or found.max() > 1:
            raise UserError(
                f"images are floats from {found.min():g} to {found.max():g}; expected 0 to 1, or uint8"
            )
        found = np.rint(found * 255).astype(np.uint8)
    if found.dtype != np.uint8:
        raise UserError(f"images are {found.dtype}; expected uint8, or floats from 0 to 1")
    return found
