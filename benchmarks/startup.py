"""Seconds from the command to the end of its first training step, with a cold and with a warm compilation cache.

    python -m benchmarks.startup --json out.json

Runs `python -m dapt_jax.main` on a config, in a process of its own each time, restart for the allocator's
sake included, and ends it after the first step of full training. `imports` is until the command line is read,
`reading` until images and weights are there and training begins, `step` until the first step has ended:
placing, tracing, compiling or reading the compiled program, and the step itself.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from dapt_jax.runtime import allocator

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"
START = "DAPT_JAX_BENCHMARK_START"


def _child(arguments: list[str]) -> None:
    """Runs the command until its first step has ended, and prints the seconds since the parent started it."""
    started, parts = float(os.environ[START]), {}

    def mark(name: str) -> None:
        parts[name] = time.time() - started

    from dapt_jax import main
    from dapt_jax.monitoring.progress import Reporter
    from dapt_jax.study import study
    from dapt_jax.training import loop

    mark("imports")
    train = loop.train
    study.RunContext = functools.partial(study.RunContext, sync_every_s=0.0)  # type: ignore[misc]

    def marked(*given: Any) -> Any:
        mark("reading")
        return train(*given)

    def stepped(self: Reporter, work: float, doing: str, images_per_s: float | None = None) -> None:
        if images_per_s is not None:
            mark("step")
            print(json.dumps(parts), flush=True)
            os._exit(0)

    loop.train, Reporter.advance = marked, stepped  # type: ignore[method-assign]
    sys.exit(main.main(["dapt_jax", *arguments]))


def measure(flags: list[str], cache: str) -> common.Row:
    """One start of the command with a folder of compiled programs.

    Returns:
        Seconds of each part.
    """
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    for name in (*allocator.SETTINGS, allocator.SWITCH):
        environment.pop(name, None)
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "benchmarks.startup", "--child", *flags, f"--workdir={workdir}"]
        environment[START] = repr(time.time())
        child = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    ends = json.loads(child.stdout.splitlines()[-1])
    return {
        "imports s": ends["imports"],
        "reading s": ends["reading"] - ends["imports"],
        "step s": ends["step"] - ends["reading"],
        "total s": ends["step"],
    }


def main(arguments: list[str] | None = None) -> None:
    """Starts the command cold and warm, and prints the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--images", type=int, default=512, help="synthetic images of the corpus")
    options = parser.parse_args(arguments)
    settings = {
        "strategies": "full", "adapt.head_epochs": 0, "adapt.epochs": 1, "model.name": options.model,
        "weights": options.weights, "model.image_size": options.size, "corpus.n": options.images,
    }  # fmt: skip
    flags = [f"--config={options.config}", *(f"--config.{name}={value}" for name, value in settings.items())]
    found: dict[str, list[common.Row]] = {"cold": [], "warm": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for rounds in found.values():
                rounds.append(measure(flags, cache))
    rows = []
    for name, rounds in found.items():
        totals = [each["total s"] for each in rounds]
        medians = {key: common.middle([each[key] for each in rounds]) for key in rounds[0]}
        rows.append({"compilation cache": name, **medians, "lowest": min(totals), "highest": max(totals)})
    title = (
        f"from command to first step: {options.model}, {options.size} px, {options.images} synthetic images"
    )
    common.report(options, f"{title}; medians of {options.rounds}", rows, rounds=found)


if __name__ == "__main__":
    if "--child" in sys.argv:
        allocator.restart_with_settings()
        _child(sys.argv[sys.argv.index("--child") + 1 :])
    else:
        main()
