"""Metrics of predicted masks: overlap and surface distance, per image and pooled over pixels."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from dapt_jax.errors import UserError
from dapt_jax.metrics import pixels
from dapt_jax.metrics.registry import MASKS, METRICS, SURFACES, measures, metric, names_of
from dapt_jax.metrics.score import Score


class Segmentation:
    """Streaming scores of masks: a few numbers per image and class are stored, and no pixels.

    See `segmentation` for the definition of the scores.
    """

    def __init__(
        self,
        segments: Sequence[str],
        overlapping: bool = False,
        surfaces: bool = True,
        names: Sequence[str] = (),
    ):
        """Start without images.

        Args:
            segments: Names of the classes of a mask, the unscored background first.
            overlapping: Whether masks are bit fields, bit k for `segments[k + 1]`.
            surfaces: Whether to compute distances of surfaces, which take most of the time.
            names: Metrics to compute; empty for the default ones.
        """
        chosen = names or names_of(MASKS, SURFACES, default=True)
        self._names = tuple(segments[1:])
        self._overlapping = overlapping
        self._surfaces = surfaces and any(METRICS[name].is_distance for name in chosen)
        self._chosen = tuple(chosen)
        self._images = [np.zeros((0, len(self._names), 6))]
        self._pixels: list[np.ndarray] = [np.zeros(0)]
        self._ranks = np.zeros((len(self._names), 2, pixels.BINS), np.int64)
        self._is_ranked = False

    def add(
        self,
        truth: UInt8[np.ndarray, "n h w"],
        predicted: UInt8[np.ndarray, "n2 h2 w2"],
        spacing: Sequence[float] | Float[np.ndarray, "n 2"] = (1.0, 1.0),
        probabilities: Float[np.ndarray, "n h w segments"] | None = None,
        inside: Int[np.ndarray, "n 4"] | None = None,
    ) -> None:
        """Add images.

        Args:
            truth: True masks.
            predicted: Predicted masks of the same images.
            spacing: Height and width of a pixel, shared or per image; distances have its unit.
            probabilities: Probability of each class without the background, for `auc_pooled` and `ap_pooled`.
            inside: Top, left, bottom and right of the picture within each image; what is around it is padding,
                and no pixel of it counts. None where images have none.

        Raises:
            UserError: The masks differ in shape, or hold a value outside the classes; the probabilities do not fit
                the masks, or are not finite.
        """
        if truth.shape != predicted.shape:
            raise UserError(
                f"predicted masks are {predicted.shape}; expected the shape of the true ones, {truth.shape}"
            )
        values = 1 << len(self._names) if self._overlapping else len(self._names) + 1
        for which, masks in (("true", truth), ("predicted", predicted)):
            if (most := masks.max(initial=0)) >= values:
                raise UserError(f"a {which} mask holds the value {most}; expected 0 to {values - 1}")
        if probabilities is not None:
            expected = (*truth.shape, len(self._names))
            if probabilities.shape != expected:
                raise UserError(
                    f"probabilities are {probabilities.shape}; expected {expected}, one for each class without the "
                    "background"
                )
            if not np.isfinite(probabilities).all():
                raise UserError("probabilities of masks are not finite; expected numbers from 0 to 1")
        spacings = np.broadcast_to(np.asarray(spacing, float), (len(truth), 2))
        counting = np.ones(truth.shape, bool)
        if inside is not None:
            counting[:] = False
            for image, (top, left, bottom, right) in zip(counting, inside, strict=True):
                image[top:bottom, left:right] = True
        found = np.full((len(truth), len(self._names), 6), np.nan)
        for segment in range(len(self._names)):
            a, b = (self._of(masks, segment) & counting for masks in (truth, predicted))
            for column, region in enumerate((a & b, a, b)):
                found[:, segment, column] = np.count_nonzero(region, axis=(1, 2))
            if probabilities is not None:
                self._ranks[segment] += pixels.counted(a[counting], probabilities[counting, segment])
            if self._surfaces:
                for image in np.flatnonzero(found[:, segment, 1:3].all(1)):
                    found[image, segment, 3:] = surface_distances(a[image], b[image], spacings[image])
        self._is_ranked |= probabilities is not None
        self._images.append(found)
        self._pixels.append(np.count_nonzero(counting, axis=(1, 2)))

    def per_image(self) -> dict[str, Float[np.ndarray, "n segments"]]:
        """Return `dice` and `iou`, and distances, of every image and class, in order of addition."""
        both, truth, predicted, hd95, assd, joint = np.moveaxis(np.concatenate(self._images), -1, 0)
        found = {"dice": _dice(both, truth, predicted), "iou": _iou(both, truth, predicted)}
        if not self._surfaces:
            return found
        return {**found, "hd95": hd95, "assd": assd} | (
            {"hd95_joint": joint} if "hd95_joint" in self._chosen else {}
        )

    def of_units(self, units: Shaped[np.ndarray, " n"]) -> "Segmentation":
        """Return the scores of volumes or patients, whose pixels are counted together; without surfaces.

        >>> slices = Segmentation(("background", "lesion"))
        >>> truth, predicted = np.array([[[1, 1]], [[1, 0]]], np.uint8), np.array([[[1, 1]], [[0, 1]]], np.uint8)
        >>> slices.add(truth, predicted)
        >>> volumes = slices.of_units(np.array(["v", "v"]))
        >>> round(volumes.scores()[0].value, 3)
        0.667

        Args:
            units: The unit of each image, in order of addition.
        """
        counts = np.concatenate(self._images)
        names, member = np.unique(units, return_inverse=True)
        found = Segmentation(("", *self._names), self._overlapping, surfaces=False, names=self._chosen)
        summed = np.full((len(names), len(self._names), 6), np.nan)
        summed[..., :3] = 0
        np.add.at(summed[..., :3], member, counts[..., :3])
        found._images.append(summed)
        found._pixels.append(np.bincount(member, np.concatenate(self._pixels), len(names)))
        found._ranks, found._is_ranked = self._ranks, self._is_ranked
        return found

    def scores(self) -> list[Score]:
        """Return the chosen mask metrics over all images so far; NaN where undefined."""
        kinds = (MASKS, SURFACES) if self._surfaces else (MASKS,)
        return [score for function in measures(*kinds, names=self._chosen) for score in function(self)]

    def means(self, metric: str) -> list[Score]:
        """Return the mean scores of a per-image metric over the images where it is defined."""
        values = self.per_image()[metric]
        known = np.isfinite(values)
        covered = known.sum(0)
        means = np.full(len(self._names), np.nan)
        np.divide(np.where(known, values, 0).sum(0), covered, out=means, where=covered > 0)
        return self._with_macro(metric, means, covered, int(known.any(1).sum()))

    def pooled(self, metric: str, function: Callable[..., np.ndarray]) -> list[Score]:
        """Return the scores pooled over the pixels of all images.

        Args:
            metric: Name of the metric.
            function: Function from the pixel counts of intersection, truth, prediction and whole images, each
                per class, to values.
        """
        counts = np.concatenate(self._images)[..., :3]
        n = len(counts)
        whole = np.full(len(self._names), np.concatenate(self._pixels).sum())
        values = function(*counts.sum(0).T, whole) if n else np.full(len(self._names), np.nan)
        return self._with_macro(metric, values, np.full(len(values), n), n)

    def ranked(self, metric: str, function: Callable[[np.ndarray], float]) -> list[Score]:
        """Return scores of the probabilities of all pixels; NaN where none were added.

        Args:
            metric: Name of the metric.
            function: Function from counts of pixels by truth and probability (`pixels.counted`) to a value.
        """
        n = len(np.concatenate(self._pixels)) if self._is_ranked else 0
        values = np.array([function(counts) if n else np.nan for counts in self._ranks])
        return self._with_macro(metric, values, np.full(len(values), n), n)

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


@metric("dice", title="Dice", kinds=(MASKS,), per_class=True)
def _dices(images: Segmentation) -> Iterable[Score]:
    return images.means("dice")


@metric("iou", title="IoU", kinds=(MASKS,), per_class=True)
def _ious(images: Segmentation) -> Iterable[Score]:
    return images.means("iou")


@metric("dice_pooled", title="pooled Dice", kinds=(MASKS,), per_class=True)
def _pooled_dices(images: Segmentation) -> Iterable[Score]:
    return images.pooled("dice_pooled", lambda both, truth, found, _: _dice(both, truth, found))


@metric("iou_pooled", title="pooled IoU", kinds=(MASKS,), per_class=True)
def _pooled_ious(images: Segmentation) -> Iterable[Score]:
    return images.pooled("iou_pooled", lambda both, truth, found, _: _iou(both, truth, found))


@metric("hd95", title="HD95", kinds=(SURFACES,), higher_is_better=False, high=None, per_class=True)
def _hausdorff_distances(images: Segmentation) -> Iterable[Score]:
    return images.means("hd95")


@metric("assd", title="ASSD", kinds=(SURFACES,), higher_is_better=False, high=None, per_class=True)
def _surface_distances(images: Segmentation) -> Iterable[Score]:
    return images.means("assd")


@metric(
    "hd95_joint",
    title="HD95 (joint)",
    kinds=(SURFACES,),
    higher_is_better=False,
    high=None,
    per_class=True,
    is_default=False,
)
def _joint_hausdorff_distances(images: Segmentation) -> Iterable[Score]:
    return images.means("hd95_joint")


def segmentation(
    truth: UInt8[np.ndarray, "n h w"],
    predicted: UInt8[np.ndarray, "n2 h2 w2"],
    segments: Sequence[str],
    overlapping: bool = False,
    spacing: Sequence[float] | Float[np.ndarray, "n 2"] = (1.0, 1.0),
) -> list[Score]:
    """Return `<metric>/<class>` of every foreground class, and their mean `<metric>`.

    Args:
        truth: True masks: class numbers, or bit fields.
        predicted: Predicted masks of the same images.
        segments: Names of the classes of a mask, the unscored background first.
        overlapping: Whether masks are bit fields, bit k for `segments[k + 1]`.
        spacing: Height and width of a pixel in mm, shared or per image; without it distances are in pixels.

    Returns:
        `dice` and `iou`: mean over images; an image without the segment in either mask counts as 1.

        `dice_pooled` and `iou_pooled`: pooled over the pixels of all images; 1 where no image has the
        segment in either mask.

        `hd95` and `assd`, mean over images: between the surfaces of both masks, which are the pixels that
        have a 4-neighbour outside or lie at the image's border, the greater of the two directed 95th
        percentiles of distances (Hausdorff-95) and the mean over the pixels of both surfaces (average
        symmetric surface distance). As MONAI has them; medpy takes the percentile of both directions'
        distances together, and the mean of the two directed means. An image in which either mask lacks the
        segment has no distance and is left out: `n` is the number of images that are covered, and a score
        that covers none is NaN. Of a mean over segments, `n` is the number of images that count for any, and
        `classes` names the segments.

    Raises:
        UserError: The masks differ in shape, or hold a value outside the classes.
    """
    scored = Segmentation(segments, overlapping)
    scored.add(truth, predicted, spacing)
    return scored.scores()


def surface_distances(
    first: Bool[np.ndarray, "h w"], second: Bool[np.ndarray, "h w"], spacing: Float[np.ndarray, " 2"]
) -> tuple[float, float, float]:
    """Return Hausdorff-95, average symmetric surface distance and joint Hausdorff-95 of two regions.

    Neither region may be empty; distances have the unit of the spacing. The joint one is the 95th percentile
    of the distances of both directions together, the modified Hausdorff distance of arXiv 2410.18677 (medpy's
    `hd95`).
    """
    # Both surfaces lie inside the smallest box around the regions, so cropping to it changes no distance.
    rows, columns = (np.flatnonzero((first | second).any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    surfaces = [region[box] & ~scipy.ndimage.binary_erosion(region[box]) for region in (first, second)]
    there, back = (
        scipy.ndimage.distance_transform_edt(~surfaces[1 - side], sampling=spacing)[surfaces[side]]
        for side in (0, 1)
    )
    farthest = max(np.percentile(there, 95), np.percentile(back, 95))
    together = np.concatenate([there, back])
    return float(farthest), float(together.mean()), float(np.percentile(together, 95))


def _dice(both: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return _ratio(2 * both, truth + predicted)


def _iou(both: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return _ratio(both, truth + predicted - both)


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.ones(np.shape(over)), where=under > 0)
