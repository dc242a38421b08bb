"""Killed at any moment and started again with the same command, a study ends with the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dapt_jax.report.records import KINDS

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


def steps_saved(folder):
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("quiet")
    subprocess.run(command(workdir), env=environment(cache), check=True, capture_output=True, timeout=300)
    return workdir


def test_killed_in_a_phase_around_a_switch_and_in_a_target_task(tmp_path, quiet, cache):
    state = tmp_path / "checkpoints" / "switching-seed0" / "state"
    finetune = tmp_path / "checkpoints" / "switching-seed0" / "finetune-cells" / "fold0"
    steps_per_epoch = json.loads((quiet / "ledger.jsonl").read_text().splitlines()[-2])["steps"]
    per_phase = next(
        row["steps"]
        for row in map(json.loads, (quiet / "ledger.jsonl").read_text().splitlines())
        if row["strategy"] == "switching" and row["phase"] == "partial"
    )
    assert steps_per_epoch
    moments = {
        "inside a phase": lambda: any(per_phase < step < 2 * per_phase for step in steps_saved(state)),
        "around a mask switch": lambda: any(step >= 2 * per_phase for step in steps_saved(state)),
        "in a target task": lambda: bool(steps_saved(finetune)),
    }
    for moment, has_come in moments.items():
        process = subprocess.Popen(
            command(tmp_path), env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 240
        while not has_come():
            assert process.poll() is None, f"{moment}: ended before it could be killed: {process.stderr.read()[-800:]}"
            assert time.monotonic() < deadline, moment
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        assert not (tmp_path / "report.html").exists()
    ended = subprocess.run(
        command(tmp_path), env=environment(cache), check=True, capture_output=True, text=True, timeout=300
    )
    assert "goes on from step" in ended.stderr
    assert (tmp_path / "results.jsonl").read_bytes() == (quiet / "results.jsonl").read_bytes()
    counted = ("strategy", "seed", "stage", "phase", "steps", "images", "model_flops", "hardware_flops", "curve")
    rows = [
        [
            {key: row[key] for key in counted}
            for row in map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
        ]
        for folder in (tmp_path, quiet)
    ]
    assert rows[0] == rows[1]
    for folder in (tmp_path, quiet):
        for row in map(json.loads, (folder / "ledger.jsonl").read_text().splitlines()):
            parts = sum(row[f"{kind}_s"] for kind in KINDS)
            assert 0.98 * row["wall_s"] - 0.05 <= parts <= row["wall_s"] + 1e-6, row


def test_a_finished_study_started_again_runs_nothing(quiet, cache):
    before = {name: (quiet / name).read_bytes() for name in ("results.jsonl", "ledger.jsonl")}
    subprocess.run(command(quiet), env=environment(cache), check=True, capture_output=True, timeout=300)
    assert before == {name: (quiet / name).read_bytes() for name in before}


def test_a_second_start_compiles_nothing_new(tmp_path, cache):
    """In another workdir, so that everything is run again; every program is found in the compilation cache."""
    environ = {**environment(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    kept = []
    for start in ("first", "second"):
        study = command(tmp_path / start, "--config.strategies=switching", "--config.transfer.protocols=linear")
        subprocess.run(study, env=environ, check=True, capture_output=True, timeout=300)
        kept.append({path.name for path in cache.iterdir() if not path.name.endswith("-atime")})
    assert kept[0]
    assert kept[1] == kept[0]


def test_the_data_order_and_the_devices_do_not_change_the_result(tmp_path, quiet, cache):
    """Eight devices, four reading threads: the same scores to rounding."""
    environ = {**environment(cache), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run(
        command(tmp_path, "--config.data.threads=4"), env=environ, check=True, capture_output=True, timeout=300
    )
    curves = [
        [
            point["loss"]
            for row in map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
            for point in row["curve"]
        ]
        for folder in (tmp_path, quiet)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    devices = {row["devices"] for row in map(json.loads, (tmp_path / "ledger.jsonl").read_text().splitlines())}
    assert devices == {8}
