"""From predictions of images, such as slices or patches, to predictions of patients or volumes."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Shaped

from dapt_jax.errors import UserError, nearest

RULES = ("mean", "max", "vote")
"""Ways to aggregate the probabilities of the images of a unit."""
PIXELS = "pixels"
"""Way to aggregate masks: the pixels of all images of a unit are counted together."""
PATIENT = "patient"
"""Unit of the images of one patient; any other unit is a column of the manifest."""
_WORD = " by "


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """What images are aggregated to, and how.

    >>> Aggregation("patient", "mean").protocol("linear")
    'linear by patient (mean)'

    Attributes:
        unit: `patient`, or a column of the manifest whose values name a patient's units, such as its volumes.
        rule: `mean`: of the probabilities. `max`: of the probability of the second of two classes, or of each
            of several labels. `vote`: share of the images for which a class is predicted. `pixels`: of masks.
    """

    unit: str
    rule: str = "mean"

    def __post_init__(self) -> None:
        if self.rule not in (*RULES, PIXELS):
            raise UserError(f"aggregate is {self.rule!r}; {nearest(self.rule, RULES)}")

    def protocol(self, protocol: str) -> str:
        """Return the name of a protocol whose scores are of units."""
        return f"{protocol}{_WORD}{self.unit} ({self.rule})"

    @classmethod
    def split(cls, protocol: str) -> tuple[str, Aggregation | None]:
        """Return the protocol of images behind a name, and the aggregation of its scores; None for images.

        >>> Aggregation.split("linear by patient (mean)")
        ('linear', Aggregation(unit='patient', rule='mean'))
        >>> Aggregation.split("linear")
        ('linear', None)
        """
        base, word, rest = protocol.partition(_WORD)
        unit, bracket, rule = rest.rpartition(" (")
        return (base, cls(unit, rule.removesuffix(")"))) if word and bracket else (protocol, None)


@dataclasses.dataclass(frozen=True)
class Units:
    """The images of each unit.

    Attributes:
        names: Name of each unit, str [units].
        member: Unit of each image, int [n].
    """

    names: Shaped[np.ndarray, " units"]
    member: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, values: Shaped[np.ndarray, " n"]) -> Units:
        """Return the units of images by the name of each image's unit."""
        names, member = np.unique(values, return_inverse=True)
        return cls(names, member)

    @property
    def first(self) -> Int[np.ndarray, " units"]:
        """The first image of each unit."""
        return np.unique(self.member, return_index=True)[1]

    def labels(self, labels: Shaped[np.ndarray, "n ..."], classes: int) -> Shaped[np.ndarray, "units ..."]:
        """Return the label of each unit: that of all of its images.

        A unit of two classes is of the second one if any image is; of several labels, it has those of any
        image, and lacks those of which some are unknown and none is 1.

        Args:
            labels: Class numbers [n], or 0, 1 and NaN [n, classes].
            classes: Number of classes.

        Raises:
            UserError: There are three classes or more, and a unit has images of several.
        """
        found = np.stack([_extreme(each, self) for each in np.atleast_2d(labels.T)], -1)
        if labels.ndim == 2:
            return found
        if classes > 2 and (mixed := self.mixed(labels)).size:
            count = len(np.unique(labels[self.member == mixed[0]]))
            raise UserError(
                f"{str(self.names[mixed[0]])!r} has images of {count} of {classes} classes; expected one class for all "
                "images of a unit, or two classes, of which the second counts if any image has it"
            )
        return found[:, 0].astype(labels.dtype)

    def mixed(self, labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " k"]:
        """Return the units whose images are of several classes, by the class number of each image."""
        return np.flatnonzero(_extreme(labels, self) != -_extreme(-labels, self))

    def probabilities(
        self, probabilities: Float[np.ndarray, "n classes"], rule: str, is_multi_label: bool
    ) -> Float[np.ndarray, "units classes"]:
        """Return the probabilities of each unit, by a rule of `Aggregation`."""
        if rule == "max":
            if is_multi_label:
                return np.stack([_extreme(each, self) for each in probabilities.T], -1)
            second = _extreme(probabilities[:, 1], self)
            return np.stack([1 - second, second], -1)
        votes = probabilities
        if rule == "vote":
            decided = (
                probabilities > 0.5
                if is_multi_label
                else np.eye(probabilities.shape[1])[probabilities.argmax(1)]
            )
            votes = decided.astype(probabilities.dtype)
        sums = np.stack([np.bincount(self.member, each, len(self.names)) for each in votes.T], -1)
        return (sums / np.bincount(self.member)[:, None]).astype(probabilities.dtype)


def _extreme(values: np.ndarray, units: Units) -> np.ndarray:
    """Return the largest value of each unit; NaN where one is unknown and none is 1."""
    known = np.where(np.isnan(values), -np.inf, values) if values.dtype.kind == "f" else values
    order = np.argsort(units.member, kind="stable")
    starts = np.searchsorted(units.member[order], np.arange(len(units.names)))
    largest: np.ndarray = np.maximum.reduceat(known[order], starts)
    if values.dtype.kind == "f":
        has_gap = np.bincount(units.member, np.isnan(values), len(units.names)) > 0
        largest = np.where(has_gap & (largest != 1), np.nan, largest)
    return largest
