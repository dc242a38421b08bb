"""Processes of their own that measure in turn: two frameworks do not share threads, memory or an allocator's settings."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from dapt_jax.runtime import allocator

Row = dict[str, Any]


class Side:
    """A process that makes itself ready and then measures when told, so that sides can take turns.

    It runs with the memory settings of the command, whatever it measures.
    """

    def __init__(self, module: str, options: Mapping[str, Any], environment: Mapping[str, str] | None = None):
        """Starts `python -m MODULE --side JSON`, which has to call `serve`.

        Args:
            module: of the benchmark.
            options: handed over.
            environment: of the process; by default ours with the settings of `dapt_jax.runtime.allocator`.
        """
        ours = {**os.environ, **allocator.settings(os.environ)} if environment is None else dict(environment)
        self._name = f"{module} {options.get('side', '')}"
        command = [sys.executable, "-m", module, "--side", json.dumps(dict(options))]
        self._process = subprocess.Popen(
            command, env=ours, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process and waits for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # of a side that ended early, which `measure` has told
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def measure(self, what: Any = None) -> Row:
        """Hands over what to measure and returns what came of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"the side {self._name} ended early: its error is above")
        return json.loads(line)


def serve(measure: Callable[[Any], Row]) -> None:
    """Answers each line of standard input; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(measure(json.loads(line))), file=answers, flush=True)


def in_turn(sides: Mapping[str, Side], rounds: int, what: Any = None) -> dict[str, list[Row]]:
    """Measures every side once per round, the order turned round each time."""
    found: dict[str, list[Row]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(sides[name].measure(what))
    return found
