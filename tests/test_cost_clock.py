import json

import pytest

from dapt_jax.cost.clock import NAMES, Clock
from dapt_jax.errors import UserError


class Time:
    """A monotonic time that moves when told."""

    def __init__(self):
        self.value = 1000.0

    def __call__(self):
        return self.value

    def sleep(self, seconds):
        self.value += seconds


def test_time_goes_to_the_innermost_span():
    now = Time()
    clock = Clock(now)
    now.sleep(1)
    with clock.span("train"):
        now.sleep(2)
        with clock.span("compile"):
            now.sleep(4)
            with clock.span("compile"):
                now.sleep(8)
        now.sleep(16)
    with clock.span("data"):
        now.sleep(32)
    now.sleep(64)
    assert clock.seconds() == dict.fromkeys(NAMES, 0.0) | {
        "other": 65,
        "train": 18,
        "compile": 12,
        "data": 32,
    }
    assert clock.wall == sum(clock.seconds().values()) == 127


def test_open_spans_and_errors_are_accounted_for():
    now = Time()
    clock = Clock(now)

    def fails():
        with clock.span("eval"):
            now.sleep(3)
            assert clock.seconds()["eval"] == 3
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fails()
    now.sleep(1)
    assert (clock.seconds()["eval"], clock.seconds()["other"]) == (3, 1)


def test_resumed_clock_goes_on_without_the_time_between():
    now = Time()
    clock = Clock(now)
    with clock.span("train"):
        now.sleep(5)
        stored = json.dumps(clock.state())
    now.sleep(1_000_000)
    now.value -= 5_000
    resumed = Clock.from_state(json.loads(stored), now)
    with resumed.span("train"):
        now.sleep(2)
    assert resumed.seconds()["train"] == 7
    assert resumed.wall == 7


def test_errors():
    with pytest.raises(UserError, match="did you mean 'train'"), Clock().span("trian"):
        pass
    with pytest.raises(UserError, match="no span is called 'nap'"):
        Clock.from_state({"nap": 1.0})
    with pytest.raises(UserError, match="expected seconds"):
        Clock.from_state({"train": None})
