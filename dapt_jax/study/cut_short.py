"""Compute-matched arms: a run cut short to a number of FLOPs."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from dapt_jax.errors import UserError
from dapt_jax.models.classifier import Classifier
from dapt_jax.study.runs import inverse_frequency_weights
from dapt_jax.study.strategies import scaled
from dapt_jax.training.run import TrainData, TrainingRun

FEWEST_IMAGES = 2
"""Images below which a run is refused."""


def cut(run: TrainingRun[Classifier], flops: int, where: str = "") -> TrainingRun[Classifier]:
    """Return the longest run like this one whose adaptation takes at most a number of FLOPs.

    All phases keep their proportions: their epochs are scaled by one factor, at least one epoch each, and
    their schedules span what is left, so that a cut run is a short run and no beginning of a long one. Where
    one epoch each is still too much, training images are left out at random, by the seed of the run, until it
    fits; validation images, whose cached activations count too, are then left out with them, so that neither early
    stopping nor the schedule `plateau` can watch their loss.

    Args:
        run: The run.
        flops: Most model FLOPs, frozen prefixes that are computed once included.
        where: Name of the setting, for the error line.

    Returns:
        The run itself where it fits.

    Raises:
        UserError: Not even an epoch of `FEWEST_IMAGES` images fits, or a phase watches the validation loss of images
            that would have to be left out.
    """
    if run.flops() <= flops:
        return run
    epochs, images, whole = run.timeline.epochs, len(run.train_rows), len(run.dataset)

    @functools.cache
    def of_epochs(number: int) -> TrainingRun[Classifier]:
        return dataclasses.replace(run, phases=scaled(run.phases, number / epochs))

    # Priced as the run that would be trained: a shorter one may cache less than this one.
    if longest := _largest(lambda number: of_epochs(number).flops(), 1, epochs, flops):
        return of_epochs(longest)
    single = of_epochs(1)
    of_image = sum(single.flops_per_image(number) for number in range(len(single.phases)))
    of_fills = single.flops() - of_image * images

    def of_images(number: int) -> int:
        return of_image * number + of_fills * number // whole

    number = _largest(of_images, FEWEST_IMAGES, images, flops)
    if not number:
        raise UserError(
            f"{where or run.tag.strategy}: {flops / 1e12:.3g} TFLOP do not suffice for an epoch of "
            f"{FEWEST_IMAGES} images; expected {of_images(FEWEST_IMAGES) / 1e12:.3g} TFLOP or more"
        )
    if len(run.val_rows) and (watching := [each.name for each in run.phases if each.schedule == "plateau"]):
        raise UserError(
            f"{where or run.tag.strategy}: {flops / 1e12:.3g} TFLOP suffice for an epoch of {number} of {images} images "
            f"and none to validate on, whose loss phase {watching[0]!r} watches (schedule 'plateau'); expected "
            f"{single.flops() / 1e12:.3g} TFLOP or more, or another schedule, such as 'cosine'"
        )
    part = run.dataset.take(np.sort(np.random.default_rng(run.seed).permutation(run.train_rows)[:number]))
    every = np.arange(number)
    weights = inverse_frequency_weights(part, every) if run.data.weights else ()
    return dataclasses.replace(run, phases=single.phases, data=TrainData(part, every, weights=weights))


def _largest(flops_of: Callable[[int], int], low: int, high: int, flops: int) -> int:
    """Return the largest number from `low` to `high` whose FLOPs fit; 0 where those of `low` do not.

    FLOPs must not decrease with the number.
    """
    found = 0
    while low <= high:
        middle = (low + high) // 2
        if flops_of(middle) <= flops:
            found, low = middle, middle + 1
        else:
            high = middle - 1
    return found
