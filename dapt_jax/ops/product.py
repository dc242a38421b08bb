"""Product of activations and a kernel, with a gradient that is fast in XLA:CPU."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dapt_jax.ops import choice


def product(x: Float[Array, "*b c"], kernel: Float[Array, "c d"]) -> Float[Array, "*b d"]:
    """Multiply activations with a kernel: a dense layer without its bias, or a 1 x 1 convolution at stride 1.

    Args:
        x: Activations.
        kernel: Kernel (in, out), of the same dtype as `x`.

    Returns:
        `x @ kernel`. The CPU formulation defines only a reverse-mode gradient.
    """
    return _product(x, kernel) if choice.current() == "cpu" else x @ kernel


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    inputs, outputs = kernel.shape
    g = materialised(g)
    return g @ kernel.T, x.reshape(-1, inputs).T @ g.reshape(-1, outputs)


_product.defvjp(_forward, _backward)


def sum_of_products(
    x: Float[Array, "*b c"], kernel: Float[Array, "c d"], low: Float[Array, "*b r"], up: Float[Array, "r d"]
) -> Float[Array, "*b d"]:
    """Return `x @ kernel + low @ up`: a dense layer with a low-rank update, without its bias.

    The CPU formulation is one product of joined inputs and kernels. Of two products XLA:CPU keeps both results until
    the backward pass, since it adds them anew wherever their sum is needed.

    Args:
        x: Activations.
        kernel: Kernel (in, out), of the same dtype as `x`.
        low: Activations times the update's first factor.
        up: The update's second factor.
    """
    if choice.current() == "cpu":
        return _joined(x, kernel, low, up)
    return x @ kernel + low @ up


@jax.custom_vjp
def _joined(x: jax.Array, kernel: jax.Array, low: jax.Array, up: jax.Array) -> jax.Array:
    return jnp.concatenate([x, low], -1) @ jnp.concatenate([kernel, up])


def _joined_forward(
    x: jax.Array, kernel: jax.Array, low: jax.Array, up: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    return _joined(x, kernel, low, up), (x, kernel, low, up)


def _joined_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    x, kernel, low, up = saved
    dx, d_kernel = _backward((x, kernel), g)
    d_low, d_up = _backward((low, up), g)
    return dx, d_kernel, d_low, d_up


_joined.defvjp(_joined_forward, _joined_backward)


def materialised(g: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Return a gradient that XLA:CPU computes once, before the product with it that gives a kernel's gradient.

    Otherwise XLA fuses what computes the gradient into the copy that transposes it for that product, and runs through
    the images by columns: a step of low-rank updates then takes longer than one that trains the kernels whole.
    """
    return lax.optimization_barrier(g) if choice.current() == "cpu" else g
