"""The speed of a machine is measured once, kept with its age, and turns FLOPs into minutes with a stated error."""

import json

import pytest

from dapt_jax.models.registry import configured
from dapt_jax.study import speed

DENSE, DEPTHWISE = (configured(name, 0.0, 0.0, ()) for name in ("resnet18", "efficientnet_lite0"))


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A machine of 2 GFLOP/s whose measurements are counted, with an empty cache."""
    calls = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(speed, "measure", lambda *of: calls.append(of) or 2e9)
    monkeypatch.setattr(speed.os, "getloadavg", lambda: (0.1, 9.0, 9.0))
    return calls


def test_a_machine_is_measured_once_for_each_kind_of_network(measured):
    first = speed.of_machine(DENSE, "float32")
    assert speed.of_machine(configured("resnet50", 0.0, 0.0, ()), "float32") == first
    speed.of_machine(DEPTHWISE, "float32")
    speed.of_machine(DEPTHWISE, "bfloat16")
    speed.of_machine(DEPTHWISE, "float32")
    assert [network for network, *_ in measured] == ["resnet18", "efficientnet_lite0", "efficientnet_lite0"]


def test_minutes_are_flops_over_speed_with_error_machine_and_age(measured):
    found = speed.of_machine(DENSE, "float32")
    text = speed.line(1.2e12, DENSE, "float32", found.time + 3 * 86400)
    assert text.startswith(f"time: about 10 min (4 min to 25 min) on {speed.name()}, an estimate")
    assert "2 GFLOP/s in a benchmark of this machine, measured 3 days ago" in text
    assert "measured just now" in speed.line(1.2e12, DENSE, "float32", found.time)


def test_the_speed_of_a_busy_machine_is_said_to_be_one_and_measured_again_when_it_is_idle(
    measured, monkeypatch
):
    monkeypatch.setattr(speed.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(speed.os, "getloadavg", lambda: (1.6, 0.0, 0.0))
    for _ in range(2):
        assert "while other work slowed it" in speed.line(1e12, DENSE, "float32", 0.0)
    assert len(measured) == 1
    monkeypatch.setattr(speed.os, "getloadavg", lambda: (1.4, 9.0, 9.0))
    for _ in range(2):
        assert "slowed" not in speed.line(1e12, DENSE, "float32", 0.0)
    assert len(measured) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}'])
def test_a_damaged_cache_is_measured_again(measured, content):
    speed.of_machine(DENSE, "float32")
    key = next(iter(json.loads(speed.file().read_text())))
    speed.file().write_text(content.replace('"x"', json.dumps(key)))
    speed.of_machine(DENSE, "float32")
    assert len(measured) == 2


@pytest.mark.long
def test_the_benchmark_finds_a_plausible_speed():
    assert 1e8 < speed.measure(*speed.NETWORKS["dense"], "float32") < 1e15
