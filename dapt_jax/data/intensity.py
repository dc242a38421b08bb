"""Conversion of stored values to 8-bit grey: the order of operations, and the origin of black and white.

The order, for every kind of file:

1. stored value; padding (DICOM's PixelPaddingValue), NaN and infinity are excluded from all statistics and
   become black;
2. modality transform (DICOM's modality table, or slope and intercept; NIfTI's slope and intercept);
3. range: the window that the user sets; else the file's own table or window; else the depth that the file
   declares, if it is informative; else the range of the *set* (of the volume, for NIfTI), computed once from
   all of its images;
4. 8 bits; inversion if the smallest value is white (MONOCHROME1, presentation shape INVERSE, TIFF with white
   at zero).

The set consists of the images that one source of a study selects, after `where` and `drop_classes`:
development, test and external data are each scaled by their own values, unless one `window=LOW,HIGH` is given
to all. Statistics are counts in a fixed histogram, so they depend only on the contents of the set, not on
order, threads or processes.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dapt_jax.data.plane import Window

DEPTHS = (8, 10, 12, 14, 16)
"""Bit depths of scanners and detectors, to which integers without a declared depth are assigned."""

PERCENTILES = Window(1, 99, percent=True)
"""Black and white of a volume: bright vessels and a few stray voxels must not determine the range."""

OF_A_SET = Window(0.5, 99.5, percent=True)
"""Black and white of a set of values without a declared range."""

_OUTLIERS = 1e-3
_FEW = 4
_MARKER = 0.05
_BACKGROUND = 0.05
_BLOCK = 1 << 20
_CODE_BITS = 20
_OF_THE_SET = "the set's "


@dataclass(frozen=True)
class Range:
    """The values shown as black and white, and their origin.

    Attributes:
        low: The value shown as black.
        high: The value shown as white.
        origin: Origin of the two values, such as "window of the file" or "depth of the set's 16-bit grey (12
            bits)".
        bits: Depth of integers from 0 to 2**bits - 1, which are shifted down to 8 bits; 0 for a linear ramp.
    """

    low: float
    high: float
    origin: str
    bits: int = 0

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return values of any type and shape as uint8 of that shape; non-finite values become black."""
        if self.bits >= 8 and values.dtype.kind in "ui":
            if values.dtype == np.uint8 and self.bits == 8:
                return values
            return (
                values.clip(0, min((1 << self.bits) - 1, np.iinfo(values.dtype).max)) >> (self.bits - 8)
            ).astype(np.uint8)
        shown = np.empty(values.shape, np.uint8)
        flat_in, flat_out = values.reshape(-1), shown.reshape(-1)
        # Sums and differences of the largest values overflow unless halved.
        low, span = self.low, self.high - self.low
        for start in range(0, flat_in.size, _BLOCK):
            part = flat_in[start : start + _BLOCK].astype(np.float64)
            finite = np.isfinite(part)
            part[~finite] = low
            with np.errstate(over="ignore"):
                ramp = (part - low) / span if span > 0 else (part > low).astype(np.float64)
            flat_out[start : start + _BLOCK] = np.rint(ramp.clip(0, 1) * 255) * finite
        return shown


def of_bits(bits: int, origin: str) -> Range:
    """Return the range of unsigned integers with this number of bits."""
    return Range(0.0, float((1 << bits) - 1), origin, bits)


EIGHT_BITS = of_bits(8, "8 bits")


