"""Compiled steps by key: each is compiled once, and on an accelerator while an earlier phase trains."""

import contextvars
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

Compile = Callable[[], Any]
"""Function that traces, lowers and compiles a step."""


def compiles_ahead() -> bool:
    """Return whether the next phase's step is compiled beside training.

    An accelerator leaves the host idle. On a CPU, compiling would take the cores from the steps that it is
    meant to hide behind; several processes have to compile in the same order where they share kernel tuning.
    """
    return jax.default_backend() != "cpu" and jax.process_count() == 1


class Executables:
    """Compiled steps by key, shared by phases, arms and seeds; used from one thread."""

    def __init__(self) -> None:
        self._futures: dict[Hashable, Future[Any]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._futures)

    def values(self) -> Iterator[Any]:
        """Yield every compiled step, once it is compiled."""
        return (future.result() for future in self._futures.values())

    def find(self, key: Hashable) -> Any:
        """Return the step of a key, waiting for one that is being compiled; None where it is left to do."""
        future = self._futures.get(key)
        if future is None or future.cancel():  # one that has not begun is not waited for
            return None
        try:
            return future.result()
        except Exception:  # beside training, tuning may find too little device memory
            return None

    def add(self, key: Hashable, step: Any) -> None:
        """Add a compiled step."""
        self._futures[key] = Future()
        self._futures[key].set_result(step)

    def start(self, key: Hashable, compile_step: Compile) -> None:
        """Begin to compile the step of a key in the background; a failure leaves it to do."""
        if key in self._futures:
            return
        self._thread = self._thread or ThreadPoolExecutor(1, "compile")
        self._futures[key] = self._thread.submit(contextvars.copy_context().run, compile_step)
