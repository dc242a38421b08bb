"""What glibc has to be told so that XLA:CPU's buffers keep their pages from one step to the next.

Each step of a CPU program allocates its temporary buffers anew. By default glibc takes large ones from the
kernel and gives them back each time, and every page of them faults in again; `benchmarks/allocator.py`
measures what that costs. glibc reads these settings only when a process starts.
"""

import os
import platform
import sys
from collections.abc import Mapping

SWITCH = "DAPT_JAX_ALLOCATOR"
SETTINGS = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What is missing in an environment: nothing off glibc, with `DAPT_JAX_ALLOCATOR=off`, or where any is set already."""
    if platform.libc_ver()[0] != "glibc" or environment.get(SWITCH) in ("off", "set"):
        return {}
    return {} if any(name in environment for name in SETTINGS) else {**SETTINGS, SWITCH: "set"}


def restart_with_settings() -> None:
    """Replaces the process by one of the same command line with the settings; returns where none are missing."""
    missing = settings(os.environ)
    if missing:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})
