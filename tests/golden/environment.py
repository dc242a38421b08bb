"""What floats depend on beside the code: where it agrees, they agree to the bit."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "pillow")


def fingerprint() -> dict[str, str]:
    """Return what two environments must have in common for results to agree bit for bit.

    The number of cores is part of it: XLA splits sums among its threads.
    """
    name, flags = _processor()
    return {
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "cpu": name,
        "cpu_flags": hashlib.sha256(" ".join(sorted(flags)).encode()).hexdigest()[:16],
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _processor() -> tuple[str, list[str]]:
    """The processor's name and the instruction sets that it says it has."""
    found = {}
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    return name, (found.get("flags") or found.get("Features") or "").split()
