"""Records of images as records of their tiles."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from dapt_jax.data import formats, masks
from dapt_jax.data.mask_values import Drawn
from dapt_jax.data.plane import plane
from dapt_jax.data.record import Record
from dapt_jax.data.tiles import Recent, Tile, Tiles
from dapt_jax.errors import UserError


def cut(records: Sequence[Record], tiles: Tiles) -> list[Record]:
    """Return a record for each tile of each picture."""
    recent: Recent[Drawn] = Recent()
    tiled = []
    for record in records:
        whole = plane(record.image)
        try:
            extent = formats.extent(whole)
        except UserError:  # reported when its one tile is read
            found = [Tile(0, 0, tiles.size, tiles.picture, tiles.margin)]
        else:
            found = list(tiles.cut(extent, record.written))
        for tile in found:
            mask = record.mask
            if mask is not None and not isinstance(mask, masks.Tiled):
                mask = masks.Tiled(mask, whole, tile, recent)
            tiled.append(replace(record, image=replace(whole, tile=tile), mask=mask))
    return tiled


def count(records: Iterable[Record]) -> int:
    """Return how many pictures some records are of, or are tiles of."""
    return len({plane(record.image).whole for record in records})


def about(records: Sequence[Record], bright: int, tiles: Tiles, origin: str) -> str:
    """Return a line on the tiles of some records, and on what no tile holds.

    Args:
        records: The tiles, dark ones as well.
        bright: Number of tiles that are bright enough.
        tiles: How they were cut.
        origin: The file or folder to name.
    """
    line = f"{origin}: {len(records):,} tiles of {count(records):,} images"
    if bright < len(records):
        line += f", {bright:,} without those darker than {tiles.min_brightness:g}"
    left = [tiles.uncovered(formats.extent(whole)) for whole in {plane(each.image).whole for each in records}]
    rows, columns = np.max(left, axis=0).tolist()
    if rows or columns:
        line += f"; no tile holds the last rows and columns of an image, up to {rows} and {columns} of them"
    return line
