"""Choice of the formulation of an operation at trace time: that of `lax`, or the one for XLA:CPU."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal, get_args

import jax

Formulation = Literal["lax", "cpu"]

_forced: contextvars.ContextVar[Formulation | None] = contextvars.ContextVar("formulation", default=None)


def current() -> Formulation:
    """Return the formulation that an operation traced now uses."""
    return _forced.get() or ("cpu" if jax.default_backend() == "cpu" else "lax")


@contextlib.contextmanager
def formulation(name: Formulation) -> Iterator[None]:
    """Trace everything inside the block with one formulation, whatever the backend.

    The choice is made at trace time, so it has no effect on a jitted function that is already in jit's cache:
    to trace the same function both ways, wrap a new function object in a new `jax.jit` (or
    `jax.make_jaxpr`).

    Args:
        name: `lax` for the convolutions and reductions of `jax.lax` (FLOP counting reads these), `cpu` for
            the formulations that suit XLA:CPU.
    """
    if name not in get_args(Formulation):
        raise ValueError(f"formulation {name!r} is not one of {get_args(Formulation)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
