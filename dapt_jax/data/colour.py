"""Colour transformations of images with values 0 to 1."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def grey(image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
    """Return the luma of an image (ITU-R BT.601)."""
    return image @ jnp.array([0.299, 0.587, 0.114])


def saturate(image: Float[Array, "h w 3"], factor: Array | float) -> Float[Array, "h w 3"]:
    """Scale the distance of every pixel from its luma by a factor; 0 makes the image grey."""
    base = grey(image)[..., None]
    return jnp.clip(base + factor * (image - base), 0, 1)


def turn_hue(image: Float[Array, "h w 3"], turn: Array | float) -> Float[Array, "h w 3"]:
    """Rotate the hue by a fraction of the full circle; saturation and value are unchanged (HSV hexcone)."""
    value, low = image.max(-1), image.min(-1)
    chroma = value - low
    safe = jnp.where(chroma > 0, chroma, 1.0)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    sextant = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = sextant + 6 * turn
    # Channel by channel: a trapezoid over the six sextants, shifted by 5, 3 and 1.
    place = jnp.mod(jnp.stack([5 + hue, 3 + hue, 1 + hue], -1), 6)
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)
