"""Every benchmark runs at its smallest size and says what it should; times are not judged here."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_allocator_benchmark_measures_both_sides(tmp_path):
    out = tmp_path / "out.json"
    options = ["--model=resnet18", "--size=32", "--batch=2", "--steps=2", "--rounds=1", f"--json={out}"]
    command = [sys.executable, "-m", "benchmarks.allocator", *options]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300).stdout
    assert "ratio of images/s" in printed
    found = json.loads(out.read_text())
    assert set(found["rounds"]) == {"with settings", "without"}
    assert all(each["images_per_s"] > 0 for rounds in found["rounds"].values() for each in rounds)


def test_settings_are_added_once_and_never_against_the_user():
    from dapt_jax import allocator

    added = allocator.settings({})
    if added:  # on glibc
        assert set(allocator.SETTINGS) < set(added)
        assert allocator.settings(added) == {}
    assert allocator.settings({"DAPT_JAX_ALLOCATOR": "off"}) == {}
    assert allocator.settings({"MALLOC_TRIM_THRESHOLD_": "1"}) == {}
