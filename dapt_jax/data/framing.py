"""How a picture of any shape becomes a square, how its mask does, and the way back."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dapt_jax.errors import UserError, nearest

RESIZES = ("squash", "pad", "crop")
"""Ways to make a square: squash changes the aspect ratio; pad and crop keep it."""


@dataclass(frozen=True)
class Framing:
    """A square of `size` pixels from a picture of any shape.

    >>> Framing(96, resize="pad").inside((480, 640))
    (12, 0, 84, 96)
    >>> Framing(96, resize="crop").box((480, 640))
    (0, 80, 480, 560)

    Attributes:
        size: Side of the square in pixels.
        crop: Side in pixels of a centre crop of the picture, taken first and limited to it; None or 0 for the
            whole picture.
        resize: What happens to the aspect ratio: `squash` stretches to the square, `pad` fills the shorter
            sides with black (the background of a mask), `crop` drops what is outside the central square.
    """

    size: int
    crop: int | None = None
    resize: str = "squash"

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise UserError(f"resize is {self.resize!r}; {nearest(str(self.resize), RESIZES)}")

    def __str__(self) -> str:
        """Return it as it enters fingerprints: as before there was a choice where nothing was chosen."""
        return f"{self.size} {self.crop}" + ("" if self.resize == "squash" else f" {self.resize}")

    def box(self, extent: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the part of a picture that the square shows: top, left, bottom, right in its pixels."""
        height, width = extent
        down, across = (min(self.crop, side) if self.crop else side for side in extent)
        if self.resize == "crop":
            down = across = min(down, across)
        top, left = (height - down) // 2, (width - across) // 2
        return top, left, top + down, left + across

    def inside(self, extent: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the part of the square that holds the picture: top, left, bottom, right in its pixels."""
        top, left, bottom, right = self.box(extent)
        down, across = bottom - top, right - left
        if self.resize != "pad":
            return 0, 0, self.size, self.size
        longer = max(down, across)
        high, wide = (max(1, round(self.size * side / longer)) for side in (down, across))
        top, left = (self.size - high) // 2, (self.size - wide) // 2
        return top, left, top + high, left + wide

    def scale(self, extent: tuple[int, int]) -> tuple[float, float]:
        """Return the height and width of a pixel of the square, in pixels of the picture."""
        (top, left, bottom, right), at = self.box(extent), self.inside(extent)
        return (bottom - top) / (at[2] - at[0]), (right - left) / (at[3] - at[1])

    def is_identity(self, extent: tuple[int, int]) -> bool:
        """Return whether a picture is a square of this size already."""
        return extent == (self.size, self.size) and self.box(extent) == (0, 0, *extent)

    def cut(self, image: Image.Image, extent: tuple[int, int] | None = None) -> Image.Image:
        """Return the part of a picture that the square shows, not resized.

        Args:
            image: The picture, perhaps decoded at a fraction of its size.
            extent: Height and width of the whole picture, if it was decoded at a fraction.
        """
        own = image.height, image.width
        extent = extent or own
        top, left, bottom, right = self.box(extent)
        if own != extent:
            down, across = own[0] / extent[0], own[1] / extent[1]
            top, bottom = round(top * down), round(bottom * down)
            left, right = round(left * across), round(right * across)
        whole = (top, left, bottom, right) == (0, 0, *own)
        return image if whole else image.crop((left, top, right, bottom))

    def apply(
        self, image: Image.Image, how: Image.Resampling, extent: tuple[int, int] | None = None
    ) -> Image.Image:
        """Return the square of a picture.

        Args:
            image: The picture, perhaps decoded at a fraction of its size.
            how: Filter of the resampling.
            extent: Height and width of the whole picture, if it was decoded at a fraction; masks are framed by
                the whole, and image and mask have to agree.
        """
        own = image.height, image.width
        extent = extent or own
        if self.is_identity(own):
            return image
        image = self.cut(image, extent)
        first_row, first_column, last_row, last_column = self.inside(extent)
        shown = (last_column - first_column, last_row - first_row)
        if image.size != shown:
            image = image.resize(shown, how)
        if shown == (self.size, self.size):
            return image
        square = Image.new(image.mode, (self.size, self.size))
        square.paste(image, (first_column, first_row))
        return square

    def mask(self, classes: np.ndarray) -> np.ndarray:
        """Return the square of a mask uint8 [h, w], by the nearest pixel: no class appears that it lacks."""
        return np.asarray(self.apply(Image.fromarray(classes), Image.Resampling.NEAREST))

    def restored(self, square: np.ndarray, extent: tuple[int, int]) -> np.ndarray:
        """Return a mask of the picture from one of its square: `mask` backwards.

        The restored mask of a picture that is not smaller than its part of the square has exactly this
        square: `framing.mask(framing.restored(square, extent))` equals `square` inside `inside(extent)`.

        Args:
            square: Classes, uint8 [size, size].
            extent: Height and width of the picture.

        Returns:
            uint8 [h, w]; 0 where the square shows nothing of the picture.
        """
        top, left, bottom, right = self.box(extent)
        first_row, first_column, last_row, last_column = self.inside(extent)
        seen = Image.fromarray(square[first_row:last_row, first_column:last_column])
        whole = np.zeros(extent, np.uint8)
        whole[top:bottom, left:right] = np.asarray(
            seen.resize((right - left, bottom - top), Image.Resampling.NEAREST)
        )
        return whole

    def images(self, images: np.ndarray) -> np.ndarray:
        """Return the squares of pictures in memory, uint8 [n, size, size, 3]; `images` itself if they are.

        Args:
            images: uint8 [n, h, w, 3].
        """
        if self.is_identity((images.shape[1], images.shape[2])):
            return images
        squares: Iterable[Image.Image] = (
            self.apply(Image.fromarray(image), Image.Resampling.BILINEAR) for image in images
        )
        out = np.empty((len(images), self.size, self.size, 3), np.uint8)
        for target, square in zip(out, squares, strict=True):
            target[...] = np.asarray(square)
        return out
