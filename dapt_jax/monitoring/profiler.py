"""A trace of a few steps by JAX's profiler, on request."""

from pathlib import Path

import jax

PROFILE = "profile"
"""Name of the folder of traces in a workdir: for TensorBoard's profile plugin, xprof or Perfetto."""


class Profiler:
    """Traces some steps of the first run that comes to them, once in a process."""

    def __init__(self, folder: Path | None = None, step: int = 0, steps: int = 5):
        """Waits for the step.

        Args:
            folder: Folder of the trace; None for no trace.
            step: First step that is traced, counted from 1 in a run; where it is in a phase whose epochs run
                as one program, the next step that stands alone. 0 traces none.
            steps: Number of steps to trace.
        """
        self._folder, self._step, self._steps = folder, step if folder else 0, steps
        self._until = 0

    def before(self, step: int, state: object) -> None:
        """Starts or ends the trace where it is time; waits for the device then, so that it holds whole steps.

        Args:
            step: Number of the step that is about to run, from 1.
            state: State whose arrays the steps before it are computing.
        """
        if self._until and step >= self._until:
            self.close(state)
        elif self._step and not self._until and step >= self._step:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._until = step + self._steps

    def close(self, state: object = None) -> None:
        """Ends a trace that is open."""
        if self._until:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._until = self._step = 0
