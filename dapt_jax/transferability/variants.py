"""A grid of variants of scores, from features that are computed once: arithmetic alone."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dapt_jax.errors import UserError, nearest
from dapt_jax.fields import SettingError, check_fields, setting
from dapt_jax.transferability import registry
from dapt_jax.transferability.robustness import DISTANCES, image_losses

ROBUSTNESS = "robustness"
SPLITS = ("development", "test", "external")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringGrid:
    """Scores of given checkpoints without training, `mode=score`: the section `scoring`.

    Settings that hold several values span a grid: every score has a variant for each combination that it
    depends on.
    """

    checkpoints: tuple[str, ...] = setting(
        (),
        doc="Encoders: names of the zoo, files, folders of a run's epochs, run:WORKDIR@epoch=all; empty: the "
        "study's own arms, adapted ones from its workdir.",
    )
    names: tuple[str, ...] = setting((), doc="Scores; empty: checkpoint_scoring.names.")
    tasks: tuple[str, ...] = setting((), doc="Target tasks; empty: all.")
    splits: tuple[str, ...] = setting(("development",), doc="Sets of each task that are scored.")
    images: int = setting(0, at_least=0, doc="Largest number of images of a set; 0: all.")
    distances: tuple[str, ...] = setting(("cosine",), doc="Distances of robustness.")
    margins: tuple[float, ...] = setting((0.5,), doc="Margins of robustness.")
    pooling: tuple[str, ...] = setting(
        ("pooled",), doc="pooled: spatial means; dense: place by place; of robustness."
    )
    levels: tuple[int, ...] = setting(
        (2,), doc="Levels of scores of views and masks: 1 the encoder's last, 2 the deepest skip, ..."
    )
    views: tuple[int, ...] = setting((2,), doc="Numbers of jittered views, of scores of views.")
    negatives: tuple[int, ...] = setting((1,), doc="Negatives per image of robustness; 0: all other images.")
    reference_compatible: tuple[bool, ...] = setting(
        (False,), doc="Whether views and negatives are those of the code of arXiv 2410.18677."
    )
    resamples: int = setting(
        100, at_least=0, doc="Random halves of the images, by patient, that give the intervals; 0: none."
    )
    downstream: str = setting(
        "",
        doc="Downstream scores to correlate with: a workdir, a results.jsonl, or a CSV with the columns "
        "checkpoint, value and, for several tasks, task; empty: those of the runs that the checkpoints are of.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.names:
            registry.entry(name)
        for name, choices in (
            ("distances", tuple(DISTANCES)),
            ("pooling", ("pooled", "dense")),
            ("splits", SPLITS),
        ):
            for value in getattr(self, name):
                if value not in choices:
                    raise SettingError(name, value, nearest(value, choices), unknown=True)
        for name, least in (("margins", 0.0), ("levels", 1), ("views", 2), ("negatives", 0)):
            for value in getattr(self, name):
                if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
                    raise UserError(f"scoring.{name} holds {value!r}; expected numbers from {least:g}")
        for name in ("splits", "distances", "margins", "pooling", "levels", "views", "negatives"):
            if not getattr(self, name):
                raise UserError(f"scoring.{name} is empty; expected one value or more")
        for value in self.reference_compatible:
            if not isinstance(value, bool):
                raise UserError(f"scoring.reference_compatible holds {value!r}; expected True or False")

    def variants(self, names: Iterable[str]) -> "list[Variant]":
        """Return the variants of scores that the grid spans, in a fixed order.

        The reference's score has one negative, so other numbers of negatives have no such variant.

        >>> grid = ScoringGrid(distances=("cosine", "l2"), margins=(0.5, 1.0))
        >>> [variant.title for variant in grid.variants(["robustness", "logme"])]
        ['robustness cosine 0.5', 'robustness cosine 1', 'robustness l2 0.5', 'robustness l2 1', 'logme']
        """
        found = []
        for name in names:
            for values in self._values(name):
                variant = Variant(name, **values)
                if not (variant.reference_compatible and variant.negatives not in (None, 1)):
                    found.append(dataclasses.replace(variant, varied=self._varied(name)))
        return found

    def _values(self, name: str) -> Iterator[dict[str, Any]]:
        axes = {key: getattr(self, setting) for key, setting in _axes(name).items()}
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))

    def _varied(self, name: str) -> tuple[str, ...]:
        return tuple(key for key, setting in _axes(name).items() if len(getattr(self, setting)) > 1)


_OF_ROBUSTNESS = {
    "distance": "distances",
    "margin": "margins",
    "pooling": "pooling",
    "negatives": "negatives",
}
_OF_VIEWS = {"level": "levels", "views": "views", "reference_compatible": "reference_compatible"}


def _axes(name: str) -> dict[str, str]:
    """Return the settings that a score depends on, by the variant's attribute."""
    needs = registry.entry(name).needs
    if name == ROBUSTNESS:
        return {**_OF_ROBUSTNESS, **_OF_VIEWS}
    return _OF_VIEWS if needs == "views" else {"level": "levels"} if needs == "masks" else {}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A score with the values of the grid that it depends on; None for those that it does not.

    Attributes:
        score: Name of the score.
        distance: Distance of robustness.
        margin: Margin of robustness.
        pooling: `pooled` or `dense`.
        negatives: Negatives per image of robustness.
        level: Level of the features.
        views: Number of views.
        reference_compatible: Whether views and negatives are the reference's.
        varied: Attributes that differ between variants of its grid, for its title.
    """

    score: str
    distance: str | None = None
    margin: float | None = None
    pooling: str | None = None
    negatives: int | None = None
    level: int | None = None
    views: int | None = None
    reference_compatible: bool | None = None
    varied: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def values(self) -> dict[str, Any]:
        """Its values by name, without those that it does not depend on."""
        found = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        return {key: value for key, value in found.items() if key not in ("score", "varied")}

    @property
    def title(self) -> str:
        """Its name among the variants of its grid."""
        words = {
            "distance": f"{self.distance}",
            "margin": f"{self.margin:g}" if self.margin is not None else "",
            "pooling": f"{self.pooling}",
            "negatives": f"{self.negatives or 'all'} negatives",
            "level": f"level {self.level}",
            "views": f"{self.views} views",
            "reference_compatible": "reference" if self.reference_compatible else "ours",
        }
        return " ".join([self.score, *(words[key] for key in words if key in self.varied)])


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of a checkpoint on a set, from which every variant follows.

    Attributes:
        last: Pooled features of the images [n, d].
        views: Feature maps [v, n, h, w, d] of the jittered views, or spatial means [v, n, 1, 1, d] where no
            variant is dense, by (reference_compatible, level).
        maps: Feature maps [n, h, w, d] of the images, by level.
        masks: Classes [n, h, w] at their places, by level.
        labels: Class numbers [n]; None without single labels.
        source: Probabilities of the source classes [n, z]; None without a source head.
    """

    last: np.ndarray
    views: Mapping[tuple[bool, int], np.ndarray] = dataclasses.field(default_factory=dict)
    maps: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    masks: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    labels: np.ndarray | None = None
    source: np.ndarray | None = None


