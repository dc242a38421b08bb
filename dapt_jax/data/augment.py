"""Augmentation on the device, inside the jitted step; draws depend on (seed, view, example) alone.

Neither the order of examples, nor the number of workers, nor a restart changes a pixel. A mask is transformed
in the same way as its image.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, Num, PRNGKeyArray, UInt8

from dapt_jax.data import colour, randaugment, warp
from dapt_jax.data.randaugment import STRONGEST, Drawn
from dapt_jax.errors import UserError
from dapt_jax.fields import SettingError, check_fields, setting
from dapt_jax.ops import choice

AnyArray = Array | np.ndarray
FLIPS = ("none", "horizontal", "dihedral")
ERASERS = ("noise", "zero")
# `split(key, 3)` is `fold_in` of 0, 1 and 2; other draws from an example's key fold in other numbers.
_FOR_WARPS, _FOR_PATCH, _FOR_MORE_COLOUR, _FOR_RANDAUGMENT = 16, 32, 33, 34


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random transformations of each image, in the order in which they are applied.

    >>> Augment(flip="horizontal", rotate=10.0).is_identity
    False

    Attributes:
        flip: `none`, `horizontal`, or `dihedral` (flips and quarter turns; needs square images).
        shift: Largest translation, as a fraction of the side; the border is reflected.
        brightness: Largest relative change of brightness.
        contrast: Largest relative change of contrast.
        rotate: Largest rotation, in degrees, either way.
        scale: Largest zoom in or out: by up to 1 + scale.
        crop: Smallest share of the area of a random crop that is resized to the full size; 0 for none.
        elastic: Standard deviation of the smooth displacement of knots, as a fraction of the side.
        grid: Largest relative change of the cells of a grid distortion.
        patch: Side in pixels of a random square that is cut out without resizing, or to which a random crop
            is resized; 0 for none.
        gamma: Largest change of the exponent of the intensities, up to 1 + gamma or down to 1 / (1 + gamma).
        saturation: Largest relative change of saturation.
        hue: Largest rotation of the hue, as a fraction of the full circle.
        erase: Probability that a rectangle of 2% to a third of the area is replaced (Zhong et al., arXiv
            1708.04896).
        erase_with: `noise` over the full range of intensities, or `zero`.
        border: What rotation, zoom, distortions and RandAugment read beyond the image: it `mirror`ed, or `zero`.
        randaugment: Number of operations of RandAugment (see `data/randaugment.py`), applied after all other
            geometric and before all other colour operations; 0 for none.
        magnitude: Magnitude of each of these operations, 0 to 30.
        crop_from: Largest short side in pixels of the pictures of files that the random crop is cut from, before
            all else (see `data/file_crops.py`): images are then crops already. 0 cuts it on the device, from
            images of the stored size, after rotation and zoom.
        centre: Whether the patch is the centre of the image instead of a random one.
        overhang: How far in pixels random patches may reach beyond the image, which is mirrored there. Without,
            the last pixel is in one of side - patch + 1 positions of a patch, and hardly trains.
    """

    flip: str = setting("none", choices=FLIPS, doc="Random flips; dihedral adds quarter turns.")
    shift: float = setting(0.0, at_least=0, below=1, doc="Largest translation, as a share of the side.")
    brightness: float = setting(0.0, at_least=0, below=1, doc="Largest relative change of brightness.")
    contrast: float = setting(0.0, at_least=0, below=1, doc="Largest relative change of contrast.")
    rotate: float = setting(0.0, at_least=0, at_most=180, doc="Largest rotation either way, in degrees.")
    scale: float = setting(0.0, at_least=0, doc="Largest zoom in or out, by up to 1 + scale.")
    crop: float = setting(
        0.0, at_least=0, below=1, doc="Smallest share of the area of a random resized crop; 0: none."
    )
    elastic: float = setting(
        0.0, at_least=0, below=1, doc="Deviation of the elastic displacement, as a share of the side."
    )
    grid: float = setting(
        0.0, at_least=0, below=1, doc="Largest relative change of the cells of a grid distortion."
    )
    patch: int = setting(
        0, at_least=0, doc="Side in pixels of a random square that is cut out; 0: the whole image."
    )
    gamma: float = setting(
        0.0, at_least=0, doc="Largest change of the exponent of intensities, up to 1 + gamma."
    )
    saturation: float = setting(0.0, at_least=0, below=1, doc="Largest relative change of saturation.")
    hue: float = setting(
        0.0, at_least=0, at_most=0.5, doc="Largest turn of the hue, as a share of the circle."
    )
    erase: float = setting(0.0, at_least=0, at_most=1, doc="Probability that a rectangle is replaced.")
    erase_with: str = setting("noise", choices=ERASERS, doc="What erase replaces a rectangle by.")
    border: str = setting(
        warp.MIRROR, choices=warp.BORDERS, doc="What geometric operations read beyond the image."
    )
    randaugment: int = setting(0, at_least=0, doc="Number of RandAugment operations per image; 0: none.")
    magnitude: float = setting(
        9.0, at_least=0, at_most=STRONGEST, doc="Magnitude of each RandAugment operation."
    )
    crop_from: int = setting(
        0,
        at_least=0,
        doc="Cut random crops from the files, shrunk to this short side in pixels at most; 0: from stored images.",
    )
    centre: bool = False
    overhang: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.crop_from and not self.crop:
            raise SettingError("crop_from", self.crop_from, "crop above 0 too, such as 0.08")

    @property
    def is_identity(self) -> bool:
        """Whether images are returned unchanged, whatever is said of operations that are not applied."""
        colours = (self.brightness, self.contrast, self.gamma, self.saturation, self.hue)
        return not (self._moves or self.crop or self.erase or any(colours))

    @property
    def is_fixed(self) -> bool:
        """Whether the transformation is deterministic."""
        is_centre = self.centre and not self.crop
        return self.is_identity or (is_centre and dataclasses.replace(self, patch=0).is_identity)

    def size(self, side: int) -> int:
        """Return the side of an augmented image, in pixels.

        Raises:
            UserError: The patch is larger than the image.
        """
        if self.patch > side:
            raise UserError(f"augment.patch is {self.patch}; expected at most the side of the images, {side}")
        return self.patch or side

    def __call__(
        self, images: Num[AnyArray, "b h w c"], seed: ArrayLike, view: ArrayLike, index: Int[AnyArray, " b"]
    ) -> Num[Array, "b h2 w2 c"]:
        """Augment a batch.

        Args:
            images: Values 0 to 255, uint8 or float; with `crop_from`, crops of the final size.
            seed: Seed of the run, an integer.
            view: Number of the view, an integer: the epoch where every epoch has new views.
            index: Row of each example in its data set.

        Returns:
            The unchanged images if this is the identity, else float32 of the same shape (or of the patch's
            shape) with values 0 to 255.
        """
        images = jnp.asarray(images)
        if self.is_identity:
            return images
        return self._each(self._image)(images.astype(jnp.float32), example_keys(seed, view, index))

    def masks(
        self, masks: UInt8[AnyArray, "b h w"], seed: ArrayLike, view: ArrayLike, index: Int[AnyArray, " b"]
    ) -> UInt8[Array, "b h2 w2"]:
        """Transform masks as `__call__` with the same arguments transforms their images.

        No value appears that a mask did not contain before.
        """
        masks = jnp.asarray(masks)
        if not self._moves:
            return masks
        return self._each(self._mask)(masks, example_keys(seed, view, index))

    def _each(self, function: Callable[[Array, PRNGKeyArray], Array]) -> Callable[[Array, Array], Array]:
        """Return a function of an image and its key, mapped over a batch.

        Images are processed one by one where that avoids computing operations that were not drawn.
        """
        if self.randaugment and choice.current() == "cpu":
            return lambda images, keys: jax.lax.map(lambda pair: function(*pair), (images, keys))
        return jax.vmap(function)

    @property
    def _crops(self) -> bool:
        """Whether a random resized crop is cut from the images that are passed."""
        return bool(self.crop and not self.crop_from)

    @property
    def _moves(self) -> bool:
        return self.flip != "none" or any((self.shift, self.patch, self.randaugment, *self._warps))

    @property
    def _warps(self) -> list[Callable[[warp.Coordinates, PRNGKeyArray], warp.Coordinates]]:
        """Return the functions that move the coordinates at which pixels are read."""
        warps: list[Any] = []
        if self.rotate or self.scale:
            warps.append(functools.partial(warp.turned, rotate=self.rotate, scale=self.scale))
        if self._crops:
            warps.append(functools.partial(warp.resized_crop, least=self.crop))
        if self.elastic:
            warps.append(functools.partial(warp.elastic, strength=self.elastic))
        if self.grid:
            warps.append(functools.partial(warp.grid_distortion, strength=self.grid))
        return warps

    def _geometry(self, pixels: Num[Array, "h w c"], key: PRNGKeyArray) -> Num[Array, "h2 w2 c"]:
        """Apply the geometric operations to the pixels of an image or of its mask."""
        for_flip, for_shift, _ = jax.random.split(key, 3)
        if self.flip != "none":
            left_right, up_down, turn = jax.random.bernoulli(for_flip, shape=(3,))
            pixels = jnp.where(left_right, pixels[:, ::-1], pixels)
            if self.flip == "dihedral":
                pixels = jnp.where(up_down, pixels[::-1], pixels)
                pixels = jnp.where(turn, pixels.swapaxes(0, 1), pixels)
        height, width, channels = pixels.shape
        if self.shift:
            reach = max(1, round(self.shift * min(height, width)))
            corner = jax.random.randint(for_shift, (2,), 0, 2 * reach + 1)
            padded = jnp.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
            pixels = jax.lax.dynamic_slice(padded, (corner[0], corner[1], 0), (height, width, channels))
        if warps := self._warps:
            at = warp.identity(height, width)
            for number, move in enumerate(warps):
                at = move(at, jax.random.fold_in(key, _FOR_WARPS + number))
            if self._crops and self.patch:
                at = jax.image.resize(at, (2, self.patch, self.patch), "linear", antialias=False)
            pixels = warp.read(pixels, at, self.border)
        if self.patch and not self.crop:
            around = (self.overhang, self.overhang)
            pixels = jnp.pad(pixels, (around, around, (0, 0)), mode="reflect")
            room = jnp.asarray([each - self.patch + 1 for each in pixels.shape[:2]])
            corner = jax.random.randint(jax.random.fold_in(key, _FOR_PATCH), (2,), 0, room)
            corner = (room - 1) // 2 if self.centre else corner
            pixels = jax.lax.dynamic_slice(
                pixels, (corner[0], corner[1], 0), (self.patch, self.patch, channels)
            )
        return pixels

    def _mask(self, mask: UInt8[Array, "h w"], key: PRNGKeyArray) -> UInt8[Array, "h2 w2"]:
        moved = self._geometry(mask[..., None], key)
        if self.randaugment:
            moved = randaugment.masks(moved, self._operations(key), self.magnitude, self.border)
        return moved[..., 0]

    def _operations(self, key: PRNGKeyArray) -> Drawn:
        return randaugment.drawn(jax.random.fold_in(key, _FOR_RANDAUGMENT), self.randaugment)

    def _image(self, image: Float[Array, "h w c"], key: PRNGKeyArray) -> Float[Array, "h2 w2 c"]:
        image = self._geometry(image, key)
        if self.randaugment:
            image = randaugment.images(image, self._operations(key), self.magnitude, self.border)
        for_colour = jax.random.split(key, 3)[2]
        bright, sharp = jax.random.uniform(for_colour, (2,), minval=-1.0, maxval=1.0)
        if self.contrast:
            mean = image.mean()
            image = mean + (image - mean) * (1 + self.contrast * sharp)
        if self.brightness:
            image = image * (1 + self.brightness * bright)
        image = jnp.clip(image, 0, 255)
        for_gamma, for_erasing = jax.random.split(jax.random.fold_in(key, _FOR_MORE_COLOUR))
        power, vivid, turn = jax.random.uniform(for_gamma, (3,), minval=-1.0, maxval=1.0)
        if self.saturation:
            image = colour.saturate(image / 255, 1 + self.saturation * vivid) * 255
        if self.hue:
            image = colour.turn_hue(image / 255, self.hue * turn) * 255
        if self.gamma:
            image = (image / 255) ** ((1 + self.gamma) ** power) * 255
        return self._erased(image, for_erasing) if self.erase else image

    def _erased(self, image: Float[Array, "h w c"], key: PRNGKeyArray) -> Float[Array, "h w c"]:
        """Apply random erasing, with noise over the full range of intensities or with zeros."""
        for_whether, for_shape, for_corner, for_noise = jax.random.split(key, 4)
        height, width, _ = image.shape
        area, tall = jax.random.uniform(
            for_shape, (2,), minval=jnp.array([0.02, -1.2]), maxval=jnp.array([1 / 3, 1.2])
        )
        sides = jnp.minimum(jnp.sqrt(area) * jnp.exp(jnp.array([tall, -tall]) / 2), 1.0)
        corner = (1 - sides) * jax.random.uniform(for_corner, (2,))
        row, column = (jnp.arange(height) + 0.5) / height, (jnp.arange(width) + 0.5) / width
        inside = ((row >= corner[0]) & (row < corner[0] + sides[0]))[:, None]
        inside &= ((column >= corner[1]) & (column < corner[1] + sides[1]))[None]
        inside &= jax.random.bernoulli(for_whether, self.erase)
        fill: Array | float = 0.0
        if self.erase_with == "noise":
            fill = jax.random.uniform(for_noise, image.shape, maxval=255.0)
        return jnp.where(inside[..., None], fill, image)


def example_keys(seed: ArrayLike, view: ArrayLike, index: ArrayLike) -> Key[Array, " b"]:
    """Return one key per example, from the seed of the run, the view or epoch, and the example's row."""
    key = jax.random.fold_in(jax.random.key(seed), view)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.asarray(index))
