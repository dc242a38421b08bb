"""Splits that keep the images of each patient together and the class proportions equal.

The method is iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011) over groups: the class with
the fewest remaining groups is distributed first, each of its groups to the side that lacks most images of it.
scikit-learn's `StratifiedGroupKFold` supports neither arbitrary fractions nor several labels per image, and
warns or fails if a class has fewer images than there are folds, which is common in small medical sets.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from dapt_jax.errors import UserError

Split = tuple[np.ndarray, np.ndarray]

_MOST_DEALT = 64
_dealt: dict[bytes, np.ndarray] = {}
"""Sides by what they depend on: the seeds and arms of a study ask for the same split again and again."""


def grouped_holdout(labels: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> Split:
    """Hold out a fraction of the images.

    A class in two or more groups is on both sides if the other classes of these groups allow it; a class in
    only one group remains in training.

    Args:
        labels: Int [n], or float [n, classes] of 0, 1 and NaN.
        groups: str or int [n]; no group is divided.
        fraction: Share of the images to hold out, between 0 and 1.
        seed: Seed of the split; equal seeds give equal splits.

    Returns:
        Sorted indices (int64) of the training images and of the held-out images.

    Raises:
        UserError: The fraction is not between 0 and 1, or there are fewer than two groups.
    """
    if not 0 < fraction < 1:
        raise UserError(f"a held-out fraction of {fraction}; expected more than 0 and less than 1")
    sides = _deal(labels, groups, np.array([1 - fraction, fraction]), seed, "a held-out part", lone=0)
    return np.flatnonzero(sides == 0), np.flatnonzero(sides == 1)


def grouped_folds(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> list[Split]:
    """Divide the images into folds, each of which is held out once.

    A class with fewer groups than folds is missing from some held-out parts; it is in every training part if
    it is in two or more groups and the other classes of these groups allow it.
    `dapt_jax.data.findings.of_folds` reports what is missing.

    Args:
        labels: Int [n], or float [n, classes] of 0, 1 and NaN.
        groups: str or int [n]; no group is divided.
        folds: Number of folds, two or more.
        seed: Seed of the folds; equal seeds give equal folds.

    Returns:
        For each fold, sorted indices (int64) of the training images and of the held-out images.

    Raises:
        UserError: There are fewer than two folds, or fewer groups than folds.
    """
    if folds < 2:
        raise UserError(f"{folds} folds; expected at least 2")
    sides = _deal(labels, groups, np.full(folds, 1 / folds), seed, f"{folds} folds")
    return [(np.flatnonzero(sides != fold), np.flatnonzero(sides == fold)) for fold in range(folds)]


def grouped_parts(
    labels: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int
) -> list[np.ndarray]:
    """Divide the images into parts of given sizes.

    >>> labels, groups = np.array([0, 1] * 4), np.array(list("aabbccdd"))
    >>> [len(rows) for rows in grouped_parts(labels, groups, (0.5, 0.25), 0)]
    [4, 2]

    Args:
        labels: Int [n], or float [n, classes] of 0, 1 and NaN.
        groups: str or int [n]; no group is divided.
        shares: Share of the images of each part, more than 0; what they leave is in no part.
        seed: Seed of the division; equal seeds give equal parts.

    Returns:
        For each share, sorted indices (int64) of its images.

    Raises:
        UserError: There are fewer groups than parts.
    """
    left = 1 - sum(shares)
    whole = np.array([*shares, *([left] if left > 1e-9 else [])])
    sides = _deal(labels, groups, whole / whole.sum(), seed, f"{len(whole)} parts")
    return [np.flatnonzero(sides == part) for part in range(len(shares))]


def check_disjoint(
    groups_a: Sequence[str] | np.ndarray,
    groups_b: Sequence[str] | np.ndarray,
    name_a: str,
    name_b: str,
    word: str = "patient",
) -> None:
    """Refuse two sets that share a group.

    Args:
        groups_a: Groups of the first set.
        groups_b: Groups of the second set.
        name_a: Name of the first set in errors.
        name_b: Name of the second set in errors.
        word: Name for a group in errors.

    Raises:
        UserError: The sets share groups; gives their number and names the first.
    """
    shared = sorted({str(group) for group in groups_a} & {str(group) for group in groups_b})
    if shared:
        count = f"1 {word} is" if len(shared) == 1 else f"{len(shared)} {word}s are"
        raise UserError(
            f"{count} in both {name_a} and {name_b}, first: {shared[0]}; expected each {word} on one side "
            "only"
        )


def in_order(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the names of groups in the order that splits depend on, and the place of each image's group in it.

    An image without a patient is a group under its path. Paths come first, as absolute ones do by themselves: where
    the patients come must not depend on whether the folder of the data was given relative to another.

    >>> names, members = in_order(np.array(["P2", "data/a.png", "P1", "P2"]))
    >>> names.tolist(), members.tolist()
    (['data/a.png', 'P1', 'P2'], [2, 0, 1, 2])

    Args:
        groups: str or int [n].

    Returns:
        The names, [k], and int64 [n].
    """
    names, members = np.unique(groups, return_inverse=True)
    order = np.argsort([os.sep not in str(name) for name in names.tolist()], kind="stable")
    return names[order], np.argsort(order)[members]


