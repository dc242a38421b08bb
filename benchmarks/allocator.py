"""What the memory settings of `dapt_jax.allocator` are worth: one training step with and without them, in turn.

    python -m benchmarks.allocator --json allocator.json

Each measurement is a process of its own, since glibc reads the settings when a process starts. Reported are medians over
the rounds, with the lowest and highest; the ratio is taken round by round.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

from dapt_jax import allocator


def measure(model: str, size: int, batch: int, steps: int) -> dict[str, float]:
    """Times full training steps of a model in this process; the first, which compiles, is left out.

    Returns:
        `images_per_s`, from the median step; `faults` and `system_s`, per step.
    """
    import jax
    import numpy as np

    from dapt_jax.data.augment import Augment
    from dapt_jax.models import registry
    from dapt_jax.models.classifier import Classifier
    from dapt_jax.objectives import Objective
    from dapt_jax.training import steps as training
    from dapt_jax.training.optim import Optimizer
    from dapt_jax.training.phases import Phase

    network = Classifier(registry.build(model), 3)
    phase = Phase("full", 1, ("*",), 1e-4)
    program = training.programs(network, (phase,), Optimizer(), Objective(3), Augment(), 0, steps)[0]
    state = jax.device_put(program.fresh_state(*network.init(0)))
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3)).astype(np.uint8)
    data = {
        "image": images,
        "label": np.zeros(batch, np.int32),
        "weight": np.ones(batch, np.float32),
        "index": np.arange(batch, dtype=np.int32),
    }
    draw = {"seed": np.uint32(0), "view": np.int32(0)}
    step = jax.jit(program.train_step, donate_argnums=0)
    state = jax.block_until_ready(step(state, data, draw, np.float32(1e-4)))
    before, times = resource.getrusage(resource.RUSAGE_SELF), []
    for _ in range(steps):
        start = time.perf_counter()
        state = jax.block_until_ready(step(state, data, draw, np.float32(1e-4)))
        times.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "images_per_s": batch / statistics.median(times),
        "faults": (after.ru_minflt - before.ru_minflt) / steps,
        "system_s": (after.ru_stime - before.ru_stime) / steps,
    }


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.model, options.size, options.batch, options.steps)))
        return
    plain = {name: value for name, value in os.environ.items() if name not in (*allocator.SETTINGS, allocator.SWITCH)}
    environments = {"with settings": {**plain, **allocator.SETTINGS}, "without": plain}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in environments}
    for _ in range(options.rounds):
        for name, environment in environments.items():
            command = [sys.executable, "-m", "benchmarks.allocator", "--child", *sys.argv[1:]]
            child = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found[name].append(json.loads(child.stdout.splitlines()[-1]))
    pairs = zip(found["with settings"], found["without"], strict=True)
    ratios = [one["images_per_s"] / other["images_per_s"] for one, other in pairs]
    print(f"{options.model}, {options.size} px, batch {options.batch}, full step; median (lowest to highest)")
    for name, rounds in found.items():
        columns = [f"{key} {_spread([each[key] for each in rounds])}" for key in rounds[0]]
        print(f"{name:14}", *columns, sep="   ")
    print(f"ratio of images/s: {_spread(ratios)}")
    if options.json:
        about = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
        with open(options.json, "w") as file:
            json.dump({**vars(options), **about, "rounds": found, "ratios": ratios}, file, indent=1)


if __name__ == "__main__":
    main()
