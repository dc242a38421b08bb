"""Trip count of a `lax.while_loop`, where the jaxpr determines it.

`lax.fori_loop` with bounds that are not Python numbers, and hand-written counting loops, trace to `while`.
When the condition is `i < n`, the body adds a constant to `i` and leaves `n` unchanged, and both start from
numbers known at trace time, the count follows by arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex


class Known:
    """The integer scalars of a jaxpr whose value is known without running it."""

    def __init__(self) -> None:
        self._values: dict[jex.Var, int] = {}

    @classmethod
    def of(cls, jaxpr: jex.Jaxpr, consts: Sequence[Any]) -> Known:
        """Start from the constants of a closed jaxpr.

        Dead-code elimination preserves their order only if all of them remain.
        """
        known = cls()
        if len(jaxpr.constvars) == len(consts):
            for var, value in zip(jaxpr.constvars, consts, strict=True):
                known._put(var, value)
        return known

    def into(self, body: jex.Jaxpr, operands: Sequence[Any]) -> Known:
        """Return what is known of a body's parameters when it is called with `operands`."""
        inner = Known()
        for var, operand in zip(body.invars, operands, strict=True):
            inner._put(var, self.value(operand))
        return inner

    def learn(self, eqn: jex.JaxprEqn) -> None:
        """Propagate a value through the conversions that loops apply to their bounds."""
        if eqn.primitive.name in ("convert_element_type", "copy", "copy_p", "stop_gradient"):
            self._put(eqn.outvars[0], self.value(eqn.invars[0]))

    def value(self, atom: jex.Var | jex.Literal) -> int | None:
        """Return the value of a literal or of a known variable, else None."""
        return _integer(atom.val) if isinstance(atom, jex.Literal) else self._values.get(atom)

    def _put(self, var: jex.Var, value: object) -> None:
        number = _integer(value)
        if number is not None:
            self._values[var] = number


def while_trips(eqn: jex.JaxprEqn, known: Known) -> int | None:
    """Return how often a `while` equation runs its body, or None when the jaxpr does not determine it."""
    params = eqn.params
    cond, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
    if (
        len(cond.eqns) != 1
        or cond.eqns[0].primitive.name not in ("lt", "le")
        or cond.outvars != cond.eqns[0].outvars
    ):
        return None
    cond_consts, body_consts = params["cond_nconsts"], params["body_nconsts"]
    carry = eqn.invars[cond_consts + body_consts :]

    def slot(atom: jex.Var) -> int | None:
        index = cond.invars.index(atom) - cond_consts if atom in cond.invars else -1
        return index if index >= 0 else None

    def bound(atom: jex.Var | jex.Literal) -> int | None:
        if isinstance(atom, jex.Literal):
            return known.value(atom)
        index = slot(atom)
        if index is None:
            return known.value(eqn.invars[cond.invars.index(atom)])
        unchanged = body.outvars[index] is body.invars[body_consts + index]
        return known.value(carry[index]) if unchanged else None

    counter, limit = cond.eqns[0].invars
    index = None if isinstance(counter, jex.Literal) else slot(counter)
    if index is None:
        return None
    start, stop = known.value(carry[index]), bound(limit)
    step = _step(body, body.invars[body_consts + index], body.outvars[index])
    if start is None or stop is None or step is None:
        return None
    stop += cond.eqns[0].primitive.name == "le"
    return max(0, -(-(stop - start) // step))


def _step(body: jex.Jaxpr, before: jex.Var, after: jex.Var) -> int | None:
    """Return the positive constant that a body adds to its counter, or None."""
    for eqn in body.eqns:
        if eqn.primitive.name == "add" and eqn.outvars[0] is after and before in eqn.invars:
            other = [atom for atom in eqn.invars if atom is not before]
            step = _integer(other[0].val) if other and isinstance(other[0], jex.Literal) else None
            return step if step is not None and step > 0 else None
    return None


def _integer(value: Any) -> int | None:
    """Return a concrete integer scalar as an int, and None for anything else."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if getattr(value, "shape", None) == () and jnp.issubdtype(
        getattr(value, "dtype", np.float64), np.integer
    ):
        return int(value)
    return None
