"""Validated features and labels, and statistics shared by several scores."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from dapt_jax.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

# The context's place in JAX moved; every release from 0.7 on has one of the two.
_x64: Callable[[bool], Any] = getattr(  # noqa: B009
    jax if hasattr(jax, "enable_x64") else jax.experimental, "enable_x64"
)


def in_double(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function with JAX in float64: determinants and inverses of feature covariances need it."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _x64(True):
            return function(*args, **kwargs)

    return run


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Features with labels, and statistics of both, computed lazily and shared by scores.

    Attributes:
        features: Features, float64 [n, d], finite.
        labels: Class of each row, 0 to the number of classes present minus 1.
    """

    features: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, features: Num[Any, "n d"], labels: Int[Any, " n"]) -> "FeatureStatistics":
        """Check features and labels; classes that no row has are left out.

        Raises:
            UserError: A feature is not finite, the numbers of rows differ, or all labels are one class.
        """
        values, names = finite(features, 2), np.asarray(labels)
        if names.shape != values.shape[:1] or not np.issubdtype(names.dtype, np.integer):
            raise UserError(
                f"labels are {names.dtype} of shape {names.shape}; expected one class number, int, for each of "
                f"{len(values)} rows"
            )
        present, inverse = np.unique(names, return_inverse=True)
        if len(present) < 2:
            raise UserError(f"all {len(values)} labels are one class; expected two classes or more")
        return cls(values, inverse)

    @functools.cached_property
    def counts(self) -> Int[np.ndarray, " c"]:
        """Rows of each class."""
        return np.bincount(self.labels)

    @functools.cached_property
    def mean(self) -> Float[np.ndarray, " d"]:
        """Mean of all rows."""
        return self.features.mean(0)

    @functools.cached_property
    def centred(self) -> Float[np.ndarray, "n d"]:
        """The features without their mean."""
        return self.features - self.mean

    @functools.cached_property
    def class_means(self) -> Float[np.ndarray, "c d"]:
        """Mean of the rows of each class, less the mean of all."""
        return class_sums(self.centred, self.labels, len(self.counts)) / self.counts[:, None]

    @functools.cached_property
    def scatter(self) -> Float[np.ndarray, "d d"]:
        """Sum over rows of the outer product of a centred row with itself."""
        return gram(self.centred)

    @functools.cached_property
    def within(self) -> Float[np.ndarray, "d d"]:
        """Within-class covariance: the mean of class covariances, weighted by class frequency."""
        weighted = self.class_means * np.sqrt(self.counts)[:, None]
        return (self.scatter - weighted.T @ weighted) / len(self.labels)

    @functools.cached_property
    def spectrum(self) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
        """Eigenvalues of `scatter`, ascending, and eigenvectors as columns."""
        return eigh(self.scatter)

    @functools.cached_property
    def spread(self) -> float:
        """Largest variance of a feature; 0 where rounding is all there is."""
        largest = float(np.max(np.diag(self.scatter))) / len(self.labels)
        return largest if largest > 1e-20 * float(np.max(self.features**2, initial=0.0)) else 0.0

    def projected(self, dimensions: int) -> Float[np.ndarray, "n k"]:
        """Return principal components of the rows, those of largest variance first."""
        _, vectors = self.spectrum
        return self.centred @ vectors[:, ::-1][:, :dimensions]


def finite(values: ArrayLike, ndim: int, what: str = "features") -> np.ndarray:
    """Return float64 values with `ndim` axes.

    Raises:
        UserError: They have another number of axes, no rows, or hold NaN or infinity; names the first such
            row.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != ndim or not array.size:
        raise UserError(f"{what} have shape {array.shape}; expected {ndim} axes and one row or more")
    bad = ~np.isfinite(array.reshape(len(array), -1)).all(1)
    if bad.any():
        raise UserError(
            f"{what} of image {int(np.flatnonzero(bad)[0])} are not finite ({int(bad.sum())} of {len(array)} "
            "images); "
            "expected numbers"
        )
    return array


def maps_with_masks(
    features: ArrayLike, masks: ArrayLike
) -> tuple[Float[np.ndarray, "n h w d"], Int[np.ndarray, "n h w"]]:
    """Return feature maps as float64 and the class of each of their positions.

    Raises:
        UserError: The maps are not finite, or the masks do not fit them.
    """
    maps, classes = finite(features, 4, "feature maps"), np.asarray(masks)
    if classes.shape != maps.shape[:3]:
        raise UserError(
            f"masks have shape {classes.shape}; expected that of the feature maps, {maps.shape[:3]}"
        )
    return maps, classes


def masks_at(masks: Int[np.ndarray, "n h h"], side: int) -> Int[np.ndarray, "n s s"]:
    """Return the classes at the centres of the places of a map of `side` by `side`.

    >>> masks_at(np.arange(9).reshape(1, 3, 3), 1).tolist()
    [[[4]]]
    """
    centres = (2 * np.arange(side) + 1) * masks.shape[1] // (2 * side)
    return masks[:, centres][:, :, centres]


def class_sums(
    rows: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], classes: int
) -> Float[np.ndarray, "c d"]:
    """Return the sum of the rows of each class."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(classes))
    return np.add.reduceat(rows[order], starts, axis=0)


@jax.jit
def _gram(rows: Float[Array, "n d"]) -> Float[Array, "d d"]:
    return rows.T @ rows


@in_double
def gram(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "d d"]:
    """Return transposed rows times rows, in float64."""
    return np.asarray(_gram(rows))


def eigh(matrix: Float[np.ndarray, "d d"]) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Return ascending eigenvalues, clipped at 0, and eigenvectors of a positive semi-definite matrix.

    By numpy: XLA:CPU calls the same routine with one thread, and took 16 s against 8 s at 2,048 features.
    """
    values, vectors = np.linalg.eigh(matrix)
    return np.maximum(values, 0.0), vectors
