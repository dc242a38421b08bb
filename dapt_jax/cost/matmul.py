"""FLOPs of one matrix product or convolution, from its jaxpr equation; a multiply-accumulate is 2 FLOPs."""

import functools
import math
from typing import Any

import numpy as np
from jax.extend import core as jex


def dot_general(eqn: jex.JaxprEqn) -> int:
    """Return 2 x (elements of the result) x (contracted length); the result includes batch dimensions."""
    (contracting, _), _ = eqn.params["dimension_numbers"]
    lhs = _shape(eqn.invars[0])
    return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(lhs[axis] for axis in contracting)


def conv_general_dilated(eqn: jex.JaxprEqn) -> tuple[int, int]:
    """Return the FLOPs of a convolution, without and with the taps that fall on padding.

    Along each spatial axis only the pairs (output position, kernel tap) that read an element of the input
    count: the holes of `lhs_dilation` never do. Without padding taps, a layer's forward pass, its input
    gradient (a convolution dilated by the stride) and its weight gradient (a convolution whose kernel is the
    output) use the same (input, output, tap) triples, so all three have one count. With padding taps the
    forward pass has the textbook `2 * positions * taps * channels_in * channels_out / groups`.

    Returns:
        `(model, padded)`, both in FLOPs.
    """
    params: dict[str, Any] = eqn.params
    numbers = params["dimension_numbers"]
    lhs, rhs, out = (_shape(var) for var in (*eqn.invars[:2], eqn.outvars[0]))
    # The kernel's input-feature dimension is already divided by the feature groups, and the output's batch
    # dimension by the batch groups, so neither count of groups appears below.
    per_tap = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * rhs[numbers.rhs_spec[1]]
    model = padded = per_tap
    for axis in range(len(out) - 2):
        real, every = _pairs(
            lhs[numbers.lhs_spec[axis + 2]],
            rhs[numbers.rhs_spec[axis + 2]],
            out[numbers.out_spec[axis + 2]],
            params["window_strides"][axis],
            int(params["padding"][axis][0]),
            params["lhs_dilation"][axis],
            params["rhs_dilation"][axis],
        )
        model, padded = model * real, padded * every
    return model, padded


@functools.lru_cache(maxsize=4096)
def _pairs(
    length: int, taps: int, positions: int, stride: int, low: int, lhs_dilation: int, rhs_dilation: int
) -> tuple[int, int]:
    """Count the pairs (output position, kernel tap) along one axis.

    Returns:
        The pairs that read an input element, and the pairs that read an input element or padding. Padding
        continues the grid of the dilated input, so its holes count in neither.
    """
    starts = np.arange(positions)[:, None] * stride - low
    where = starts + np.arange(taps)[None, :] * rhs_dilation
    on_grid = where % lhs_dilation == 0
    inside = (where >= 0) & (where <= (length - 1) * lhs_dilation)
    return int(np.count_nonzero(on_grid & inside)), int(np.count_nonzero(on_grid))


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)
