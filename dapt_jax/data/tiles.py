"""Large images cut into overlapping squares, each of which is an example of its own."""

import itertools
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from dapt_jax.errors import UserError

PICTURE_BYTES = 1 << 30
"""Most bytes of resized pictures that the tiles of one set are cut from, and of masks, held at once."""


@dataclass(frozen=True)
class Tile:
    """One square of a picture.

    Attributes:
        top: First row, in pixels of the resized picture.
        left: First column, in pixels of the resized picture.
        size: Side in pixels of the resized picture.
        picture: Height and width that the picture is resized to after its margin is cut off; None for its own.
        margin: Rows cut off at the top and at the bottom, and columns at the left and at the right, in pixels
            of the file.
    """

    top: int
    left: int
    size: int
    picture: tuple[int, int] | None = None
    margin: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return f"@{self.top},{self.left}"

    def inside(self, extent: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of what the margin leaves of a picture, in pixels of its file."""
        return extent[0] - 2 * self.margin[0], extent[1] - 2 * self.margin[1]

    def scale(self, extent: tuple[int, int]) -> tuple[float, float]:
        """Return the height and width of a pixel of the tile, in pixels of the file.

        >>> Tile(0, 0, 448, (1120, 2240), (0, 96)).scale((2848, 4288))
        (2.5428571428571427, 1.8285714285714285)
        """
        inside = self.inside(extent)
        height, width = self.picture or inside
        return inside[0] / height, inside[1] / width

    def resized(self, image: Image.Image, how: Image.Resampling) -> np.ndarray:
        """Return the resized picture that tiles are cut from, [h, w] or [h, w, 3].

        Args:
            image: The whole picture.
            how: Filter of the resampling.
        """
        rows, columns = self.margin
        if rows or columns:
            image = image.crop((columns, rows, image.width - columns, image.height - rows))
        if self.picture and (image.height, image.width) != self.picture:
            image = image.resize(self.picture[::-1], how)
        return np.asarray(image)

    def of(self, picture: np.ndarray) -> np.ndarray:
        """Return the tile of a resized picture: a view of it."""
        return picture[self.top : self.top + self.size, self.left : self.left + self.size]


@dataclass(frozen=True)
class Tiles:
    """How the pictures of a set are cut: row by row, at every `stride`, as far as whole tiles fit.

    >>> idrid = Tiles(448, 112, (1120, 2240), (0, 96))
    >>> len(list(idrid.cut((2848, 4288), "IDRiD_01.jpg")))
    119

    Attributes:
        size: Side of a tile in pixels of the resized picture.
        stride: Distance from a tile to the next, down and across.
        picture: See `Tile`.
        margin: See `Tile`.
        min_brightness: Smallest mean of a tile, where black is 0 and white is 1; darker tiles are left out.
    """

    size: int
    stride: int
    picture: tuple[int, int] | None = None
    margin: tuple[int, int] = (0, 0)
    min_brightness: float = 0.0

    @classmethod
    def parse(
        cls,
        tile_size: int = 0,
        tile_stride: int = 0,
        tile_picture: str = "",
        tile_margin: str = "",
        tile_min_brightness: float = 0.0,
    ) -> "Tiles | None":
        """Return the tiles that the settings of a set describe; None if it has no `tile_size`.

        Args:
            tile_size: Side of a tile in pixels; 0 reads whole images.
            tile_stride: Distance from a tile to the next; 0 for the side of a tile.
            tile_picture: HEIGHTxWIDTH that images are resized to before they are cut; "" for their own.
            tile_margin: ROWSxCOLUMNS that are cut off on either side before that, in pixels of the file.
            tile_min_brightness: Smallest mean of a tile, from 0 (black) to 1 (white).

        Raises:
            UserError: A value has another form, or there is no `tile_size`.
        """
        others = {
            "tile_stride": tile_stride,
            "tile_picture": tile_picture,
            "tile_margin": tile_margin,
            "tile_min_brightness": tile_min_brightness,
        }
        if not tile_size:
            if given := next((key for key, value in others.items() if value), None):
                raise UserError(f"{given} is {others[given]!r} without tile_size; expected tile_size=448 too")
            return None
        if not 0 <= tile_min_brightness < 1:
            raise UserError(
                f"tile_min_brightness is {tile_min_brightness}; expected 0 (black) to below 1 (white)"
            )
        picture = _pair("tile_picture", tile_picture)
        if picture and min(picture) < tile_size:
            raise UserError(
                f"tile_picture is {tile_picture!r}; expected sides of at least tile_size, {tile_size}"
            )
        margin = _pair("tile_margin", tile_margin) or (0, 0)
        return cls(tile_size, tile_stride or tile_size, picture, margin, tile_min_brightness)

    def cut(self, extent: tuple[int, int], name: str) -> Iterator[Tile]:
        """Yield the tiles of a picture, row by row.

        Args:
            extent: Height and width of the picture as stored in its file.
            name: Name of the picture, for errors.

        Raises:
            UserError: The picture, without its margin, is smaller than one tile.
        """
        inside = Tile(0, 0, self.size, self.picture, self.margin).inside(extent)
        height, width = self.picture or inside
        if min(inside) < 1 or min(height, width) < self.size:
            raise UserError(
                f"{name}: {extent[1]} x {extent[0]} pixels, too few for a tile of {self.size} inside a margin of "
                f"{self.margin[0]}x{self.margin[1]}; expected a smaller tile_size or tile_margin, or tile_picture"
            )
        starts = (range(0, side - self.size + 1, self.stride) for side in (height, width))
        for top, left in itertools.product(*starts):
            yield Tile(top, left, self.size, self.picture, self.margin)

    def uncovered(self, extent: tuple[int, int]) -> tuple[int, int]:
        """Return the rows at the bottom and the columns at the right that no tile holds, in its pixels.

        >>> Tiles(448, 448, (1120, 2240)).uncovered((2848, 4288))
        (224, 0)
        """
        height, width = self.picture or Tile(0, 0, self.size, None, self.margin).inside(extent)
        step = max(self.stride, 1)
        return (height - self.size) % step, (width - self.size) % step


def _pair(key: str, text: str) -> tuple[int, int] | None:
    if not text:
        return None
    found = re.fullmatch(r"\s*(\d{1,6})\s*x\s*(\d{1,6})\s*", text)
    if not found:
        raise UserError(f"{key} is {text!r}; expected height x width in pixels, such as '1120x2240'")
    return int(found[1]), int(found[2])


Made = TypeVar("Made")


class Recent(Generic[Made]):
    """Arrays made most recently, up to a number of bytes; threads that need one at once make it once."""

    def __init__(self, most_bytes: int = PICTURE_BYTES):
        """Hold nothing yet."""
        self._most = most_bytes
        self._held: OrderedDict[object, tuple[Made, int]] = OrderedDict()
        self._making: dict[object, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Number of bytes held."""
        return sum(size for _, size in self._held.values())

    def get(self, key: object, make: Callable[[], tuple[Made, int]]) -> Made:
        """Return what `make` returns first, which also says how many bytes it holds.

        Args:
            key: Key of the result.
            make: Function that makes it, unless it is held.
        """
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._held:
                    self._held.move_to_end(key)
                    return self._held[key][0]
            made, size = make()
            with self._lock:
                self._held[key] = made, size
                while self.nbytes > self._most and len(self._held) > 1:
                    self._held.popitem(last=False)
            return made
