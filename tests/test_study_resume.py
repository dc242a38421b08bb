"""Killed at any moment and started again with the same command, a study ends with the same bits."""

import signal
import time

import pytest

from dapt_jax.monitoring import status
from dapt_jax.records.vocabulary import KINDS
from dapt_jax.runtime.preemption import RESTART_CODE, STOPPED_CODE
from tests.command import rows
from tests.studies import (
    assert_same_bits,
    complete,
    copied_cache,
    kill_at_random,
    shared_cache,
    skip_chaos,
    started,
    together,
    wait_until,
)

pytestmark = pytest.mark.long


def steps_saved(folder):
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quiet")
    complete(workdir, shared_cache())
    return workdir


@pytest.fixture(scope="module")
def cache(tmp_path_factory, quiet):
    return copied_cache(tmp_path_factory.mktemp("cache"))


def test_killed_in_a_phase_around_a_switch_and_in_a_target_task(tmp_path, quiet, cache):
    state = tmp_path / "checkpoints" / "switching-seed0" / "state"
    finetune = tmp_path / "checkpoints" / "switching-seed0" / "finetune-cells" / "fold0"
    per_phase = next(
        row["steps"]
        for row in rows(quiet / "ledger.jsonl")
        if row["strategy"] == "switching" and row["phase"] == "partial"
    )
    assert per_phase > 1  # or no step would lie inside a phase
    moments = {
        "inside a phase": lambda: any(per_phase < step < 2 * per_phase for step in steps_saved(state)),
        "around a mask switch": lambda: any(step >= 2 * per_phase for step in steps_saved(state)),
        "in a target task": lambda: bool(steps_saved(finetune)),
    }
    for moment, has_come in moments.items():
        with started(tmp_path, cache) as process:
            wait_until(has_come, process, moment)
            process.send_signal(signal.SIGKILL)
        assert not (tmp_path / "report.html").exists()
    ended = complete(tmp_path, cache)
    assert "goes on from step" in ended.stderr
    assert (tmp_path / "results.jsonl").read_bytes() == (quiet / "results.jsonl").read_bytes()
    counted = (
        "strategy",
        "seed",
        "stage",
        "phase",
        "steps",
        "images",
        "model_flops",
        "hardware_flops",
        "curve",
    )
    counts = [
        [{key: row[key] for key in counted} for row in rows(folder / "ledger.jsonl")]
        for folder in (tmp_path, quiet)
    ]
    assert counts[0] == counts[1]
    for folder in (tmp_path, quiet):
        for row in rows(folder / "ledger.jsonl"):
            parts = sum(row[f"{kind}_s"] for kind in KINDS)
            assert 0.98 * row["wall_s"] - 0.05 <= parts <= row["wall_s"] + 1e-6, row


def test_a_finished_study_started_again_runs_nothing(quiet, cache):
    before = {name: (quiet / name).read_bytes() for name in ("results.jsonl", "ledger.jsonl")}
    complete(quiet, cache)
    assert before == {name: (quiet / name).read_bytes() for name in before}


def test_a_second_start_compiles_nothing_new(tmp_path, cache):
    """In another workdir, so that everything is run again; every program is found in the compilation cache."""
    flags = ("--config.strategies=switching", "--config.transfer.protocols=linear")
    kept = []
    for start in ("first", "second"):
        complete(tmp_path / start, cache, *flags, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
        kept.append({path.name for path in cache.iterdir() if not path.name.endswith("-atime")})
    assert kept[0]
    assert kept[1] == kept[0]


def test_the_data_order_and_the_devices_do_not_change_the_result(tmp_path, quiet, cache, monkeypatch):
    """Eight devices, four reading threads: the same scores to rounding."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    complete(tmp_path, cache, "--config.data.threads=4")
    curves = [
        [point["loss"] for row in rows(folder / "ledger.jsonl") for point in row["curve"]]
        for folder in (tmp_path, quiet)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    devices = {row["devices"] for row in rows(tmp_path / "ledger.jsonl")}
    assert devices == {8}


@pytest.mark.parametrize(("told", "code"), [(signal.SIGTERM, RESTART_CODE), (signal.SIGINT, STOPPED_CODE)])
def test_a_notice_is_saved_at_the_next_step_and_the_same_command_goes_on(tmp_path, quiet, cache, told, code):
    rarely = "--config.runtime.checkpoint_every_s=1e9"  # so that nothing but the notice saves inside a phase

    def now():
        return status.lines(tmp_path, time.time()) if (tmp_path / status.STATUS).exists() else [""]

    with started(tmp_path, cache, rarely, pause=0.1) as process:
        wait_until(lambda: any("phase full, epoch 1" in line for line in now()), process)
        assert "running, process" in now()[0]
        assert any(line.startswith("  running: switching seed 0") for line in now())
        process.send_signal(told)
        assert process.wait(60) == code
        error = process.stderr.read()
    assert f"{told.name}: saves at the next step" in error
    assert (
        error.splitlines()[-1] == f"stopped by {told.name}; the same command goes on from the last checkpoint"
    )
    assert "stopped" in now()[0]
    steps = {
        row["phase"]: row["steps"] for row in rows(quiet / "ledger.jsonl") if row["strategy"] == "switching"
    }
    saved = max(steps_saved(tmp_path / "checkpoints" / "switching-seed0" / "state"))
    assert steps["head"] + steps["partial"] < saved < steps["head"] + steps["partial"] + steps["full"]
    if told == signal.SIGINT:
        return
    assert f"goes on from step {saved} of" in complete(tmp_path, cache, rarely).stderr
    assert (tmp_path / "results.jsonl").read_bytes() == (quiet / "results.jsonl").read_bytes()
    assert "done" in now()[0]


def test_a_second_notice_ends_at_once(tmp_path, cache):
    with started(tmp_path, cache) as process:
        wait_until(lambda: (tmp_path / "status.json").exists(), process)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (-signal.SIGTERM, RESTART_CODE)  # the latter where it was the quicker


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.chaos)])
def test_killed_at_random_moments_a_study_ends_with_the_same_bits(tmp_path, quiet, cache, kills, request):
    """Moments are drawn along the study's work, and a sixth of them before any of it is done."""
    skip_chaos(kills, request)
    kill_at_random(tmp_path, kills, lambda: together(tmp_path, cache, 1, pause=0.02))
    complete(tmp_path, cache)
    assert_same_bits(tmp_path, quiet)


def test_a_workdir_elsewhere_goes_on_on_another_machine(tmp_path, quiet, cache):
    """Killed in its last phase on a machine whose disk is lost with it, with a copy that may be half a checkpoint old."""
    place, there = f"file://{tmp_path}/bucket/tiny", tmp_path / "bucket" / "tiny"
    state = there / "checkpoints" / "switching-seed0" / "state"
    with started(place, cache, pause=0.1, XDG_CACHE_HOME=str(tmp_path / "first")) as process:
        wait_until(lambda: len(steps_saved(state)) > 1, process)
        process.send_signal(signal.SIGKILL)
    assert not (there / "report.html").exists()
    ended = complete(place, cache, XDG_CACHE_HOME=str(tmp_path / "second"))
    assert "goes on from step" in ended.stderr
    assert (there / "results.jsonl").read_bytes() == (quiet / "results.jsonl").read_bytes()
    assert (there / "report.html").exists()
    assert sorted(path.name for path in there.iterdir()) == sorted(path.name for path in quiet.iterdir())
    assert not [path for path in state.rglob("*") if path.is_file()]  # an object store knows no empty folders
