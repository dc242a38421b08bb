"""Memory of the process: glibc malloc settings for XLA:CPU, and the address space that XLA needs.

Each step of a CPU program allocates its temporary buffers again. By default glibc obtains large ones from the
kernel and returns them each time, so that every page of them faults in again; `benchmarks/allocator.py`
measures the cost. glibc reads these settings only when a process starts.
"""

import contextlib
import os
import platform
import signal
import sys
from collections.abc import Mapping

from dapt_jax.errors import UserError

SWITCH = "DAPT_JAX_ALLOCATOR"
SETTINGS = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}

_LEAST_BYTES = 2 << 30
_BYTES_PER_CORE = 128 << 20
"""The smallest study takes 2.22 GiB of address space on two cores; each thread reserves a stack and an arena."""


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that an environment lacks.

    They are none off glibc, with `DAPT_JAX_ALLOCATOR=off`, or where any of them is set already.
    """
    if platform.libc_ver()[0] != "glibc" or environment.get(SWITCH) in ("off", "set"):
        return {}
    return {} if any(name in environment for name in SETTINGS) else {**SETTINGS, SWITCH: "set"}


def check_address_space(cores: int | None = None) -> None:
    """Refuse to start XLA where the address space (`ulimit -v`) is too small for any study.

    XLA waits for ever for a thread that it could not start, and aborts where an allocation of its own fails:
    neither could be reported any more.

    Args:
        cores: Number of CPU cores; those that this process may use by default.

    Raises:
        UserError: The limit is below 2 GiB and 128 MiB for each core, for its threads' stacks and arenas.
    """
    try:
        import resource
    except ImportError:
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    cores = cores or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    least = _LEAST_BYTES + cores * _BYTES_PER_CORE
    if limit != resource.RLIM_INFINITY and limit < least:
        raise UserError(
            f"ulimit -v: an address space of {limit / 2**30:.2f} GiB; expected at least {least / 2**30:.2f} "
            f"GiB for XLA on {cores} cores: raise the limit or remove it (ulimit -v unlimited)"
        )


def restart_with_settings() -> None:
    """Restart the process with the same command line and the settings; return if none are missing."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked by a restart
    missing = settings(os.environ)
    if not sys.flags.utf8_mode and sys.getfilesystemencoding().lower() != "utf-8":
        missing["PYTHONUTF8"] = "1"  # names of files are UTF-8, whatever the locale
    if missing:
        sys.stdout.flush()
        # Until the restarted process has a handler, Ctrl-C would be a traceback of the interpreter's start.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with contextlib.suppress(OSError):  # without the settings, it is slower
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
