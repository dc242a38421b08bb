"""Mixing of two images: mixup and CutMix, drawn on the device from (seed, step) alone."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from dapt_jax.fields import SettingError, check_fields, setting

AnyArray = Array | np.ndarray
_FOR_MIX = 64


@dataclasses.dataclass(frozen=True)
class Mix:
    """Mixing of each image of a batch with one partner, with one draw for the whole batch or for each image.

    Attributes:
        mixup: Both parameters of the beta distribution of an image's share, for mixup (Zhang et al., arXiv
            1710.09412); 0 for none.
        cutmix: The same for CutMix (Yun et al., arXiv 1905.04899), in which the partner replaces a rectangle.
        switch: Probability of CutMix if both are enabled.
        mixup_probability: Probability that images drawn for mixup are mixed; the others stay as they are.
        per_image: Whether kind, share and rectangle are drawn for each image instead of once for the batch.
        probability: Probability that a batch is mixed at all.
    """

    mixup: float = setting(0.0, at_least=0, doc="Both parameters of mixup's beta distribution; 0: no mixup.")
    cutmix: float = setting(
        0.0, at_least=0, doc="Both parameters of CutMix's beta distribution; 0: no CutMix."
    )
    switch: float = setting(
        0.5, at_least=0, at_most=1, doc="Probability of CutMix where there is mixup as well."
    )
    mixup_probability: float = setting(
        1.0, at_least=0, at_most=1, doc="Probability that what is drawn for mixup is mixed at all."
    )
    per_image: bool = setting(False, doc="Draw for each image, not once for the batch.")
    probability: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.probability <= 1:
            raise SettingError("probability", self.probability, "0 to 1")

    @property
    def is_identity(self) -> bool:
        """Whether images are returned unchanged."""
        return not (self.mixup or self.cutmix) or not self.probability

    def __call__(
        self, images: Num[AnyArray, "b h w c"], seed: ArrayLike, step: ArrayLike
    ) -> tuple[Float[Array, "b h w c"], Int[Array, " b"], Float[Array, "..."]]:
        """Mix a batch.

        Args:
            images: Images with values of any range.
            seed: Seed of the run, an integer.
            step: Number of the step in the run, an integer.

        Returns:
            The mixed images; the row of each image's partner, a permutation; and the share of itself that
            every image retains, a scalar or, drawn per image, [b].
        """
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), _FOR_MIX)
        for_partner, *keys = jax.random.split(key, 5)
        images = jnp.asarray(images, jnp.float32)
        partner = jax.random.permutation(for_partner, len(images))
        if self.per_image:
            each = [jax.random.split(one, len(images)) for one in keys]
            kept = jax.vmap(lambda *own: self._kept(own, *images.shape[1:3]))(*each)
        else:
            kept = self._kept(keys, *images.shape[1:3])
        share = kept[..., None]
        return images * share + images[partner] * (1 - share), partner, kept.mean((-2, -1))

    def _kept(self, keys: Sequence[PRNGKeyArray], height: int, width: int) -> Float[Array, "h w"]:
        """Return the share of itself that an image retains at each pixel."""
        for_share, for_kind, for_place, for_whether = keys
        up = jax.random.beta(for_share, self.mixup, self.mixup) if self.mixup else jnp.float32(1)
        if self.mixup_probability < 1:
            is_mixed = jax.random.bernoulli(jax.random.fold_in(for_whether, 1), self.mixup_probability)
            up = jnp.where(is_mixed, up, 1.0)
        kept = jnp.full((height, width), up)
        if self.cutmix:
            share = jax.random.beta(jax.random.fold_in(for_share, 1), self.cutmix, self.cutmix)
            cuts = jax.random.bernoulli(for_kind, self.switch) if self.mixup else True
            kept = jnp.where(cuts, _outside(for_place, height, width, share), kept)
        return jnp.where(jax.random.bernoulli(for_whether, self.probability), kept, 1.0)


def _outside(key: PRNGKeyArray, height: int, width: int, share: Float[Array, ""]) -> Float[Array, "h w"]:
    """Return 0 inside a rectangle of `1 - share` of the area about a random centre, 1 outside.

    The rectangle is clipped at the border of the image.
    """
    sides = jnp.sqrt(1 - share) * jnp.asarray([height, width])
    centre = jax.random.uniform(key, (2,)) * jnp.asarray([height, width])
    (top, left), (bottom, right) = jnp.round(centre - sides / 2), jnp.round(centre + sides / 2)
    row, column = jnp.arange(height)[:, None], jnp.arange(width)[None]
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return 1.0 - inside
