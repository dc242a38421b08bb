"""Softmax attention, with its gradient in closed form."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    bias: Float[Array, "#b #h n m"] | None = None,
) -> Float[Array, "b n h d"]:
    """Return softmax(q k / sqrt(d) + bias) v of every head (Vaswani et al., arXiv 1706.03762, equation 1).

    The softmax is in float32. It is divided by its sum after the product with the values, so that of all arrays as
    large as the scores, the exponentials alone are kept for the backward pass; automatic differentiation of
    `jax.nn.dot_product_attention` keeps three.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        bias: Summand of the scores.

    Returns:
        The output in the dtype of `q`.
    """
    return _forward(q, k, v, bias)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, Any]:
    scores = _product("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores += bias
    exponentials = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = exponentials.sum(-1).mT[..., None]
    exponentials = exponentials.astype(v.dtype)
    y = (_product("bhnm,bmhd->bnhd", exponentials, v) / total).astype(q.dtype)
    return y, (q, k, v, bias, exponentials, total, y)


def _backward(saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    q, k, v, bias, exponentials, total, y = saved
    wide = g.astype(jnp.float32) / total
    g = wide.astype(v.dtype)
    dv = _product("bhnm,bnhd->bmhd", exponentials, g)
    # The mean of the values' gradient under the softmax is its product with the output.
    mean = (wide * y).sum(-1).mT[..., None]
    d_scores = exponentials * (_product("bnhd,bmhd->bhnm", g, v) - mean)
    d_bias = None if bias is None else _summed_to(d_scores, bias)
    d_scores = (d_scores / math.sqrt(q.shape[-1])).astype(q.dtype)
    dq, dk = _product("bhnm,bmhd->bnhd", d_scores, k), _product("bhnm,bnhd->bmhd", d_scores, q)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_bias


attention.defvjp(_forward, _backward)


def _product(dimensions: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a product with sums in float32."""
    return jnp.einsum(dimensions, a, b, preferred_element_type=jnp.float32)


def _summed_to(gradient: jax.Array, bias: jax.Array) -> jax.Array:
    """Return the gradient of a bias that was broadcast over images or heads."""
    axes = tuple(axis for axis, size in enumerate(bias.shape) if size == 1)
    return gradient.sum(axes, keepdims=True).astype(bias.dtype)
