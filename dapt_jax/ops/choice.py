"""Which formulation of an operation is traced: `lax`'s own, or the one for XLA:CPU."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal, get_args

import jax

Formulation = Literal["lax", "cpu"]

_forced: contextvars.ContextVar[Formulation | None] = contextvars.ContextVar("formulation", default=None)


def current() -> Formulation:
    """The formulation that an operation traced now gets."""
    return _forced.get() or ("cpu" if jax.default_backend() == "cpu" else "lax")


@contextlib.contextmanager
def formulation(name: Formulation) -> Iterator[None]:
    """Traces everything inside with one formulation, whatever the backend.

    The choice is made at trace time, so it has no effect on a jitted function that is already in jit's cache:
    to trace the same function both ways, wrap it in a new `jax.jit` (or `jax.make_jaxpr`) of a new function
    object.

    Args:
        name: `lax` for `jax.lax`'s convolutions and reductions (FLOP counting reads these), `cpu` for
            XLA:CPU's sake.
    """
    if name not in get_args(Formulation):
        raise ValueError(f"formulation {name!r} is not one of {get_args(Formulation)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
