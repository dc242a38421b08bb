"""The tiny study as processes that can be killed."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dapt_jax.monitoring import status
from dapt_jax.monitoring.writers import METRICS
from tests.command import rows

ROOT = Path(__file__).resolve().parents[1]


# A checkpoint and a word of every step, with time to act on it: what a kill finds does not depend on the
# machine's pace.
CODE = """\
import functools, sys, time
from dapt_jax.monitoring import heartbeat
from dapt_jax.monitoring.progress import Reporter
from dapt_jax.runtime import storage
from dapt_jax.study import study
study.RunContext = functools.partial(study.RunContext, sync_every_s=0.0)
heartbeat.BEAT_S, storage.PUSH_S, advance = 0.05, 0.05, Reporter.advance
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


def shared_cache():
    """The folder of compiled programs of all tests: for processes that nobody kills."""
    return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])


def copied_cache(folder):
    """A copy of them for processes that are killed, which may leave half of a program behind."""
    return Path(shutil.copytree(shared_cache(), folder / "xla"))


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as asked:
        asked.bind(("localhost", 0))
        return asked.getsockname()[1]


@contextlib.contextmanager
def together(workdir, cache, processes, *more, pause=0.0, **others):
    """Starts the processes of a study; whatever is left of them at the end is killed."""
    address, count = f"localhost:{free_port()}", str(processes)

    def group(number):
        told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": str(number)}
        return told if processes > 1 else {}

    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(started(workdir, cache, *more, pause=pause, **group(number), **others))
            for number in range(processes)
        ]


def complete_together(workdir, cache, processes, *more, **others):
    """Runs a study to its end in several processes; returns what each wrote to its standard error."""
    with together(workdir, cache, processes, *more, **others) as running:
        told = [process.communicate(timeout=400)[1] for process in running]
        assert [process.returncode for process in running] == [0] * processes, "\n".join(
            text[-1500:] for text in told
        )
    return told


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


def skip_chaos(kills, request):
    if kills > 3 and "chaos" not in request.config.option.markexpr:
        pytest.skip("minutes long: run with -m chaos")


def kill_at_random(workdir, kills, start):
    """Starts a study again and again; each time one of its processes is killed at a moment drawn along the study's work.

    The others have a minute to end by themselves.
    """
    draw, found = random.Random(0), []

    def share():
        if not (workdir / status.STATUS).exists():
            return 0.0
        flops = json.loads((workdir / status.STATUS).read_text())["flops"]
        return flops["done"] / max(flops["total"], 1)

    def beaten(since):
        return (workdir / status.STATUS).exists() and (workdir / status.STATUS).stat().st_mtime > since

    for moment in sorted(draw.uniform(-0.2, 0.9) for _ in range(kills)):
        since = time.time()
        with start() as running:
            if moment > 0:
                wait_until(
                    lambda moment=moment: share() >= moment, running[0], f"at {moment:.0%} of the work"
                )
            time.sleep(draw.uniform(0, 0.3) if moment > 0 else draw.uniform(0, 6))
            victim = draw.choice(running)
            victim.send_signal(signal.SIGKILL)
            if not beaten(
                since
            ):  # one that still waits for the victim to come would do so for minutes: a launcher ends it
                for process in running:
                    process.kill()
            for process in running:
                process.wait(60)
            assert victim.returncode == -signal.SIGKILL
        found.append(round(share(), 3))
    print(f"killed when these shares of the work were done: {found}")


def assert_same_bits(workdir, quiet):
    """The same results, and each epoch told of once, with the same loss."""
    assert (workdir / "results.jsonl").read_bytes() == (quiet / "results.jsonl").read_bytes()
    told = [
        {(row["strategy"], row["phase"], row["epoch"]): row["loss"] for row in rows(folder / METRICS)}
        for folder in (workdir, quiet)
    ]
    assert told[0] == told[1]
    assert len(rows(workdir / METRICS)) == len(told[0])
