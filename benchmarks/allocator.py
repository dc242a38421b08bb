"""What the memory settings of `dapt_jax.runtime.allocator` are worth: one training step with and without them, in turn.

    python -m benchmarks.allocator --json allocator.json

Each side is a process of its own, since glibc reads the settings when a process starts. `faults` and `system
s` are page faults and seconds in the kernel per step; the ratio of images/s is taken round by round.
"""

import argparse
import json
import os
import resource

from benchmarks import common, sides
from dapt_jax.runtime import allocator

MODULE = "benchmarks.allocator"


def _side(options: common.Row) -> None:
    """Serves full training steps of a model."""
    from benchmarks import our_step
    from dapt_jax.main import set_up_jax

    set_up_jax()
    step = our_step.Step(our_step.program(options["model"], ("*",)), options["size"], options["batch"])

    def measure(steps: int) -> common.Row:
        before = resource.getrusage(resource.RUSAGE_SELF)
        seconds = step.seconds(steps)
        after = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "images/s": options["batch"] / seconds,
            "faults": (after.ru_minflt - before.ru_minflt) / steps,
            "system s": (after.ru_stime - before.ru_stime) / steps,
        }

    sides.serve(measure)


def main(arguments: list[str] | None = None) -> None:
    """Measures both sides and prints the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="per round")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        _side(json.loads(options.side))
        return
    plain = {
        name: value
        for name, value in os.environ.items()
        if name not in (*allocator.SETTINGS, allocator.SWITCH)
    }
    environments = {"as the command sets": {**plain, **allocator.SETTINGS}, "glibc's own": plain}
    shared = {"model": options.model, "size": options.size, "batch": options.batch}
    started = {name: sides.Side(MODULE, shared, environment) for name, environment in environments.items()}
    found = sides.in_turn(started, options.rounds, options.steps)
    for side in started.values():
        side.close()
    ratios = common.ratios(*found.values(), "images/s")
    rows = [
        {
            "memory settings": name,
            "model": options.model,
            **{key: common.middle([each[key] for each in rounds]) for key in rounds[0]},
            "lowest images/s": min(each["images/s"] for each in rounds),
            "highest images/s": max(each["images/s"] for each in rounds),
            "ratio": common.middle(ratios) if number == 0 else 1.0,
        }
        for number, (name, rounds) in enumerate(found.items())
    ]
    title = f"full step of {options.model}, {options.size} px, batch {options.batch}; medians of {options.rounds} rounds"
    common.report(options, title, rows, rounds=found)


if __name__ == "__main__":
    main()
