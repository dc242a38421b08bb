"""Studies killed by `benchmarks.chaos` end as quiet ones, and the benchmark kills where it says and sees differences."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import chaos, chaos_child
from tests.command import ROOT

KILLED = """
import os, sys
from pathlib import Path
from benchmarks.chaos_child import Kill, Operations
from dapt_jax.runtime import atomic_files

folder, number, stage = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
operations = Operations(Kill("/a(/|$)", number, stage) if stage else None)
operations.watch()
try:
    atomic_files.write_text(folder / "a" / "x", "0123456789")
    (folder / "a" / "y").mkdir()
    (folder / "a" / "y").rmdir()
except OSError as error:
    print(error.strerror)
os.write(1, "\\n".join(line.partition(" ")[0] for line in operations.log).encode())
"""


def killed(folder, number=0, stage=""):
    command = [sys.executable, "-c", KILLED, str(folder), str(number), stage]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_process_is_killed_before_inside_or_after_an_operation_or_its_disk_fails(tmp_path):
    def folder(name):
        (tmp_path / name / "a").mkdir(parents=True)
        return tmp_path / name

    every = killed(folder("whole"))
    assert (every.returncode, every.stderr) == (0, "")
    assert every.stdout.split() == ["mkdir", "open", "write", "fsync", "replace", "mkdir", "rmdir"]
    moments = {
        (0, "after"): {},
        (1, "before"): {},
        (1, "after"): {".x.partial": ""},
        (2, "inside"): {".x.partial": "01234"},
        (2, "after"): {".x.partial": "0123456789"},
        (4, "before"): {".x.partial": "0123456789"},
        (4, "after"): {"x": "0123456789"},
    }
    for (number, stage), expected in moments.items():
        here = folder(f"{stage}{number}")
        assert killed(here, number, stage).returncode == -signal.SIGKILL
        assert {path.name: path.read_text() for path in (here / "a").iterdir()} == expected
    here = folder("full")
    assert "No space left on device" in killed(here, 1, "ENOSPC").stdout
    assert not list((here / "a").iterdir())


def test_what_differs_in_results_weights_predictions_or_the_ledger_is_seen(tmp_path):
    def write(name, value=0, prediction=0.5, steps=3):
        folder = tmp_path / name
        (folder / "predictions").mkdir(parents=True)
        (folder / "results.jsonl").write_text("{}\n")
        (folder / "encoder.safetensors").write_bytes(bytes([value]))
        row = dict.fromkeys(chaos.COUNTED, 0) | {"steps": steps, "model_flops": 7, "wall_s": hash(name)}
        (folder / "ledger.jsonl").write_text(json.dumps(row) + "\n")
        (folder / "status.json").write_text(name)  # of no two runs alike
        np.savez(folder / "predictions" / "a.npz", label=np.full(3, prediction))
        return chaos.digests(folder)

    one = write("one")
    assert one == write("same")
    for others in ({"value": 1}, {"prediction": 0.25}, {"steps": 4}):
        assert one != write(str(others), **others)
    assert chaos.model_flops(tmp_path / "one") == 7


def test_what_a_command_says_wrongly_is_seen():
    assert chaos_child.fault(0, "warning: few") == chaos_child.fault(2, "error: x: none") == ""
    assert "traceback" in chaos_child.fault(2, "Traceback (most recent call last):\n  File\nKeyError: 'x'")
    assert "without a line" in chaos_child.fault(2, "")
    assert "exit code -9" in chaos_child.fault(-9, "")


@pytest.mark.parametrize(
    ("where", "kills"),
    [
        pytest.param("files", 1, marks=pytest.mark.long),
        *(pytest.param(where, 5, marks=pytest.mark.chaos) for where in chaos.WHERE),
    ],
)
def test_a_killed_study_ends_with_the_bytes_of_the_quiet_one(tmp_path, where, kills):
    """A process of its own, of which studies are forks: see the table of `python -m benchmarks.chaos`."""
    flags = [f"--where={where}", f"--kills={kills}"] if where != "two" else ["--kills=0", f"--two={kills}"]
    command = [sys.executable, "-m", "benchmarks.chaos", *flags, f"--folder={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
