"""Scores of predicted masks: overlap and distance of surfaces, per image and pooled over pixels."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from dapt_jax.errors import UserError
from dapt_jax.metrics.score import Score


class Segmentation:
    """Scores of masks that are added batch by batch; of an image five numbers per segment are kept, and no pixels.

    See `segmentation` for what the scores are.
    """

    def __init__(self, segments: Sequence[str], overlapping: bool = False, surfaces: bool = True):
        """Begins with no image.

        Args:
            segments: names of the values of a mask, the background, which is not scored, first.
            overlapping: whether masks are bit fields, bit k for `segments[k + 1]`.
            surfaces: whether `hd95` and `assd`, which take most of the time, are wanted.
        """
        self._names = tuple(segments[1:])
        self._overlapping = overlapping
        self._surfaces = surfaces
        self._images = [np.zeros((0, len(self._names), 5))]

    def add(
        self,
        truth: UInt8[np.ndarray, "n h w"],
        predicted: UInt8[np.ndarray, "n2 h2 w2"],
        spacing: Sequence[float] | Float[np.ndarray, "n 2"] = (1.0, 1.0),
    ) -> None:
        """Adds images.

        Args:
            truth: masks.
            predicted: masks of the same images.
            spacing: height and width of a pixel, of all images or of each: distances are in its unit.

        Raises:
            UserError: the masks differ in shape, or hold a value that has no name.
        """
        if truth.shape != predicted.shape:
            raise UserError(
                f"predicted masks are {predicted.shape}; expected the shape of the true ones, {truth.shape}"
            )
        values = 1 << len(self._names) if self._overlapping else len(self._names) + 1
        for which, masks in (("true", truth), ("predicted", predicted)):
            if (most := masks.max(initial=0)) >= values:
                raise UserError(f"a {which} mask holds the value {most}; expected 0 to {values - 1}")
        spacings = np.broadcast_to(np.asarray(spacing, float), (len(truth), 2))
        found = np.full((len(truth), len(self._names), 5), np.nan)
        for segment in range(len(self._names)):
            a, b = self._of(truth, segment), self._of(predicted, segment)
            for column, pixels in enumerate((a & b, a, b)):
                found[:, segment, column] = np.count_nonzero(pixels, axis=(1, 2))
            if self._surfaces:
                for image in np.flatnonzero(found[:, segment, 1:3].all(1)):
                    found[image, segment, 3:] = surface_distances(a[image], b[image], spacings[image])
        self._images.append(found)

    def per_image(self) -> dict[str, Float[np.ndarray, "n segments"]]:
        """`dice`, `iou`, `hd95` and `assd` of every image and foreground segment, in the order in which they were added."""
        both, truth, predicted, hd95, assd = np.moveaxis(np.concatenate(self._images), -1, 0)
        found = {"dice": _dice(both, truth, predicted), "iou": _iou(both, truth, predicted)}
        return {**found, "hd95": hd95, "assd": assd} if self._surfaces else found

    def scores(self) -> list[Score]:
        """The scores of all images so far; NaN where there is none."""
        images = self.per_image()
        both, truth, predicted = np.concatenate(self._images)[..., :3].sum(0).T
        n = len(images["dice"])
        scores: list[Score] = []
        for metric in ("dice", "iou"):
            scores += self._means(metric, images[metric])
        for metric, measure in (("dice_pooled", _dice), ("iou_pooled", _iou)):
            values = measure(both, truth, predicted) if n else np.full(len(self._names), np.nan)
            scores += self._with_macro(metric, values, np.full(len(values), n), n)
        for metric in ("hd95", "assd") if self._surfaces else ():
            scores += self._means(metric, images[metric])
        return scores

    def _means(self, metric: str, values: Float[np.ndarray, "n segments"]) -> list[Score]:
        known = np.isfinite(values)
        covered = known.sum(0)
        means = np.full(len(self._names), np.nan)
        np.divide(np.where(known, values, 0).sum(0), covered, out=means, where=covered > 0)
        return self._with_macro(metric, means, covered, int(known.any(1).sum()))

    def _with_macro(self, metric: str, values: np.ndarray, covered: np.ndarray, images: int) -> list[Score]:
        defined = np.isfinite(values)
        mean = float(values[defined].mean()) if defined.any() else float("nan")
        names = tuple(name for name, is_defined in zip(self._names, defined, strict=True) if is_defined)
        return [
            Score(metric, mean, images, names),
            *(
                Score(f"{metric}/{name}", float(value), int(n), (name,))
                for name, value, n in zip(self._names, values, covered, strict=True)
            ),
        ]

    def _of(self, masks: UInt8[np.ndarray, "n h w"], segment: int) -> Bool[np.ndarray, "n h w"]:
        return (masks >> segment & 1).astype(bool) if self._overlapping else masks == segment + 1


def segmentation(
    truth: UInt8[np.ndarray, "n h w"],
    predicted: UInt8[np.ndarray, "n2 h2 w2"],
    segments: Sequence[str],
    overlapping: bool = False,
    spacing: Sequence[float] | Float[np.ndarray, "n 2"] = (1.0, 1.0),
) -> list[Score]:
    """Scores of every foreground segment, `<metric>/<segment>`, and their mean over the segments, `<metric>`.

    Args:
        truth: masks: segment numbers, or bit fields.
        predicted: masks of the same images.
        segments: names of the values of a mask, the background, which is not scored, first.
        overlapping: whether masks are bit fields, bit k for `segments[k + 1]`.
        spacing: height and width of a pixel in mm, of all images or of each; without it distances are in pixels.

    Returns:
        `dice` and `iou`: mean over images; an image without the segment in either mask counts as 1.

        `dice_pooled` and `iou_pooled`: of the pixels of all images taken as one; 1 where no image has the segment in either.

        `hd95` and `assd`, mean over images: between the surfaces of both masks, which are the pixels that have a
        4-neighbour outside or lie at the image's border, the greater of the two directed 95th percentiles of distances
        (Hausdorff-95) and the mean over the pixels of both surfaces (average symmetric surface distance). As MONAI has
        them; medpy takes the percentile of both directions' distances together, and the mean of the two directed means.
        An image in which either mask lacks the segment has no distance and is left out: `n` is the number of
        images that are covered, and a score that covers none is NaN. Of a mean over segments, `n` is the number of
        images that count for any, and `classes` names the segments.

    Raises:
        UserError: the masks differ in shape, or hold a value that has no name.
    """
    scored = Segmentation(segments, overlapping)
    scored.add(truth, predicted, spacing)
    return scored.scores()


def surface_distances(
    first: Bool[np.ndarray, "h w"], second: Bool[np.ndarray, "h w"], spacing: Float[np.ndarray, " 2"]
) -> tuple[float, float]:
    """Hausdorff-95 and average symmetric surface distance of two regions that are not empty, in the unit of the spacing."""
    # Surfaces lie in the smallest box around both regions, so nothing outside it can be nearer.
    rows, columns = (np.flatnonzero((first | second).any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    surfaces = [region[box] & ~ndimage.binary_erosion(region[box]) for region in (first, second)]
    there, back = (
        ndimage.distance_transform_edt(~surfaces[1 - side], sampling=spacing)[surfaces[side]] for side in (0, 1)
    )
    farthest = max(np.percentile(there, 95), np.percentile(back, 95))
    return float(farthest), float(np.concatenate([there, back]).mean())


def _dice(both: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return _ratio(2 * both, truth + predicted)


def _iou(both: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return _ratio(both, truth + predicted - both)


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.ones(np.shape(over)), where=under > 0)
