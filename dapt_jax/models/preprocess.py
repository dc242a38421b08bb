"""What pretrained weights expect of an image."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """`(x - mean) / std` per channel, x in 0..255.

    Attributes:
        mean: Mean of each channel, in the order that the weights expect.
        std: Standard deviation of each channel, likewise.
        bgr: The weights expect blue first (Keras "caffe" models).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return len(self.mean)

    def for_channels(self, channels: int) -> "Preprocess":
        """The same for images of another number of channels.

        One channel is taken for grey: mean and deviation are the averages of the three. More than one take
        turns at the values of the three.
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
        """Normalise images with values 0 to 255, uint8 or float; of three or more channels RGB come first."""
        if self.bgr:
            images = images[..., [2, 1, 0, *range(3, self.channels)]]
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return ((images.astype(jnp.float32) - mean) / std).astype(dtype)


IMAGENET = Preprocess(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
"""Mean and deviation of ImageNet's training images, as torchvision and timm use them."""
HALF = Preprocess(mean=(127.5,) * 3, std=(127.5,) * 3)
"""To -1..1, as TensorFlow's and the original vision transformers use it."""
