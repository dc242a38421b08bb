"""One step of dapt_jax and of PyTorch, side by side: images/s, GFLOP/s, peak memory and their ratio.

    python -m benchmarks.train_step --json out.json

Rows are model x dtype x what trains: `full` (all but batch norm), `last block` (the last residual block and
what is behind it; the frozen rest is run each time, not cached) and `forward` (images to logits). Each side
is a process of its own with the memory settings of the command and all cores; sides take turns. Both do the
same mathematics: FLOPs are counted once, without padding taps. Ratios are of images/s, dapt_jax to PyTorch,
round by round. Peak memory is the process's, its framework and compiler included. bfloat16 rows are of
`--bfloat16` alone, one step a round: where a processor has no fast products of that type, a step takes many
seconds.
"""

import argparse
import contextlib
import itertools
import json
import resource
import sys

from benchmarks import common, sides
from dapt_jax.runtime import allocator

MODULE = "benchmarks.train_step"
OURS, THEIRS = "dapt_jax", "torch"


def _side(options: common.Row) -> None:
    """Makes one side ready and serves it."""
    if options["side"] == OURS:
        import jax

        from benchmarks import our_step
        from dapt_jax.main import set_up_jax

        set_up_jax()
        jax.config.update("jax_enable_compilation_cache", False)  # so that compiling is measured too
        made = our_step.program(options["model"], tuple(options["trained"]), options["dtype"])
        kind = "forward" if options["strategy"] == our_step.FORWARD else "whole"
        step = our_step.Step(made, options["size"], options["batch"], kind)
    else:
        from benchmarks import torch_side

        step = torch_side.Step(options)

    def measure(steps: int) -> common.Row:
        seconds = step.seconds(steps)
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"seconds": seconds, "peak_mib": peak_mib, "compile_s": getattr(step, "compile_s", 0.0)}

    sides.serve(measure)


def _row(options: argparse.Namespace, model: str, dtype: str, strategy: str) -> tuple[common.Row, common.Row]:
    """Measures both sides of one row.

    Returns:
        The row, and every round.
    """
    from benchmarks import our_step

    trained = our_step.trained_by(model, strategy)
    made = our_step.program(model, trained, dtype)
    flops = our_step.model_flops(made, strategy, options.size) * options.batch
    names = our_step.torch_names(made)
    shared = {
        "model": model,
        "dtype": dtype,
        "strategy": strategy,
        "size": options.size,
        "batch": options.batch,
    }
    shared |= {"trained": trained, "outputs": our_step.CLASSES}
    shared["names"] = (
        [] if strategy == our_step.FORWARD else sorted(names[path] for path in made.mask.trainable)
    )
    row: common.Row = {"model": model, "dtype": dtype, "strategy": strategy, "gflop": flops / 1e9}
    with contextlib.ExitStack() as stack:
        names = [OURS, THEIRS] if common.has_torch() else [OURS]
        started = {name: stack.enter_context(sides.Side(MODULE, {**shared, "side": name})) for name in names}
        found = sides.in_turn(started, options.rounds, options.steps if dtype == "float32" else 1)
    for name, rounds in found.items():
        seconds = [each["seconds"] for each in rounds]
        row[f"{name} images/s"] = options.batch / common.middle(seconds)
        row[f"{name} GFLOP/s"] = flops / common.middle(seconds) / 1e9
        row[f"{name} peak MiB"] = max(each["peak_mib"] for each in rounds)
    row["compile s"] = found[OURS][0]["compile_s"]
    if THEIRS in found:
        ratios = common.ratios(found[THEIRS], found[OURS], "seconds")
        row |= {"ratio": common.middle(ratios), "ratio low": min(ratios), "ratio high": max(ratios)}
    return row, {"row": row, "rounds": found}


def main(arguments: list[str] | None = None) -> None:
    """Measures every row and prints the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--models", default="resnet50,efficientnet_lite0,vit_small")
    parser.add_argument("--strategies", default="full,last block,forward", help="in float32")
    parser.add_argument("--bfloat16", default="full", help="strategies in bfloat16, parameters in float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--steps", type=int, default=5, help="steps of each side per round")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        _side(json.loads(options.side))
        return
    rows, rounds = [], []
    for dtype, strategies in (("float32", options.strategies), ("bfloat16", options.bfloat16)):
        for model, strategy in itertools.product(common.words(options.models), common.words(strategies)):
            row, every = _row(options, model, dtype, strategy)
            rows.append(row)
            rounds.append(every)
            print(json.dumps(row), file=sys.stderr, flush=True)
    title = f"training step, batch {options.batch}, {options.size} px; medians of {options.rounds} rounds"
    common.report(options, title, rows, rounds=rounds)


if __name__ == "__main__":
    allocator.restart_with_settings()
    main()
