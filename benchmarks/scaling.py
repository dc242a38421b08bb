"""How the cost of a training step grows with batch, image size and what lies above the boundary, against its FLOPs.

    python -m benchmarks.scaling --json out.json

Along batch and size, `exponent` is the slope of log time against log batch or log size, and `of FLOPs` that
of the FLOPs: 1 and 2 but for what padding taps and rounded sizes do to them. Along the boundary the steps
start from cached activations and both are slopes against FLOPs, so the latter is 1. Time that grows more
slowly than FLOPs is overhead that larger work hides; more quickly, memory.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks import common, our_step
from dapt_jax.main import set_up_jax
from dapt_jax.models.classifier import HEAD
from dapt_jax.runtime import allocator
from dapt_jax.training import accounting

BATCH, SIZE, BOUNDARY = "batch", "size", "boundary"


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent of a power law by least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def point(model: str, axis: str, value: int, size: int, batch: int, steps: int) -> common.Row:
    """One measurement: of a full step, or of the step above a boundary."""
    groups = our_step.program(model, (HEAD,)).model.encoder.groups
    made = our_step.program(model, (*groups[value:], HEAD) if axis == BOUNDARY else ("*",))
    cost = accounting.image_cost(made, size)
    seconds = our_step.Step(made, size, batch, "cached" if axis == BOUNDARY else "whole").seconds(steps)
    gflop = cost.suffix.model * batch / 1e9
    return {"axis": axis, "value": value, "GFLOP": gflop, "ms": 1000 * seconds, "GFLOP/s": gflop / seconds}


def fitted(rows: list[common.Row]) -> list[common.Row]:
    """The points of one axis with the exponents that they give."""
    x = [row["GFLOP"] if row["axis"] == BOUNDARY else row["value"] for row in rows]
    exponents = [slope(x, [row[key] for row in rows]) for key in ("ms", "GFLOP")]
    return [{**row, "exponent": exponents[0], "of FLOPs": exponents[1]} for row in rows]


def main(arguments: list[str] | None = None) -> None:
    """Measures the three axes and prints the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batches", default="4,8,16,32")
    parser.add_argument("--sizes", default="64,96,128,160")
    parser.add_argument("--boundaries", default="3,7,10,13,15", help="groups below the boundary")
    parser.add_argument("--batch", type=int, default=16, help="along size and boundary")
    parser.add_argument("--size", type=int, default=96, help="along batch and boundary")
    parser.add_argument("--steps", type=int, default=3, help="per round; the median of all rounds counts")
    options = parser.parse_args(arguments)
    set_up_jax()
    steps = options.steps * options.rounds
    batches, sizes, below = (
        common.numbers(text) for text in (options.batches, options.sizes, options.boundaries)
    )
    axes = [
        [point(options.model, BATCH, batch, options.size, batch, steps) for batch in batches],
        [point(options.model, SIZE, size, size, options.batch, steps) for size in sizes],
        [point(options.model, BOUNDARY, groups, options.size, options.batch, steps) for groups in below],
    ]
    rows = [row for axis in axes for row in fitted(axis)]
    title = f"scaling of {options.model}: batch {options.batch}, {options.size} px where not varied"
    common.report(options, f"{title}; medians of {steps} steps", rows)


if __name__ == "__main__":
    allocator.restart_with_settings()
    main()
