"""Interpretation of the values of mask files, decided for a whole set.

Classes are stored in grey, palette or alpha values; 255 may stand for one class.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dapt_jax.data import formats, pixels
from dapt_jax.data.plane import Plane
from dapt_jax.errors import UserError

_ROUNDING = 1e-3
_NAMED = 6
Colour = tuple[int, ...]
_BLACK = (0, 0, 0)


@dataclass(frozen=True)
class Drawn:
    """Values of one mask file.

    Attributes:
        grey: Values, uint8 [h, w].
        alpha: The alpha channel, uint8 [h, w]; None for a file without one.
        palette: Colours that the values are indices of, uint8 [k, 3]; None for a file without a palette.
    """

    grey: np.ndarray
    alpha: np.ndarray | None = None
    palette: np.ndarray | None = None

    def facts(self) -> "Facts":
        """Return the facts that determine the convention of a set."""
        grey = frozenset(np.unique(self.grey).tolist())
        if self.palette is not None:
            colours = dict(enumerate(map(tuple, self.palette.tolist())))
            return Facts(grey, colours={value: colours[value] for value in sorted(grey) if value in colours})
        if self.alpha is None:
            return Facts(grey)
        clear = self.alpha == 0
        agree = not self.grey[clear].any() and pixels.is_black_and_white(self.alpha)
        return Facts(grey, frozenset(np.unique(self.alpha).tolist()), agree)


@dataclass(frozen=True)
class Facts:
    """The values that occur in a mask file.

    Attributes:
        grey: Values of the grey channel.
        alpha: Values of the alpha channel; None for a file without one.
        agree: Whether transparent pixels are also 0, so that alpha adds no information.
        colours: Colour of each value that occurs, red, green and blue, in a file with a palette.
    """

    grey: frozenset[int]
    alpha: frozenset[int] | None = None
    agree: bool = True
    colours: Mapping[int, Colour] = field(default_factory=dict)


@dataclass(frozen=True)
class Convention:
    """Interpretation of the masks of a set.

    Attributes:
        in_alpha: Whether the classes are in the alpha channel.
        halved: Whether 255 stands for class 1, as most annotation tools store two classes.
    """

    in_alpha: bool = False
    halved: bool = False

    def apply(self, drawn: Drawn) -> np.ndarray:
        """Return classes, uint8 [h, w]."""
        values = drawn.grey
        if self.in_alpha:
            assert drawn.alpha is not None
            values = drawn.alpha
        elif drawn.alpha is not None:
            values = np.where(drawn.alpha > 0, values, np.uint8(0))
        return values // 255 if self.halved else values

    def values(self, facts: Facts) -> frozenset[int]:
        """Return the classes of a mask with these facts."""
        found = facts.alpha if self.in_alpha and facts.alpha is not None else facts.grey
        return frozenset(value // 255 for value in found) if self.halved else found


def convention(named: Iterable[tuple[str, Facts]]) -> Convention:
    """Return the interpretation of a set's masks, from all of them: one file may not be conclusive.

    Args:
        named: Names and facts of the files.

    Raises:
        UserError: Some masks have their classes in the alpha channel and some in grey, or palettes of several
            masks differ in the colour of a value.
    """
    files = list(named)
    _check_palettes(files)
    in_alpha = next((name for name, facts in files if _only_alpha(facts)), None)
    union: set[int] = set()
    for name, facts in files:
        if in_alpha is not None and (facts.alpha is None or (len(facts.grey) > 1 and not _only_alpha(facts))):
            raise UserError(
                f"{name}: its mask is in its grey values, that of {in_alpha} in its alpha channel; "
                "expected one way for all"
            )
        if in_alpha is None and facts.alpha is not None and len(facts.alpha) > 1 and not facts.agree:
            raise UserError(
                f"{name}: both its grey values and its alpha channel hold something; expected a mask of "
                "one channel"
            )
        union |= (facts.alpha or frozenset()) if in_alpha is not None else facts.grey
    return Convention(in_alpha is not None, halved=255 in union and union <= {0, 255})


def _check_palettes(files: Sequence[tuple[str, Facts]]) -> None:
    """Refuse palettes that give one value several colours, or one colour several values.

    Programs that reduce a picture to the colours in it number them anew in every file: the second class is value 1
    in a mask that lacks the first, and black may be any value.

    Raises:
        UserError: Two masks differ, or black, the background, is another value than 0.
    """
    colours: dict[int, tuple[Colour, str]] = {}
    values: dict[Colour, tuple[int, str]] = {_BLACK: (0, "the background")}
    for name, facts in files:
        if len(set(facts.colours.values())) < len(facts.colours):
            continue  # a palette that was not filled in tells nothing
        for value, colour in facts.colours.items():
            first, there = colours.setdefault(value, (colour, name))
            other, elsewhere = values.setdefault(colour, (value, name))
            if (first, other) != (colour, value):
                as_elsewhere = f"{first} in {there}" if first != colour else f"value {other} in {elsewhere}"
                raise UserError(
                    f"{name}: value {value} of its palette is the colour {colour}, but {as_elsewhere}; expected one colour "
                    "for each value in all masks, with black for 0, or grey masks of class numbers"
                )


def _only_alpha(facts: Facts) -> bool:
    return facts.alpha is not None and len(facts.alpha) > 1 and len(facts.grey) == 1


def between(values: Iterable[int], expected: int) -> str:
    """Return, for an error message, the values that no class has.

    The result is "" for one or two values, which indicate a mistake in the names.
    """
    strange = sorted(value for value in values if value >= expected)
    if strange == [255]:
        return (
            "; 255 beside other classes mostly marks pixels to ignore, which are not supported: give them "
            "a class"
        )
    if len(strange) <= 2:
        return ""
    return (
        f"; between its classes it holds {listed(strange)}, as after JPEG or interpolation: save it "
        "losslessly, as PNG"
    )


def listed(values: list[int] | list[float]) -> str:
    """Return the first few of some values and their number."""
    more = f" and {len(values) - _NAMED} more" if len(values) > _NAMED else ""
    return ", ".join(f"{value:g}" for value in values[:_NAMED]) + more


def read(source: Plane) -> Drawn:
    """Read the values of a mask file without interpretation.

    Raises:
        UserError: The file is unreadable or in colour, has values that are not whole numbers from 0 to 255,
            or is a JPEG or lossy WebP file with values other than black and white.
    """
    alpha = palette = None
    if formats.module(source.path) is pixels:
        stored = pixels.stored(source)
        values, alpha, palette = stored.values, stored.alpha, stored.palette
        check_lossless(source, values, stored.lossy)
    else:
        values = formats.values(source)
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise UserError(f"{source}: a colour image, expected a mask of class indices (one channel)")
        values = values[..., 0]
    return Drawn(_classes(source, values), alpha, palette)


def check_lossless(source: Plane, values: np.ndarray, lossy: bool) -> None:
    """Refuse the 8-bit values of a lossy file unless they are all black and white."""
    if lossy and not pixels.is_black_and_white(values):
        strange = np.setdiff1d(values, (0, 255)).tolist()
        raise UserError(
            f"{source}: a JPEG or lossy WebP file with {listed(strange)} between black and white, since its format "
            "changes values; expected a mask that is saved losslessly, as PNG"
        )


def _classes(source: Plane, values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "b":
        return values.astype(np.uint8)
    finite = np.isfinite(values)
    whole = np.rint(np.where(finite, values, -1)) if values.dtype.kind == "f" else values
    near = np.abs(values - whole) <= _ROUNDING if values.dtype.kind == "f" else np.ones(values.shape, bool)
    if not (finite.all() and near.all() and whole.min(initial=0) >= 0 and whole.max(initial=0) <= 255):
        strange = np.unique(values[finite & ~near]).tolist()
        range_ = f"mask values {values.min()} to {values.max()}, expected classes from 0 to 255"
        why = (
            f"; between classes it holds {listed(strange)}, as after interpolation: resample it to the "
            "nearest"
        )
        raise UserError(f"{source}: {range_}{why if strange else ''}")
    return whole.astype(np.uint8)