class Measure:
    """Scores of one checkpoint on one set: whole, and on random halves of the images."""

    def __init__(self, features: Features, margins: Sequence[float]):
        """Compute nothing yet.

        Args:
            features: Features of the checkpoint on the set.
            margins: Margins of robustness that the variants have; they share the distances.
        """
        self._features = features
        self._margins = tuple(margins)
        self._losses = functools.cache(self._image_losses)

    def of(self, variant: Variant, halves: Sequence[Int[np.ndarray, " m"]] = ()) -> "Measured":
        """Return a variant's value and its values on halves of the images; NaN with a reason if undefined.

        Robustness compares each image with its negatives in the whole set, and a half takes the mean over
        its own images. Other scores are computed on the half alone.
        """
        if variant.score == ROBUSTNESS:
            return self._robustness(variant, halves)
        whole = self._outcome(variant, None)
        if whole.reason:
            return Measured(whole.value, (), whole.reason)
        return Measured(whole.value, tuple(self._outcome(variant, rows).value for rows in halves))

    def _robustness(self, variant: Variant, halves: Sequence[np.ndarray]) -> "Measured":
        try:
            losses = self._losses(
                variant.distance, variant.pooling, variant.negatives, variant.level, variant.views,
                variant.reference_compatible,
            )[self._margins.index(variant.margin)]  # fmt: skip
        except UserError as error:
            return Measured(float("nan"), (), str(error))
        if not np.isfinite(losses).all():
            return Measured(float("nan"), (), "undefined for these features")
        return Measured(float(losses.mean()), tuple(float(losses[rows].mean()) for rows in halves))

    def _image_losses(
        self, distance: str, pooling: str, negatives: int, level: int, views: int, compatible: bool
    ) -> np.ndarray:
        return image_losses(
            self._features.views[compatible, level][:views],
            self._margins,
            distance=distance,
            negatives=negatives,
            pooled=pooling == "pooled",
            reference_compatible=compatible,
        )

    def _outcome(self, variant: Variant, rows: np.ndarray | None) -> registry.Outcome:
        found, level = self._features, variant.level
        chosen: Any = slice(None) if rows is None else rows
        views = None
        if variant.views is not None and level is not None:
            views = found.views[bool(variant.reference_compatible), level][: variant.views, chosen]
        maps = masks = None
        if level is not None and level in found.masks:
            maps, masks = (found.maps[level][chosen],), (found.masks[level][chosen],)
        labels = None if found.labels is None else found.labels[chosen]
        source = None if found.source is None else found.source[chosen]
        sample = registry.Sample(found.last[chosen], labels, views, source, maps, masks)
        return registry.evaluate([variant.score], sample)[variant.score]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A value with its values on halves of the images.

    Attributes:
        value: Value on all images; NaN where undefined.
        halves: Values on the halves.
        reason: Why the value is undefined.
    """

    value: float
    halves: tuple[float, ...] = ()
    reason: str = ""


def random_halves(
    groups: Sequence[object] | np.ndarray, strata: np.ndarray | None, number: int, seed: int
) -> list[Int[np.ndarray, " m"]]:
    """Draw random halves of the patients, each with all of its images, without replacement.

    The spread of a mean over halves is that of the bootstrap (Saigo, Shao and Sitter, 2001), and no image
    comes twice, so that a score that compares images with one another, such as kNN, meets no copies.

    Args:
        groups: The patient of each image, [n].
        strata: Class of each image, int [n], in which halves are drawn apart; None for one stratum.
        number: Number of halves.
        seed: Seed of the draws.

    Returns:
        Sorted rows of each half; none where there are fewer than four patients.
    """
    names, first, member = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    if len(names) < 4:
        return []
    stratum = np.zeros(len(names), int) if strata is None else np.asarray(strata)[first]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        taken = np.zeros(len(names), bool)
        for value in np.unique(stratum):
            places = rng.permutation(np.flatnonzero(stratum == value))
            taken[places[: (len(places) + int(rng.integers(2))) // 2]] = True
        found.append(np.flatnonzero(taken[member]))
    return found


def deviations(value: float, halves: Sequence[float]) -> Float[np.ndarray, " r"]:
    """Return draws around a value with the spread of its halves: what a score's interval is taken from.

    A score of fewer images may be shifted (LogME), so the mean of the halves is replaced by the value.
    """
    known = np.asarray(halves, float)
    return value + known - np.nanmean(known) if np.isfinite(known).any() else known
