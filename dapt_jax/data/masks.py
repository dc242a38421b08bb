"""Masks: a file, a slice of a volume, several overlaid files, or run lengths in a table."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dapt_jax.data import dicom, formats, mask_values, nifti, pixels
from dapt_jax.data.geometry import turn_onto
from dapt_jax.data.mask_values import Drawn
from dapt_jax.data.plane import Plane, Source, file_of, plane
from dapt_jax.data.tiles import Recent, Tile
from dapt_jax.errors import UserError


@dataclass(frozen=True)
class Parts:
    """Files that each mark one segment.

    Attributes:
        parts: File or plane, and the value that marked pixels get; values of several parts are combined by
            bitwise OR, so left and right lung may both be 1, and overlapping lesions 1, 2, 4, ...
        like: The image; a mask without parts is empty and has its size.
        above: A pixel is marked if its value (of a colour file, its brightest channel) is greater than this. With 0,
            a JPEG is refused unless it is black and white, since its compression changes values around the mask.
    """

    parts: tuple[tuple[Source, int], ...]
    like: Source
    above: float = 0

    def __str__(self) -> str:
        return " and ".join(str(part) for part, _ in self.parts) or f"no mask of {self.like}"


@dataclass(frozen=True)
class Rle:
    """Run lengths in the format of SIIM-ACR.

    Pairs "gap length" run down the columns; each gap is counted from the end of the previous run.

    Attributes:
        runs: Texts, one per finding; "-1" and "" mark nothing.
        like: The image, which defines the size of the mask.
        place: Location of the runs, for errors.
    """

    runs: tuple[str, ...]
    like: Source
    place: str

    def __str__(self) -> str:
        return f"run lengths in {self.place}"


@dataclass(frozen=True)
class Placed:
    """A mask and its image, of which patient coordinates or EXIF orientations say how one lies on the other.

    Attributes:
        mask: The mask.
        on: The image.
        orientation: Orientation of a mask without coordinates or EXIF orientation on an image that has them: "shown"
            as the image is displayed, "stored" as the array of the NIfTI file (its first axis down, its second
            across) or the pixels of the image's file; "" refuses.
    """

    mask: Path | Plane
    on: Source
    orientation: str = ""

    def __str__(self) -> str:
        return str(self.mask)


@dataclass(frozen=True, eq=False)
class Tiled:
    """The tile of a mask.

    Attributes:
        mask: The whole mask.
        on: The whole image.
        tile: Square of both.
        recent: Whole masks, resized as their images are, shared by the tiles of a set.
    """

    mask: "Path | Plane | Parts | Rle | Placed"
    on: Source
    tile: Tile
    recent: Recent[Drawn]

    def __str__(self) -> str:
        return f"{self.mask}{self.tile}"


ORIENTATIONS = ("", "shown", "stored")
Mask = Path | Plane | Parts | Rle | Placed | Tiled


def place(mask: Mask | None, image: Source, orientation: str = "") -> Mask | None:
    """Return a mask that is aligned with its image if a file may say how they lie; others are unchanged."""
    if not isinstance(mask, Path | Plane):
        return mask
    kinds = [formats.module(file_of(source)) for source in (mask, image)]
    says = nifti in kinds or kinds == [dicom, dicom] or kinds[1] is pixels
    return Placed(mask, image, orientation) if says else mask


def files(mask: Mask) -> Iterator[Path]:
    """Yield the files of a mask, all of which must exist."""
    if isinstance(mask, Tiled):
        yield from files(mask.mask)
    elif isinstance(mask, Parts):
        yield from (file_of(part) for part, _ in mask.parts)
    elif isinstance(mask, Placed):
        yield file_of(mask.mask)
    elif not isinstance(mask, Rle):
        yield file_of(mask)


def draw(mask: Mask) -> Drawn:
    """Return the values of a mask without interpretation.

    The whole set determines their meaning (`dapt_jax.data.mask_values.convention`).

    Raises:
        UserError: A file is unreadable, its values are not classes from 0 to 255, parts differ in size, run
            lengths exceed the image, or a mask is not aligned with its image; names the path.
    """
    if isinstance(mask, Tiled):
        whole = mask.recent.get((str(mask.mask), str(mask.on)), lambda: _resized(mask))
        alpha = None if whole.alpha is None else mask.tile.of(whole.alpha)
        return replace(whole, grey=mask.tile.of(whole.grey), alpha=alpha)
    if isinstance(mask, Rle):
        return Drawn(_unrolled(mask))
    if isinstance(mask, Parts):
        return Drawn(_joined(mask))
    drawn = mask_values.read(plane(mask.mask if isinstance(mask, Placed) else mask))
    if not isinstance(mask, Placed):
        return drawn
    alpha = None if drawn.alpha is None else _onto(drawn.alpha, mask)
    return replace(drawn, grey=_onto(drawn.grey, mask), alpha=alpha)


def read(mask: Mask) -> np.ndarray:
    """Return a single mask as classes.

    A mask that contains only 0 and 255 is read as 0 and 1, since most annotation tools store two classes so.

    Returns:
        uint8 [h, w].

    Raises:
        UserError: See `draw`.
    """
    drawn = draw(mask)
    return mask_values.convention([(str(mask), drawn.facts())]).apply(drawn)


def extent(mask: Mask) -> tuple[int, int]:
    """Return the height and width of a mask aligned with its image, from headers if possible."""
    if isinstance(mask, Tiled):
        return mask.tile.size, mask.tile.size
    if isinstance(mask, Rle) or (isinstance(mask, Parts) and not mask.parts):
        return formats.extent(mask.like)
    if isinstance(mask, Parts):
        return formats.extent(mask.parts[0][0])
    if not isinstance(mask, Placed):
        return formats.extent(mask)
    shape = formats.extent(mask.mask)
    turned = _onto(np.broadcast_to(np.uint8(0), shape), mask)
    return turned.shape[0], turned.shape[1]


def _resized(mask: Tiled) -> tuple[Drawn, int]:
    """Return a whole mask as its tiles are cut from it, by the nearest pixel, and its bytes.

    Raises:
        UserError: It differs in size from its image.
    """
    drawn = draw(mask.mask)
    image = formats.extent(mask.on)
    if drawn.grey.shape != image:
        raise UserError(f"{mask.mask}: {of_other_size(drawn.grey.shape, image)}")
    layers = [
        None if layer is None else mask.tile.resized(Image.fromarray(layer), Image.Resampling.NEAREST)
        for layer in (drawn.grey, drawn.alpha)
    ]
    assert layers[0] is not None
    resized = replace(drawn, grey=layers[0], alpha=layers[1])
    return resized, sum(layer.nbytes for layer in layers if layer is not None)


def of_other_size(mask: tuple[int, ...], image: tuple[int, int]) -> str:
    """Return the error for a mask that is not as large as its image, from the height and width of both."""
    sizes = f"{mask[1]} x {mask[0]} pixels, its image {image[1]} x {image[0]}"
    return f"{sizes}; expected a mask as large as its image"


def _onto(values: np.ndarray, mask: Placed) -> np.ndarray:
    """Align the values of a mask with its image.

    Raises:
        UserError: The two are at different positions in the patient, or one position is unknown; names both.
    """
    drawn, image = plane(mask.mask), plane(mask.on)
    kinds = [formats.module(source.path) for source in (drawn, image)]
    if kinds[1] is pixels and kinds[0] is not nifti:
        return _onto_upright(values, drawn, image, mask.orientation)
    where = [formats.geometry(source) for source in (drawn, image)]
    shape = formats.extent(image)
    if sorted(values.shape[:2]) != sorted(shape):
        return values  # sizes differ, which is reported where the row is known
    if where[0] and where[1]:
        turn = turn_onto(where[0], (values.shape[0], values.shape[1]), where[1], shape)
        if turn is None:
            raise UserError(_apart(drawn, image))
        return turn.apply(values)
    if where == [None, None] and kinds[0] is kinds[1]:
        return values  # two arrays of one kind without coordinates: only their indices can be compared
    if mask.orientation == "shown":
        return values
    if mask.orientation == "stored":
        return nifti.as_shown(image, values) if kinds[1] is nifti else nifti.as_stored(drawn, values)
    without = " and ".join(
        str(source) for source, found in zip((drawn, image), where, strict=True) if not found
    )
    raise UserError(
        f"{drawn}: how it lies on {image} is not known ({without} has no coordinates); expected files with "
        "coordinates, or mask_orientation='shown' (as this library shows the image) or 'stored' (as the "
        "NIfTI file's array lies)"
    )


def _onto_upright(values: np.ndarray, drawn: Plane, image: Plane, orientation: str) -> np.ndarray:
    """Align the values of a mask with an image that is turned as its EXIF orientation says.

    Raises:
        UserError: The image is turned, and whether the mask has to be is not known; names both.
    """
    turned = pixels.orientation(image) or 1
    if turned == 1 or (formats.module(drawn.path) is pixels and pixels.orientation(drawn)):
        return values  # each was turned as its own file says
    shape = formats.extent(image)
    if sorted(values.shape[:2]) != sorted(shape):
        return values  # sizes differ, which is reported where the row is known
    if orientation == "stored":
        return pixels.upright(values, turned)
    fits_as_shown_alone = turned >= 5 and values.shape[:2] == shape != shape[::-1]
    if orientation == "shown" or fits_as_shown_alone:
        return values
    raise UserError(
        f"{drawn}: how it lies on {image} is not known (the image has the EXIF orientation {turned}, the mask has "
        "none); expected files of one orientation, or mask_orientation='shown' (as the image is shown, turned) or "
        "'stored' (as the pixels of its file lie)"
    )


def _apart(drawn: Plane, image: Plane) -> str:
    """Return the error for a mask at another position than its image.

    It contains both affines, and the slice that matches the image, if there is one.
    """
    said = []
    for source in (drawn, image):
        if formats.module(source.path) is nifti:
            said.append(f"affine {nifti.affine_of(source.path)}")
        else:
            said.append(str(formats.geometry(source)))
    hint = "if it was drawn on the image's own voxels, give it the image's affine"
    on = formats.geometry(image)
    if formats.module(drawn.path) is nifti and on is not None:
        for index in range(nifti.length(drawn.path, drawn.axis)):
            other = replace(drawn, index=index)
            there = formats.geometry(other)
            if there and turn_onto(there, formats.extent(other), on, formats.extent(image)):
                hint = f"the slice that lies there is {other}"
                break
    return f"{drawn}: lies elsewhere in the patient than {image} ({said[0]}; {said[1]}); {hint}"


def _joined(mask: Parts) -> np.ndarray:
    if not mask.parts:
        return np.zeros(formats.extent(mask.like), np.uint8)
    joined: np.ndarray | None = None
    for part, value in mask.parts:
        marked = _marked(plane(part), mask.above)
        placed = place(plane(part), mask.like)
        if isinstance(placed, Placed):
            marked = _onto(marked, placed)
        if joined is None:
            joined = np.zeros(marked.shape, np.uint8)
        if marked.shape != joined.shape:
            raise UserError(
                f"{part}: {_size(marked)}, but {mask.parts[0][0]} is {_size(joined)}; expected parts of "
                "one size"
            )
        joined |= np.where(marked, np.uint8(value), np.uint8(0))
    assert joined is not None
    return joined


def _marked(part: Plane, above: float) -> np.ndarray:
    """Return which pixels a file marks, bool [h, w].

    Raises:
        UserError: It is a JPEG or lossy WebP file with values between black and white, of which no threshold says
            which are marked.
    """
    if formats.module(part.path) is pixels:
        with pixels.opened(part) as image:
            upright = ImageOps.exif_transpose(image)
            values = np.asarray(upright.convert("RGB") if upright.mode[0] in "PRC" else upright)
            if upright.mode == "LA":
                values = values[..., 0]
            if not above:
                mask_values.check_lossless(part, values, pixels.is_lossy(image, part.path))
    else:
        values = formats.values(part)
    return (values[..., :3].max(axis=-1) if values.ndim == 3 else values) > above


def _unrolled(mask: Rle) -> np.ndarray:
    height, width = formats.extent(mask.like)
    flat = np.zeros(width * height, np.uint8)
    for run in mask.runs:
        if run.strip() in ("", "-1"):
            continue
        try:
            numbers = [int(number) for number in run.split()]
        except ValueError as error:
            raise UserError(
                f"{mask.place}: run lengths {run[:30]!r}; expected whole numbers, or -1 for none"
            ) from error
        if len(numbers) % 2 or min(numbers) < 0:
            raise UserError(
                f"{mask.place}: {len(numbers)} run lengths; expected pairs of a gap and a length, none "
                "negative"
            )
        position = 0
        for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
            position += gap
            flat[position : position + length] = 1
            position += length
        if position > flat.size:
            raise UserError(f"{mask.place}: run lengths end at pixel {position}, the image has {flat.size}")
    return flat.reshape(width, height).T


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]} pixels"
