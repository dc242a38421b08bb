"""glibc malloc settings that stop XLA:CPU's buffers from being returned to the kernel between steps.

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

SWITCH = "DAPT_JAX_ALLOCATOR"
SETTINGS = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that an environment lacks.

    They are none off glibc, with `DAPT_JAX_ALLOCATOR=off`, or where any of them is set already.
    """
    if platform.libc_ver()[0] != "glibc" or environment.get(SWITCH) in ("off", "set"):
        return {}
    return {} if any(name in environment for name in SETTINGS) else {**SETTINGS, SWITCH: "set"}


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
