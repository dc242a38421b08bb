"""FLOPs of any JAX function, exact, from its jaxpr and without compilation; frozen parameters cost nothing.

`jax.stages.Compiled.cost_analysis` counts the body of a `lax.scan` once whatever its length, adds
elementwise work to matrix work, and differs between backends. Here only matrix products and convolutions
count (a multiply-accumulate is 2), as in the FLOPs of published model cards and in the PaLM paper's model
FLOPs utilisation (arXiv 2204.02311, appendix B); elementwise operations and reductions are bound by memory
bandwidth, not by arithmetic.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jex
from jax.interpreters import partial_eval as pe

from dapt_jax.cost import matmul, trips
from dapt_jax.errors import UserError

Formula = Callable[[Sequence[Any]], int]

# The primitive of `jax.checkpoint`, including the names of earlier JAX releases.
CHECKPOINT = frozenset({"remat", "remat2", "checkpoint"})

# Calls whose body runs once per call, likewise.
# fmt: off
CALLS = CHECKPOINT | frozenset({
    "jit", "pjit", "call", "core_call", "closed_call", "core_closed_call", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr",
})

# Primitives that do matrix work, or hide it, and have no count.
UNCOUNTED = frozenset({
    "cholesky", "cholesky_update", "eig", "eigh", "fft", "geqrf", "hessenberg", "householder_product", "lu",
    "qr", "schur", "svd", "triangular_solve", "tridiagonal", "tridiagonal_solve", "custom_linear_solve",
    "ragged_dot", "ragged_dot_general", "scaled_matmul", "custom_call", "ffi_call", "pallas_call",
    "tpu_custom_call", "mosaic_gpu", "pure_callback", "io_callback",
})
# fmt: on

# The name scope under which JAX's checkpoint transformation replays the forward pass inside a backward pass.
REPLAY_SCOPE = "rematted_computation"

_formulas: dict[str, Formula] = {}


@dataclasses.dataclass(frozen=True)
class Flops:
    """A count of floating-point operations; supports addition, and multiplication by a number of steps.

    Attributes:
        model: FLOPs that the mathematics requires: no recomputation, no padding taps.
        hardware: FLOPs that run: `model` plus what `jax.checkpoint` recomputes.
        padded: `model` plus the taps of convolutions that fall on padding; the textbook convolution count.
        by_op: `model` by operation: primitive name, or `jit:<name>` for a registered function.
        unknown: Operations that could not be counted, sorted; if there are any, the count is a lower bound.
    """

    model: int = 0
    hardware: int = 0
    padded: int = 0
    by_op: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def __add__(self, other: Flops) -> Flops:
        names = dict.fromkeys((*self.by_op, *other.by_op))
        return Flops(
            self.model + other.model,
            self.hardware + other.hardware,
            self.padded + other.padded,
            {name: self.by_op.get(name, 0) + other.by_op.get(name, 0) for name in names},
            tuple(sorted({*self.unknown, *other.unknown})),
        )

    def __mul__(self, times: int) -> Flops:
        by_op = {name: flops * times for name, flops in self.by_op.items()}
        return Flops(self.model * times, self.hardware * times, self.padded * times, by_op, self.unknown)

    __rmul__ = __mul__


def register(name: str, formula: Formula) -> None:
    """Register a formula for every `jax.jit`-ed function called `name`, whose body is then not traversed.

    Meant for operations whose implementation hides their arithmetic, such as a depthwise convolution written
    as a sum of shifted products. JAX gives the pieces of a differentiated jit the name of the whole, so give
    the function a `jax.custom_vjp` whose forward and backward rules are jit-ed functions with distinct names,
    each with one output (an unread output is eliminated before the formula is called).

    Args:
        name: The function's `__name__`, as it is when `jax.jit` wraps it.
        formula: Function from the abstract values of the operands (`.shape`, `.dtype`), in order, to FLOPs
            (MAC = 2).

    Raises:
        UserError: Another formula already has the name.
    """
    if _formulas.setdefault(name, formula) is not formula:
        raise UserError(f"a FLOP formula is already registered for the jit-ed function {name!r}")


def count(fn: Callable[..., Any], *args: Any) -> Flops:
    """Count the FLOPs of `fn(*args)` without running or compiling it.

    >>> matrix = jax.ShapeDtypeStruct((8, 8), "float32")
    >>> count(lambda a, b: a @ b, matrix, matrix).model
    1024

    Computations that no output depends on are removed first, so gradients of frozen parameters cost nothing
    unless they are read. Recomputation is recognised relative to an existing forward pass: count a function
    that returns its loss (`jax.value_and_grad`); otherwise a forward pass that only the gradient needs may
    itself be taken for the recomputed one. Under `shard_map` every device of the mesh counts.

    Args:
        fn: Any traceable function.
        *args: Arguments of `fn`: pytrees of arrays, scalars or `jax.ShapeDtypeStruct`.

    Returns:
        FLOPs of one call, over all devices.

    Raises:
        UserError: An argument is not an array, a scalar or a `jax.ShapeDtypeStruct`.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) and not isinstance(
            leaf, bool | int | float | complex
        ):
            where = jax.tree_util.keystr(path)
            raise UserError(
                f"count: argument {where} is a {type(leaf).__name__}; expected arrays or ShapeDtypeStruct"
            )
    closed = jax.make_jaxpr(fn)(*args)
    jaxpr, _ = pe.dce_jaxpr(closed.jaxpr, True, True)
    return _walk(jaxpr, trips.Known.of(jaxpr, closed.consts), replayed=False)


