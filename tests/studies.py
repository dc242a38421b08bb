"""The tiny study as processes that can be killed."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command(workdir, *more):
    return [
        sys.executable,
        "-c",
        # Checkpoints of every step: what a kill finds does not depend on how fast the machine is.
        "import sys; from dapt_jax.training import feeds; feeds.SYNC_EVERY_S = 0.0; "
        "from dapt_jax.main import main; sys.exit(main(sys.argv))",
        f"--config={ROOT}/tests/configs/tiny_study.py",
        f"--workdir={workdir}",
        *more,
    ]


def environment(cache):
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}


def complete(workdir, cache, *more):
    """Runs a study to its end."""
    return subprocess.run(
        command(workdir, *more), env=environment(cache), check=True, capture_output=True, text=True, timeout=300
    )


@contextlib.contextmanager
def started(workdir, cache, *more):
    """Starts a study; whatever is left of it at the end is killed."""
    process = subprocess.Popen(
        command(workdir, *more), env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def wait_until(has_come, process, what="", seconds=240):
    """Waits for a moment in a study that runs."""
    deadline = time.monotonic() + seconds
    while not has_come():
        assert process.poll() is None, f"{what}: ended before it came: {process.stderr.read()[-800:]}"
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
