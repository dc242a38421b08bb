"""Gaussian error linear unit, with its gradient in closed form."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.custom_vjp
def gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Apply the exact Gaussian error linear unit (Hendrycks & Gimpel, arXiv 1606.08415), computed in float32.

    It is written with erf as PyTorch's is, not with erfc as `jax.nn.gelu`, whose two branches XLA:CPU computes
    both; they differ by the rounding of 1 + erf. The gradient needs the input alone.

    Args:
        x: Activations.

    Returns:
        `x` times the normal distribution function of it, in the dtype of `x`.
    """
    wide = x.astype(jnp.float32)
    return (wide * _distribution(wide)).astype(x.dtype)


def _distribution(x: jax.Array) -> jax.Array:
    """Return the distribution function of the standard normal distribution."""
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    # The same values as `_distribution`, erf being odd, but not the same expression: XLA would merge the two and keep
    # the result of erf from the forward pass, as large as the input, until here.
    distribution = 0.5 * (1 - lax.erf(wide * -math.sqrt(0.5)))
    density = jnp.exp(-0.5 * wide * wide) * (1 / math.sqrt(2 * math.pi))
    return ((cotangent.astype(jnp.float32) * (distribution + wide * density)).astype(x.dtype),)


gelu.defvjp(_forward, _backward)