def _walk(jaxpr: jex.Jaxpr, known: trips.Known, *, replayed: bool) -> Flops:
    """Sum over the equations of a jaxpr; inside recomputed code, all counts as hardware FLOPs only."""
    total = Flops()
    for eqn in jaxpr.eqns:
        total += _equation(eqn, known, replayed or REPLAY_SCOPE in str(eqn.source_info.name_stack))
        known.learn(eqn)
    return total


def _equation(eqn: jex.JaxprEqn, known: trips.Known, replayed: bool) -> Flops:
    """Count one equation, multiplied by the trips of a loop."""
    name = eqn.primitive.name
    walk = functools.partial(_body, eqn, known, replayed)
    if name == "dot_general":
        flops = matmul.dot_general(eqn)
        return _leaf(name, flops, flops, replayed)
    if name == "conv_general_dilated":
        return _leaf(name, *matmul.conv_general_dilated(eqn), replayed)
    if name in CALLS:
        formula = _formulas.get(str(eqn.params.get("name")))
        if formula is not None:
            flops = int(formula([var.aval for var in eqn.invars]))
            return _leaf(f"jit:{eqn.params['name']}", flops, flops, replayed)
        return _sum(walk(body) for body in jex.jaxprs_in_params(eqn.params))
    if name == "scan":
        return walk(_open(eqn.params["jaxpr"])) * eqn.params["length"]
    if name == "while":
        return _while(eqn, known, replayed)
    if name == "cond":
        return max(
            (walk(_open(branch)) for branch in eqn.params["branches"]), key=lambda branch: branch.hardware
        )
    if name == "shard_map":
        axes = (
            eqn.params.get("newly_manual_axes")
            or eqn.params.get("manual_axes")
            or eqn.params["mesh"].axis_names
        )
        return walk(_open(eqn.params["jaxpr"])) * math.prod(eqn.params["mesh"].shape[axis] for axis in axes)
    if name in UNCOUNTED:
        return Flops(unknown=(name,))
    inside = _sum(walk(body) for body in jex.jaxprs_in_params(eqn.params))
    # Reducers, comparators and scatter updates carry scalar bodies, which have no matrix FLOPs. A body with
    # matrix work runs a number of times that depends on the primitive.
    return inside + Flops(unknown=(name,)) if inside.hardware else inside


def _while(eqn: jex.JaxprEqn, known: trips.Known, replayed: bool) -> Flops:
    """Count body and condition times the trip count; if that is unknown, count once and report it."""
    bodies = [
        _walk(_open(eqn.params[key]), trips.Known(), replayed=replayed)
        for key in ("body_jaxpr", "cond_jaxpr")
    ]
    inside = _sum(bodies)
    if not inside.hardware and not inside.unknown:
        return inside
    times = trips.while_trips(eqn, known)
    return inside + Flops(unknown=("while",)) if times is None else inside * times


def _body(eqn: jex.JaxprEqn, known: trips.Known, replayed: bool, body: jex.Jaxpr) -> Flops:
    """Traverse a body.

    Known values of operands are passed in where operands and parameters are the same list.
    """
    same = eqn.primitive.name in CALLS and len(body.invars) == len(eqn.invars)
    return _walk(body, known.into(body, eqn.invars) if same else trips.Known(), replayed=replayed)


def _leaf(name: str, model: int, padded: int, replayed: bool) -> Flops:
    if replayed:
        return Flops(hardware=model)
    return Flops(model, model, padded, {name: model})


def _sum(parts: Iterable[Flops]) -> Flops:
    return functools.reduce(Flops.__add__, parts, Flops())


def _open(jaxpr: jex.Jaxpr | jex.ClosedJaxpr) -> jex.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr
