"""Measured peak of a CPU: makers do not publish it, and utilisation needs it.

    python -m dapt_jax.cost.hardware

Measured once per processor, number of cores and JAX version, and stored in the user's cache folder; takes
about two seconds.
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dapt_jax.runtime import atomic_files, user_cache

SIDE = 2048
"""Side of the square matrices; their product is 17 GFLOP."""
FLOATS = 1 << 25
"""Size of the array that is read and written, 128 MiB: more than processor caches hold."""
BUDGET_S = 0.3
"""Number of runs per measurement, after compilation and one warm-up run."""
DTYPES = ("float32", "bfloat16")


def measure() -> dict[str, float]:
    """Measure the default device.

    Returns:
        FLOP/s of a large matrix product by dtype, and `bandwidth` in bytes/s of reading and writing an array;
        the best of several runs each, over all JAX devices of this process's processor together.
    """
    import jax
    import jax.numpy as jnp

    found = {}
    product = jax.jit(jnp.matmul)
    for dtype in DTYPES:
        a = jnp.full((SIDE, SIDE), 0.5, dtype)
        found[dtype] = 2 * SIDE**3 / _best(product, a, a)
    doubled = jax.jit(lambda x: x * 2)
    found["bandwidth"] = 2 * 4 * FLOATS / _best(doubled, jnp.ones(FLOATS, jnp.float32))
    return found


def _best(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds of the fastest run of a function that returns a JAX array."""
    function(*arguments).block_until_ready()
    best, end = float("inf"), time.perf_counter() + BUDGET_S
    while time.perf_counter() < end:
        start = time.perf_counter()
        function(*arguments).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best


def key(cpu: str, cores: int) -> str:
    """Return the key under which a measurement is stored."""
    import jax

    return f"{cpu}, {cores} cores, jax {jax.__version__}"


def stored(cpu: str, cores: int) -> dict[str, float] | None:
    """Return the stored measurement of such a processor, or None; an unreadable file counts as none."""
    try:
        found = json.loads(file().read_text(encoding="utf-8"))[key(cpu, cores)]
        return {name: float(found[name]) for name in (*DTYPES, "bandwidth")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measured(cpu: str, cores: int, *, anew: bool = False) -> dict[str, float]:
    """Return the stored measurement, or measure now and store the result.

    Where the result cannot be stored, it is measured again next time.
    """
    found = None if anew else stored(cpu, cores)
    if found is None:
        found = measure()
        try:
            held = json.loads(file().read_text(encoding="utf-8"))
        except (OSError, ValueError):
            held = {}
        held = held if isinstance(held, dict) else {}
        with contextlib.suppress(OSError):
            atomic_files.write_text(file(), json.dumps({**held, key(cpu, cores): found}, indent=1) + "\n")
    return found


def file() -> Path:
    """Return the file of measurements of the machines that share this user's cache."""
    return user_cache.folder("peak.json")
