"""Wall time by activity: compiling, training, waiting for data, evaluating, saving, caching."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dapt_jax.errors import UserError, nearest

NAMES = ("compile", "train", "data", "eval", "checkpoint", "cache", "other")


class Clock:
    """Timer that attributes every second since its creation to exactly one name.

    The parts therefore add up to the wall time. Spans nest: inside `with clock.span("train")`, the time of a
    `with clock.span("compile")` is subtracted from training. Time outside every span is "other". Times come
    from a monotonic clock, so adjusting the wall clock during a run has no effect. JAX runs asynchronously:
    block on a result before its span ends. A clock belongs to one thread.

        clock = Clock()
        with clock.span("train"):
            state = jax.block_until_ready(step(state, batch))
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """Start at zero.

        Args:
            now: Function that returns seconds from any origin and never decreases.
        """
        self._now = now
        self._last = now()
        self._stack = ["other"]
        self._seconds = dict.fromkeys(NAMES, 0.0)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Attribute the time inside the `with` block to `name`, except that of nested spans.

        Raises:
            UserError: `name` is not one of `NAMES`.
        """
        if name not in self._seconds:
            raise UserError(f"no span is called {name!r}; {nearest(name, NAMES)}")
        self._settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every name so far, including those of open spans."""
        self._settle()
        return dict(self._seconds)

    @property
    def wall(self) -> float:
        """Return the seconds since the clock was made, plus those of the runs it was resumed from."""
        return sum(self.seconds().values())

    def state(self) -> dict[str, float]:
        """Return the state to checkpoint, as plain JSON values."""
        return self.seconds()

    @classmethod
    def from_state(cls, state: Mapping[str, Any], now: Callable[[], float] = time.monotonic) -> Clock:
        """Resume from a stored state; the time between storing and now does not count.

        Raises:
            UserError: The state names a span unknown to this version, or holds a value that is not a number.
        """
        clock = cls(now)
        for name, value in state.items():
            if name not in clock._seconds:
                raise UserError(f"stored clock: no span is called {name!r}; {nearest(name, NAMES)}")
            try:
                clock._seconds[name] = float(value)
            except (TypeError, ValueError) as error:
                raise UserError(f"stored clock: {name!r} is {value!r}, expected seconds") from error
        return clock

    def _settle(self) -> None:
        """Credit the time since the last event to the innermost open span."""
        now = self._now()
        self._seconds[self._stack[-1]] += now - self._last
        self._last = now
