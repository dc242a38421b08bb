"""The tiny study as processes that can be killed."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


# A checkpoint and a word of every step, with time to act on it: what a kill finds does not depend on the machine's pace.
CODE = """\
import sys, time
from dapt_jax import storage
from dapt_jax.progress import Reporter
from dapt_jax.training import feeds
from dapt_jax.watch import watcher
feeds.SYNC_EVERY_S, watcher.BEAT_S, storage.PUSH_S, advance = 0.0, 0.05, 0.05, Reporter.advance
Reporter.advance = lambda self, *told: (advance(self, *told), time.sleep(PAUSE))
from dapt_jax.main import main
sys.exit(main(sys.argv))
"""


def command(workdir, *more, pause=0.0):
    return [
        sys.executable,
        "-c",
        CODE.replace("PAUSE", str(pause)),
        f"--config={ROOT}/tests/configs/tiny_study.py",
        f"--workdir={workdir}",
        *more,
    ]


def environment(cache, **others):
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), **others}


def complete(workdir, cache, *more, **others):
    """Runs a study to its end."""
    return subprocess.run(
        command(workdir, *more),
        env=environment(cache, **others),
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )


@contextlib.contextmanager
def started(workdir, cache, *more, pause=0.0, **others):
    """Starts a study; whatever is left of it at the end is killed."""
    process = subprocess.Popen(
        command(workdir, *more, pause=pause),
        env=environment(cache, **others),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
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
