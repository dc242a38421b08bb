"""The few places of the library that golden files are made from; what moves in the library is mended here alone."""

from pathlib import Path
from unittest import mock

from tests.command import run

MEMORY = 8 << 30
"""Bytes of device memory that plans are made for, whatever this machine has."""


def run_study(config: str, workdir: Path) -> int:
    """Run a study without its report, which takes longer than all the rest; return the exit code."""
    with mock.patch("dapt_jax.report.build"):
        return run(f"--config={config}", f"--workdir={workdir}")


def print_plan(config: str) -> int:
    """Print the plan of a study for a device of `MEMORY`; return the exit code."""
    with mock.patch("dapt_jax.cost.hardware.device_bytes", return_value=MEMORY):
        return run(f"--config={config}", "--config.mode=plan")


def is_on_cpu() -> bool:
    """Tell whether JAX computes on the CPU, as it did for the golden records."""
    import jax

    return jax.default_backend() == "cpu"