def _deal(
    labels: np.ndarray,
    groups: np.ndarray,
    shares: np.ndarray,
    seed: int,
    purpose: str,
    lone: int | None = None,
) -> np.ndarray:
    """Assign each image a side (int64 [n]) with about `shares[i]` of the images of each class on side i.

    `lone` is the side of the classes that are in only one group; None allows any side.
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    hashed = hashlib.blake2b(repr((labels.dtype, labels.shape, groups.dtype, seed, lone)).encode())
    for values in (labels, groups if groups.dtype != object else groups.astype(str), shares):
        hashed.update(np.ascontiguousarray(values).data if values.dtype.kind != "U" else values.tobytes())
    key = hashed.digest()
    if key not in _dealt:
        if len(_dealt) == _MOST_DEALT:
            del _dealt[next(iter(_dealt))]
        _dealt[key] = _deal_anew(labels, groups, shares, seed, purpose, lone)
    return _dealt[key]


def _deal_anew(
    labels: np.ndarray, groups: np.ndarray, shares: np.ndarray, seed: int, purpose: str, lone: int | None
) -> np.ndarray:
    names, members = in_order(groups)
    if len(names) < len(shares):
        raise UserError(f"{purpose}: needs at least {len(shares)} patients (groups), there are {len(names)}")
    counts = _counts(labels, members, len(names))
    rng = np.random.default_rng(seed)
    lacking = shares[:, None] * counts.sum(axis=0)
    filled = np.zeros((len(shares), counts.shape[1]), bool)
    side_of = np.full(len(names), -1)
    left = rng.permutation(len(names))
    if lone is not None:
        sole = counts[:, (counts > 0).sum(axis=0) == 1].any(axis=1)
        side_of[sole] = lone
        lacking[lone] -= counts[sole].sum(axis=0)
        filled[lone] |= (counts[sole] > 0).any(axis=0)
        left = left[side_of[left] < 0]
    while len(left):
        groups_left = (counts[left] > 0).sum(axis=0)
        rarest = np.where(groups_left > 0, groups_left, len(names) + 1).argmin()
        having = left[counts[left, rarest] > 0]
        # Large groups first: the small groups then balance the remaining differences.
        for place, group in enumerate(having[np.argsort(-counts[having, rarest], kind="stable")]):
            empty = np.flatnonzero(~filled[:, rarest])
            last_chance = len(empty) and len(having) - place <= len(empty)
            side = _neediest(lacking, rarest, empty if last_chance else np.arange(len(shares)), rng)
            side_of[group] = side
            lacking[side] -= counts[group]
            filled[side] |= counts[group] > 0
        left = left[side_of[left] < 0]
    _fill_empty_sides(side_of, counts, len(shares))
    _keep_promise(side_of, counts, len(shares), lone)
    return side_of[members]


def _neediest(lacking: np.ndarray, column: np.integer, sides: np.ndarray, rng: np.random.Generator) -> int:
    """Return the side that lacks most images of a class, then most images, then a random one."""
    keys = np.stack(
        [rng.random(len(sides)), lacking[sides].sum(axis=1).round(9), lacking[sides, column].round(9)]
    )
    return int(sides[np.lexsort(keys)[-1]])


def _fill_empty_sides(side_of: np.ndarray, counts: np.ndarray, sides: int) -> None:
    """Move the smallest group of the side with most groups to each empty side."""
    for side in range(sides):
        if (side_of == side).any():
            continue
        fullest = np.bincount(side_of, minlength=sides).argmax()
        movable = np.flatnonzero(side_of == fullest)
        side_of[movable[counts[movable].sum(axis=1).argmin()]] = side


def _keep_promise(side_of: np.ndarray, counts: np.ndarray, sides: int, lone: int | None) -> None:
    """Move groups so that every class in two or more groups is in every training part, if possible.

    A group that several classes share may have been assigned for one class at the cost of another.
    """
    has = counts > 0
    wanted = np.flatnonzero(has.sum(axis=0) >= 2)

    def lacking(placed: np.ndarray) -> int:
        """Return the number of classes that some training part lacks."""
        on = np.stack([has[placed == side].any(axis=0) for side in range(sides)])[:, wanted]
        broken = ~on[lone] if lone is not None else on.sum(axis=0) < 2
        return int(broken.sum())

    worst = lacking(side_of)
    while worst:
        on = np.stack([has[side_of == side].any(axis=0) for side in range(sides)])
        broken = wanted[~on[lone][wanted]] if lone is not None else wanted[on[:, wanted].sum(axis=0) < 2]
        candidates = np.flatnonzero(has[:, broken].any(axis=1))
        # A single group moves where that helps; else two groups change places.
        for changed in (_moved(side_of, candidates, sides), _swapped(side_of, candidates, has, counts)):
            tried = ((lacking(placed), np.abs(counts[placed != side_of]).sum(), placed) for placed in changed)
            best = min(tried, key=lambda each: each[:2], default=None)
            if best is not None and best[0] < worst:
                worst, _, side_of[:] = best
                break
        else:
            return


def _moved(side_of: np.ndarray, candidates: np.ndarray, sides: int) -> Iterator[np.ndarray]:
    """Yield the sides of all groups after each move of a candidate that leaves no side empty."""
    for group in candidates:
        if (side_of == side_of[group]).sum() > 1:
            for side in np.flatnonzero(np.arange(sides) != side_of[group]):
                placed = side_of.copy()
                placed[group] = side
                yield placed


def _swapped(
    side_of: np.ndarray, candidates: np.ndarray, has: np.ndarray, counts: np.ndarray
) -> Iterator[np.ndarray]:
    """Yield the sides of all groups after each exchange of a candidate with a group of another side.

    Of groups of one side with the same classes, only the smallest is exchanged.
    """
    order = np.argsort(counts.sum(axis=1), kind="stable")
    _, first = np.unique(np.column_stack([side_of, has])[order], axis=0, return_index=True)
    for group in candidates:
        for other in order[first]:
            if side_of[other] != side_of[group]:
                placed = side_of.copy()
                placed[[group, other]] = side_of[[other, group]]
                yield placed


def _counts(labels: np.ndarray, members: np.ndarray, groups: int) -> np.ndarray:
    """Return the number of images of each class in each group, float64 [groups, classes]."""
    if labels.ndim == 1:
        present = np.unique(labels)[None, :] == labels[:, None]
    else:
        present = np.nan_to_num(labels) > 0
        # Images without a class are distributed evenly as well.
        present = np.column_stack([present, ~present.any(axis=1)])
    counts = np.zeros((groups, present.shape[1]))
    np.add.at(counts, members, present)
    return counts
