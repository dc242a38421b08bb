"""Trace of a few steps with JAX's profiler, on request."""

from pathlib import Path

import jax

PROFILE = "profile"
"""Name of the folder of traces in a workdir: for TensorBoard's profile plugin, xprof or Perfetto."""


class Profiler:
    """Profiler that traces some steps of the first run that reaches them, once per process."""

    def __init__(self, folder: Path | None = None, step: int = 0, steps: int = 5):
        """Wait for the first step to trace.

        Args:
            folder: Folder of the trace; None for no trace.
            step: First step to trace, counted from 1 in a run; where it falls in a phase whose epochs run as
                one program, the next step that runs separately. 0 traces none.
            steps: Number of steps to trace.
        """
        self._folder, self._step, self._steps = folder, step if folder else 0, steps
        self._until = 0

    def before(self, step: int, state: object) -> None:
        """Start or end the trace when due; then wait for the device, so that the trace holds whole steps.

        Args:
            step: Number of the next step, from 1.
            state: State whose arrays the previous steps are computing.
        """
        if self._until and step >= self._until:
            self.close(state)
        elif self._step and not self._until and step >= self._step:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._until = step + self._steps

    def close(self, state: object = None) -> None:
        """End an open trace."""
        if self._until:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._until = self._step = 0