@dataclass(frozen=True)
class Samples:
    """Values of one image with the interpretation that its file declares.

    Attributes:
        values: Values [h, w] or [h, w, 3] after the modality transform.
        known: The range, if the file or the user defines it; None if it depends on the set.
        pool: Images of a set with unknown ranges that share one range: those of one kind and one unit.
        excluded: bool [h, w], padding pixels; None if there are none.
        inverted: Whether the smallest value is white.
        depth: Whether values without a range are samples of a scanner, whose bit depth has to be found.
    """

    values: np.ndarray
    known: Range | None
    pool: str = ""
    excluded: np.ndarray | None = None
    inverted: bool = False
    depth: bool = False

    def shown(self, ranges: "dict[str, Range] | None" = None) -> tuple[np.ndarray, Range]:
        """Return the pixels as uint8 of the same shape, and the range that was used.

        Args:
            ranges: Ranges of the set by pool; without one for this image's pool, the image is a set of its
                own.
        """
        used = self.known or (ranges or {}).get(self.pool) or self.own_range("the file")
        grey = used.apply(self.values)
        if self.inverted:
            grey = 255 - grey
        bad = self.excluded
        if self.values.dtype.kind == "f" and self.inverted:
            finite = np.isfinite(self.values)
            bad = ~finite if bad is None else bad | ~finite
        return (grey if bad is None else np.where(bad, np.uint8(0), grey)), used

    def own_range(self, whose: str, window: Window = OF_A_SET) -> Range:
        """Return the range computed from these values alone."""
        counted = Statistics()
        counted.add(self.values, self.excluded)
        return counted.range(whose, self.depth, window)


def integers_or_floats(values: np.ndarray, pool: str, **more: Any) -> Samples:
    """Return the samples of an array whose file declares only its type."""
    if values.dtype.kind == "b":
        return Samples(values.view(np.uint8) * np.uint8(255), Range(0, 255, "two values", 8), **more)
    if values.dtype == np.uint8:
        return Samples(values, EIGHT_BITS, **more)
    if values.dtype.kind == "f":
        return Samples(values, None, f"{pool} floats", depth=True, **more)
    return Samples(values, None, f"{pool} integers", depth=True, **more)


@dataclass
class Statistics:
    """Histogram of values, with the same bins for all images in any order.

    A bin is given by the upper 20 bits of a float32: integers below 4,096 have one bin each, other values
    share a bin with values that differ by less than one part in 2,048. Memory is 8 MiB, however large the
    set.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(1 << _CODE_BITS, np.int64))
    integers: bool = True

    def add(self, values: np.ndarray, excluded: np.ndarray | None = None) -> None:
        """Count the values of an image, except excluded and non-finite ones."""
        self.integers &= values.dtype.kind in "uib"
        if excluded is not None:
            values = values[~excluded]
        flat = values.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            part = flat[start : start + _BLOCK]
            if part.dtype.kind == "f":
                part = part[np.isfinite(part)]
            most = float(np.finfo(np.float32).max)
            if part.dtype.kind == "f" and part.dtype.itemsize > 4:
                part = part.clip(-most, most)
            bits = (part.astype(np.float32) + np.float32(0)).view(np.uint32)
            ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
            self.counts += np.bincount(ordered >> (32 - _CODE_BITS), minlength=len(self.counts))

    def merge(self, other: "Statistics") -> None:
        """Add the counts of other statistics."""
        self.counts += other.counts
        self.integers &= other.integers

    def _values(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the values that occur, ascending, and their counts.

        Each value is the end of its bin that is closer to 0.
        """
        codes = np.flatnonzero(self.counts)
        low = (1 << (32 - _CODE_BITS)) - 1
        bits = (codes.astype(np.uint64) << (32 - _CODE_BITS)).astype(np.uint32)
        bits = np.where(bits >> 31, bits & np.uint32(0x7FFFFFFF), ~(bits | np.uint32(low)))
        return bits.view(np.float32).astype(np.float64), self.counts[codes]

    def range(self, whose: str, depth: bool, window: Window = OF_A_SET) -> Range:
        """Return the range of the values counted.

        Args:
            whose: Origin of the values, such as "the set".
            depth: Whether integers from 0 are samples with one of `DEPTHS`, and floats from 0 to 1 span
                exactly that.
            window: Percentiles for all other values. The background, a value of at least one in twenty
                pixels, is not counted.
        """
        values, counts = self._values()
        if not len(values):
            return Range(0, 0, f"no numbers in {whose}")
        if depth and self.integers and (bits := _depth(values, counts)):
            return of_bits(bits, f"depth of {whose} ({bits} bits)")
        if depth and not self.integers and _is_unit(values, counts):
            return Range(0.0, 1.0, f"floats from 0 to 1 in {whose}")
        low, high = _span(values, counts, window)
        return Range(low, high, f"{window.low:g}% to {window.high:g}% of {whose}")


