"""A study in several processes: the scores of one process, whoever is killed or told to stop, however many go on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dapt_jax.cost.hardware import lookup
from dapt_jax.monitoring import status
from dapt_jax.runtime.preemption import RESTART_CODE
from tests.command import rows
from tests.studies import (
    ROOT,
    assert_same_bits,
    complete,
    complete_together,
    copied_cache,
    environment,
    free_port,
    kill_at_random,
    shared_cache,
    skip_chaos,
    together,
    wait_until,
)
from tests.test_study_resume import steps_saved

pytestmark = pytest.mark.long

SMALL = ("--config.strategies=switching", "--config.transfer.protocols=linear")
COUNTED = (
    "strategy",
    "seed",
    "stage",
    "phase",
    "steps",
    "images",
    "model_flops",
    "hardware_flops",
    "trainable_params",
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The study in one process."""
    workdir = tmp_path_factory.mktemp("alone")
    complete(workdir, shared_cache(), *SMALL)
    return workdir


@pytest.fixture(scope="module")
def cache(tmp_path_factory, alone):
    return copied_cache(tmp_path_factory.mktemp("cache"))


SWAPPED = 2e-2
"""What one pair of images that change places moves an area under a curve by, in sets as small as these."""


def assert_same(workdir, alone):
    """Every score, every image that was read and every FLOP; nothing twice, nothing lost.

    Losses of several processes agree with those of one to float32 rounding, which Adam's steps magnify; a score
    that counts ranks moves in steps, where rounding swaps two images.
    """
    for mine, theirs in zip(rows(workdir / "results.jsonl"), rows(alone / "results.jsonl"), strict=True):
        assert {**mine, "value": None} == {**theirs, "value": None}
        counts_ranks = mine["metric"].partition("/")[0] in ("auc", "ap")
        assert mine["value"] == pytest.approx(
            theirs["value"], rel=1e-5, abs=SWAPPED if counts_ranks else 1e-5
        ), mine
    for mine, theirs in zip(rows(workdir / "ledger.jsonl"), rows(alone / "ledger.jsonl"), strict=True):
        assert {key: mine[key] for key in COUNTED} == {key: theirs[key] for key in COUNTED}
        losses = [[point["loss"] for point in row["curve"]] for row in (mine, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_one_of_four_is_killed_all_end_and_two_go_on(tmp_path, alone, cache):
    """Behind the mask switch; two processes of two devices each take over from what four have saved."""
    state = tmp_path / "checkpoints" / "switching-seed0" / "state"
    phases = {
        row["phase"]: row["steps"] for row in rows(alone / "ledger.jsonl") if row["strategy"] == "switching"
    }
    switched = phases["head"] + phases["partial"]
    with together(tmp_path, cache, 4, *SMALL, pause=0.05) as running:
        wait_until(lambda: any(step > switched for step in steps_saved(state)), running[0])
        running[2].send_signal(signal.SIGKILL)
        began = time.monotonic()
        codes = [process.wait(60) for process in running]
        assert time.monotonic() - began < 60
        assert codes[2] == -signal.SIGKILL
        # The service by which JAX's processes know each other aborts whom it cannot tell otherwise.
        assert {code for number, code in enumerate(codes) if number != 2} <= {RESTART_CODE, -signal.SIGABRT}
        told = [process.stderr.read() for process in running]
    assert any("another process of the study is gone; the same command goes on" in text for text in told)
    assert not (tmp_path / "report.html").exists()
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    told = complete_together(tmp_path, cache, 2, *SMALL, **two)
    assert "switching seed 0: goes on from step" in told[0]
    assert "goes on" not in told[1]  # one process speaks
    assert {row["devices"] for row in rows(tmp_path / "ledger.jsonl") if row["phase"] == "full"} == {4}
    assert_same(tmp_path, alone)
    assert (tmp_path / "report.html").exists()


def test_the_launcher_ends_what_is_left_and_starts_all_again(tmp_path, alone, cache):
    """`launch/local.sh` with two real processes, of which the first, which writes and by which they met, is killed."""
    flags = [f"--config={ROOT}/tests/configs/tiny_study.py", f"--workdir={tmp_path / 'run'}", *SMALL]
    beat, state = (
        tmp_path / "run" / status.STATUS,
        tmp_path / "run" / "checkpoints" / "switching-seed0" / "state",
    )
    launcher = subprocess.Popen(
        ["bash", f"{ROOT}/launch/local.sh", "--processes=2", f"--port={free_port()}", "--", *flags],
        env=environment(cache, PYTHON=sys.executable, GRACE_S="5"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: beat.exists() and bool(steps_saved(state)), launcher)
        os.kill(json.loads(beat.read_text())["pid"], signal.SIGKILL)
        told = launcher.communicate(timeout=200)[1]
    finally:
        launcher.terminate()
    assert launcher.returncode == 0, told
    assert "starting again (1 of 100)" in told
    assert "goes on from step" in told
    assert_same(tmp_path / "run", alone)


@pytest.mark.chaos
def test_one_of_two_killed_at_random_moments_the_study_ends_with_the_same_bits(tmp_path, cache, request):
    """The bits of two processes that nobody killed."""
    skip_chaos(20, request)
    quiet, workdir = tmp_path / "quiet", tmp_path / "killed"
    complete_together(quiet, cache, 2, *SMALL)
    kill_at_random(workdir, 20, lambda: together(workdir, cache, 2, *SMALL, pause=0.02))
    complete_together(workdir, cache, 2, *SMALL)
    assert_same_bits(workdir, quiet)


def test_a_notice_to_one_process_is_a_notice_to_all(tmp_path, alone, cache):
    rarely = (*SMALL, "--config.runtime.checkpoint_every_s=1e9")
    state = tmp_path / "checkpoints" / "switching-seed0" / "state"

    def now():
        return status.lines(tmp_path, time.time()) if (tmp_path / status.STATUS).exists() else [""]

    with together(tmp_path, cache, 2, *rarely, pause=0.1) as running:
        wait_until(lambda: any("phase full, epoch 1" in line for line in now()), running[0])
        running[1].send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in running]
        assert codes[0] == RESTART_CODE
        assert codes[1] in (RESTART_CODE, -signal.SIGABRT)  # the latter where the first was gone before it
        told = [process.stderr.read() for process in running]
    assert "SIGTERM: saves at the next step" in told[1]
    assert "stopped by SIGTERM; the same command goes on from the last checkpoint" in told[0]
    phases = {
        row["phase"]: row["steps"] for row in rows(alone / "ledger.jsonl") if row["strategy"] == "switching"
    }
    assert not {max(steps_saved(state))} & {
        phases["head"],
        phases["head"] + phases["partial"],
    }  # inside a phase
    complete_together(tmp_path, cache, 2, *rarely)
    assert_same(tmp_path, alone)


def test_what_one_process_cannot_do_ends_all_with_its_error(tmp_path, alone, cache):
    with together(tmp_path, cache, 2, *SMALL, "--config.weights=nowhere.safetensors") as running:
        codes, told = zip(*[(process.wait(120), process.stderr.read()) for process in running], strict=True)
    assert codes == (2, 2)
    assert "nowhere.safetensors" in told[0]
    other = "--config.adapt.lr=0.5"  # only the first process knows the workdir
    with together(alone, cache, 2, *SMALL, other) as running:
        codes, told = zip(*[(process.wait(120), process.stderr.read()) for process in running], strict=True)
    assert codes == (2, 2)
    assert "adapt.lr was" in told[0]
    assert "error" not in told[1]


DESCRIBED = """\
import sys
from dapt_jax.cost import hardware
from dapt_jax.runtime import processes
processes.start(processes.Group("on", sys.argv[1], 2, int(sys.argv[2])))
here = hardware.describe()
print(processes.hosts(), here.watts * here.count, here.memory_gb)
"""


def test_processes_on_one_machine_have_its_power_and_memory_once():
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DESCRIBED, address, str(number)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(shared_cache()),
            cwd=ROOT,
        )
        for address in (f"localhost:{free_port()}",)
        for number in range(2)
    ]
    last = [each.communicate(timeout=300)[0].splitlines()[-1] for each in started]
    found = [[float(word) for word in line.split()] for line in last]
    alone = lookup("cpu", 1, "cpu")
    assert found == [[1, pytest.approx(alone.watts), pytest.approx(alone.memory_gb)]] * 2
