"""Augmentation on the device, inside the jitted step: each draw from (seed, view, example) alone.

So neither order, nor worker count, nor a restart changes a pixel.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from dapt_jax.errors import UserError, nearest

AnyArray = Array | np.ndarray
FLIPS = ("none", "horizontal", "dihedral")


@dataclasses.dataclass(frozen=True)
class Augment:
    """What is drawn per image.

    Attributes:
        flip: `none`, `horizontal`, or `dihedral` (flips and quarter turns; needs square images).
        shift: largest translation, as a fraction of the side; the border is reflected.
        brightness: largest relative change of brightness.
        contrast: largest relative change of contrast.
    """

    flip: str = "none"
    shift: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0

    def __post_init__(self) -> None:
        if self.flip not in FLIPS:
            raise UserError(f"unknown flip {self.flip!r}; {nearest(self.flip, FLIPS)}")
        for name in ("shift", "brightness", "contrast"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"augment.{name} is {getattr(self, name)}; expected 0 (off) to less than 1")

    @property
    def is_identity(self) -> bool:
        """Whether images are left as they are."""
        return self == Augment()

    def __call__(
        self, images: Num[AnyArray, "b h w c"], seed: Any, view: Any, index: Int[AnyArray, " b"]
    ) -> Num[Array, "b h w c"]:
        """Augments a batch.

        Args:
            images: values 0 to 255, uint8 or float.
            seed: of the run, an integer.
            view: an integer, number of the view, the epoch where every epoch has new ones.
            index: row of each example in its data set.

        Returns:
            The images as they came if this is the identity, else float32 of the same shape, values 0 to 255.
        """
        images = jnp.asarray(images)
        if self.is_identity:
            return images
        key = jax.random.fold_in(jax.random.key(seed), view)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.asarray(index))
        return jax.vmap(self._one)(images.astype(jnp.float32), keys)

    def _one(self, image: Float[Array, "h w c"], key: PRNGKeyArray) -> Float[Array, "h w c"]:
        for_flip, for_shift, for_colour = jax.random.split(key, 3)
        if self.flip != "none":
            left_right, up_down, turn = jax.random.bernoulli(for_flip, shape=(3,))
            image = jnp.where(left_right, image[:, ::-1], image)
            if self.flip == "dihedral":
                image = jnp.where(up_down, image[::-1], image)
                image = jnp.where(turn, image.swapaxes(0, 1), image)
        if self.shift:
            height, width, channels = image.shape
            reach = max(1, round(self.shift * min(height, width)))
            corner = jax.random.randint(for_shift, (2,), 0, 2 * reach + 1)
            padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
            image = jax.lax.dynamic_slice(padded, (corner[0], corner[1], 0), (height, width, channels))
        bright, sharp = jax.random.uniform(for_colour, (2,), minval=-1.0, maxval=1.0)
        if self.contrast:
            mean = image.mean()
            image = mean + (image - mean) * (1 + self.contrast * sharp)
        if self.brightness:
            image = image * (1 + self.brightness * bright)
        return jnp.clip(image, 0, 255)
