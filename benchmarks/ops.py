"""What each formulation of a convolution for XLA:CPU is worth: against `lax`'s, and against a large matrix product.

    python -m benchmarks.ops --json out.json

Rows are the shapes of ResNet-50 and EfficientNet-Lite0 at 128 px, and their three computations: `forward`,
`images` (the gradient with respect to them) and `kernel`. FLOPs are those of the direct sum without padding
taps, so a formulation that needs fewer multiplications may pass the matrix product. The formulations take
turns; times are medians.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from dapt_jax import ops
from dapt_jax.cost import flops
from dapt_jax.ops.choice import Formulation
from dapt_jax.runtime import allocator

LARGE = (4096, 1024, 4096)
PASSES = ("forward", "images", "kernel")


class Shape(NamedTuple):
    """A convolution whose kernel is square, padded by half of it."""

    name: str
    side: int
    inputs: int
    outputs: int
    size: int
    stride: int = 1
    groups: int = 1


SHAPES = (
    Shape("stem", 128, 3, 64, 7, 2),
    Shape("3x3", 32, 64, 64, 3),
    Shape("3x3", 16, 128, 128, 3),
    Shape("3x3", 8, 256, 256, 3),
    Shape("3x3", 4, 512, 512, 3),
    Shape("3x3", 16, 256, 256, 3, 2),
    Shape("1x1", 32, 64, 256, 1),
    Shape("1x1", 32, 256, 64, 1),
    Shape("1x1", 8, 1024, 256, 1),
    Shape("depthwise", 32, 144, 144, 3, 1, 144),
    Shape("depthwise", 8, 672, 672, 5, 1, 672),
)


def computation(shape: Shape, kind: str) -> Callable[..., jax.Array]:
    """Images, kernel and a gradient of the output to the result of one pass; a new function each time, for jit's sake."""
    pad = shape.size // 2
    conv = functools.partial(
        ops.conv, stride=shape.stride, padding=((pad, pad), (pad, pad)), groups=shape.groups
    )

    def run(x: jax.Array, kernel: jax.Array, g: jax.Array) -> jax.Array:
        if kind == "forward":
            return conv(x, kernel)
        return jax.vjp(conv, x, kernel)[1](g)[kind == "kernel"]

    return run


def operands(shape: Shape, batch: int, dtype: str) -> tuple[jax.Array, ...]:
    """Random images, kernel and gradient of the output."""
    rng, after = np.random.default_rng(0), -(-shape.side // shape.stride)
    shapes = (
        (batch, shape.side, shape.side, shape.inputs),
        (shape.size, shape.size, shape.inputs // shape.groups, shape.outputs),
        (batch, after, after, shape.outputs),
    )
    return tuple(jnp.asarray(rng.standard_normal(each, np.float32), dtype) for each in shapes)


def timed(
    functions: dict[str, Callable[..., jax.Array]], operands: tuple[jax.Array, ...], rounds: int
) -> common.Row:
    """Median seconds of each function; they take turns."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*operands))
            if number:  # the first call fills caches
                found[name].append(time.perf_counter() - start)
    return {name: common.middle(seconds) for name, seconds in found.items()}


def compiled(
    name: Formulation, run: Callable[..., jax.Array], operands: tuple[jax.Array, ...]
) -> Callable[..., jax.Array]:
    """One formulation of a computation, as a program."""
    with ops.formulation(name):
        return jax.jit(run).lower(*operands).compile()


def main(arguments: list[str] | None = None) -> None:
    """Measures every shape and pass and prints the table."""
    parser = common.parser(__doc__, rounds=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kinds", default="stem,3x3,1x1,depthwise")
    options = parser.parse_args(arguments)
    large = [jnp.ones(sides, options.dtype) for sides in (LARGE[:2], LARGE[1:])]
    product = jax.jit(jnp.matmul).lower(*large).compile()
    seconds = timed({"product": product}, tuple(large), options.rounds)["product"]
    peak = 2 * float(np.prod(LARGE)) / seconds / 1e9
    rows: list[common.Row] = []
    for shape in (shape for shape in SHAPES if shape.name in common.words(options.kinds)):
        given = operands(shape, options.batch, options.dtype)
        with ops.formulation("lax"):
            gflop = flops.count(computation(shape, "forward"), *given).model / 1e9
        for kind in PASSES:
            programs = {name: compiled(name, computation(shape, kind), given) for name in ("lax", "cpu")}
            found = timed(programs, given, options.rounds)
            row = {
                "op": shape.name,
                "side": shape.side,
                "in": shape.inputs,
                "out": shape.outputs,
                "stride": shape.stride,
            }
            row |= {"pass": kind, "lax ms": 1000 * found["lax"], "cpu ms": 1000 * found["cpu"]}
            row |= {"cpu GFLOP/s": gflop / found["cpu"], "of product": gflop / found["cpu"] / peak}
            rows.append({**row, "lax / cpu": found["lax"] / found["cpu"]})
    title = (
        f"convolutions, batch {options.batch}, {options.dtype}; a product {LARGE} runs at {peak:.0f} GFLOP/s"
    )
    common.report(options, title, rows, product=peak)


if __name__ == "__main__":
    allocator.restart_with_settings()
    main()
