"""Preprocessing that pretrained weights expect of an image."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Normalisation `(x - mean) / std` per channel, with x from 0 to 255.

    Attributes:
        mean: Mean of each channel, in the order that the weights expect.
        std: Standard deviation of each channel, likewise.
        bgr: Whether the weights expect channels in the order blue, green, red (Keras "caffe" models).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return len(self.mean)

    def for_channels(self, channels: int) -> "Preprocess":
        """Return the same preprocessing for images with another number of channels.

        A single channel is taken as grey: its mean and deviation are the averages of the three. Several
        channels cycle through the values of the three.
        """
        if channels == self.channels:
            return self
        if channels == 1:
            return Preprocess((sum(self.mean) / self.channels,), (sum(self.std) / self.channels,))
        mean, std = (
            tuple(itertools.islice(itertools.cycle(values), channels)) for values in (self.mean, self.std)
        )
        return Preprocess(mean, std, self.bgr and channels > 2)

    def __call__(
        self,
        images: Num[Array, "b h w c"],
        dtype: DTypeLike = jnp.float32,
    ) -> Float[Array, "b h w c"]:
        """Normalise images with values 0 to 255, uint8 or float; the first three channels are R, G and B."""
        if self.bgr:
            images = images[..., [2, 1, 0, *range(3, self.channels)]]
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return ((images.astype(jnp.float32) - mean) / std).astype(dtype)


IMAGENET = Preprocess(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
"""Mean and standard deviation of ImageNet's training images, as used by torchvision and timm."""
HALF = Preprocess(mean=(127.5,) * 3, std=(127.5,) * 3)
"""Scaling to -1..1, as used by TensorFlow and the original vision transformers."""
UNIT = Preprocess(mean=(0.0,) * 3, std=(255.0,) * 3)
"""Scaling to 0..1, as in SimCLR."""
