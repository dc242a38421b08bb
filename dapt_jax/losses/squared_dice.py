"""Soft Dice with squared predictions, background included (arXiv 2410.18677)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from dapt_jax.losses.overlap import Dice


@dataclasses.dataclass(frozen=True)
class SquaredDice(Dice, name="dice_squared"):
    """1 minus soft Dice, mean over the background and all classes, predictions squared in the denominator.

    The loss of arXiv 2410.18677 and of its public code. With one output, or independent ones, the background
    of each is its complement.
    """

    def overlap(
        self, logits: Array, targets: Array, axes: tuple[int, ...], weights: Array | float = 1.0
    ) -> Float[Array, "..."]:
        """Return 1 minus the Dice index, sums taken over `axes`, mean over background and classes."""
        predicted = self.probabilities(logits)
        if self.sigmoid:
            predicted, targets = (jnp.concatenate([1 - each, each], -1) for each in (predicted, targets))
        both = jnp.sum(weights * predicted * targets, axes)
        sizes = jnp.sum(weights * (predicted**2 + targets), axes)
        index = (2 * both + self.smoothing_constant) / (sizes + self.smoothing_constant)
        return jnp.mean(1 - index, -1)