def _foreground(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Return values and counts without the background, and the background; None if there is none."""
    most = int(counts.argmax())
    if len(values) < 3 or counts[most] < _BACKGROUND * counts.sum():
        return values, counts, None
    return np.delete(values, most), np.delete(counts, most), float(values[most])


def _allowed(counts: np.ndarray) -> float:
    return max(_OUTLIERS * float(counts.sum()), _FEW)


def _depth(values: np.ndarray, counts: np.ndarray) -> int:
    """Return the bit depth of samples, or 0 if they are not samples.

    Outliers are ignored: one in a thousand pixels, and a marker that is brighter than twice the depth, with
    no values in between, and smaller than a twentieth of the foreground.
    """
    if counts[values < 0].sum() > _allowed(counts):
        return 0
    values, counts, background = _foreground(values, counts)
    total, allowed = counts.sum(), _allowed(counts)
    for bits in DEPTHS:
        end = 1 << bits
        above = counts[values >= end].sum()
        between = counts[(values >= end) & (values < 2 * end)].sum()
        isolated = above <= _MARKER * total and between <= allowed
        if (above <= allowed or isolated) and above < total and (background or 0) < end:
            return bits
    return 0


def _is_unit(values: np.ndarray, counts: np.ndarray) -> bool:
    """Return whether floats span 0 to 1.

    Values that are all near 0 are something else, such as diffusion in mm2/s.
    """
    outside = counts[(values < 0) | (values > 1)].sum()
    if outside > _allowed(counts) or outside == counts.sum():
        return False
    inside = values <= 1
    return float(_span(values[inside], counts[inside], OF_A_SET)[1]) > 0.1 or values[-1] == 0


def _span(values: np.ndarray, counts: np.ndarray, window: Window) -> tuple[float, float]:
    """Return percentiles of the foreground, with a margin that separates it from the background."""
    kept, kept_counts, background = _foreground(values, counts)
    low, high = _percentiles(kept, kept_counts, window)
    return _apart(low, high, background, float(values[0]), float(values[-1]))


def _percentiles(values: np.ndarray, counts: np.ndarray, window: Window) -> tuple[float, float]:
    ends = np.cumsum(counts)
    places = np.array([window.low, window.high]) / 100 * (ends[-1] - 1)
    low, high = (float(values[index]) for index in np.searchsorted(ends, places, side="right"))
    return low, high


def foreground_levels(counts: np.ndarray) -> tuple[float, float]:
    """Return percentiles of the foreground of a decoded image, from how many pixels have each grey level [256]."""
    levels = np.flatnonzero(counts)
    kept, kept_counts, _ = _foreground(levels, counts[levels])
    return _percentiles(kept, kept_counts, PERCENTILES)


def foreground_span(values: np.ndarray, window: Window) -> tuple[float, float]:
    """Return exact percentiles of the foreground of an array in memory; see `Statistics.range`."""
    finite = values[np.isfinite(values)]
    counted = Statistics()
    counted.add(finite)
    binned, counts = counted._values()
    if not len(binned):
        return 0.0, 0.0
    _, _, background = _foreground(binned, counts)
    # A bin is as wide as one value in 2,048: other values in the background's bin are background too.
    kept = finite if background is None else finite[np.abs(finite - background) > abs(background) / 2048]
    if not len(kept):
        return float(finite.min()), float(finite.max())
    low, high = (float(value) for value in np.percentile(kept, (window.low, window.high)))
    return _apart(low, high, background, float(finite.min()), float(finite.max()))


def _apart(
    low: float, high: float, background: float | None, least: float, most: float
) -> tuple[float, float]:
    """Return percentiles of the foreground, with a margin that separates it from the background."""
    if background is not None and background < low:
        low = max(background, low - (high - low) / 16)
    if background is not None and background > high:
        high = min(background, high + (high - low) / 16)
    return (low, high) if low < high else (least, most)


def of_set(images: Iterable[Any], read: Callable[[Any], Samples | None], workers: int) -> dict[str, Range]:
    """Return the ranges of a set's pools, from every image whose range is not defined otherwise.

    The set is never in memory as a whole.

    Args:
        images: Arguments of `read`, one per image.
        read: Function that returns the samples of an image; None for one that cannot be read.
        workers: Number of threads.
    """
    pools: dict[str, Statistics] = {}
    kinds: dict[str, bool] = {}
    with ThreadPoolExecutor(workers) as pool:
        # In blocks: results that wait in a queue are images in memory.
        waiting: list[Any] = []

        def take(block: Sequence[Any]) -> None:
            for samples in pool.map(read, block):
                if samples is not None and samples.known is None:
                    pools.setdefault(samples.pool, Statistics()).add(samples.values, samples.excluded)
                    kinds[samples.pool] = samples.depth

        for image in images:
            waiting.append(image)
            if len(waiting) == workers:
                take(waiting)
                waiting = []
        take(waiting)
    return {
        name: counted.range(f"{_OF_THE_SET}{name}", kinds[name]) for name, counted in sorted(pools.items())
    }


def summary(ranges: Sequence[Range], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the origins of the ranges of a set's images, as rows for a study's records.

    Args:
        ranges: The range of each image.
        names: The name of each image.

    Returns:
        One row per origin, the most frequent first: `origin`, `images` (number of images), `low` and `high`
        (smallest and largest value shown as black, and as white), and `example`, the name of the first image.
    """
    rows: dict[str, list[int]] = {}
    for index, each in enumerate(ranges):
        rows.setdefault(each.origin, []).append(index)
    return [
        {
            "origin": origin,
            "images": len(indices),
            "low": [min(ranges[index].low for index in indices), max(ranges[index].low for index in indices)],
            "high": [
                min(ranges[index].high for index in indices),
                max(ranges[index].high for index in indices),
            ],
            "example": names[indices[0]],
        }
        for origin, indices in sorted(rows.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def disagreements(summaries: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Return a line for each kind of image that several sets contain and scale by their own statistics.

    Args:
        summaries: Rows of `summary` by the name of the set, such as "development" and "external".
    """
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, rows in summaries.items():
        for row in rows:
            kind = re.sub(r" \(\d+ bits\)$", "", row["origin"])
            if _OF_THE_SET in kind:
                found.setdefault(kind.partition(_OF_THE_SET)[2], {})[name] = (row["low"][0], row["high"][1])
    return [
        f"{kind}: "
        + "; ".join(f"{name} has black {low:g}, white {high:g}" for name, (low, high) in ranges.items())
        + (
            "; each set is scaled by its own values: where their numbers mean the same, give all of them "
            "one window='LOW,HIGH'"
        )
        for kind, ranges in found.items()
        if len(set(ranges.values())) > 1
    ]


def line(row: dict[str, Any]) -> str:
    """Return a row of `summary` as text."""

    def ends(pair: list[float]) -> str:
        return f"{pair[0]:g}" if pair[0] == pair[1] else f"{pair[0]:g} to {pair[1]:g}"

    images = f"{row['images']:,} image{'s' if row['images'] != 1 else ''}"
    return (
        f"{images}: black {ends(row['low'])}, white {ends(row['high'])}, by {row['origin']} (first: "
        f"{row['example']})"
    )
