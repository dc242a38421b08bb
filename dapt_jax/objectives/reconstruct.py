"""Reconstruction of the starting weights' own features from corrupted activations."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dapt_jax.fields import check_fields, setting
from dapt_jax.models.classifier import pool
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.objectives.base import AsMap, HeadParameters, Objective, dense, dense_parameters, normalised
from dapt_jax.ops import gelu
from dapt_jax.parameters import Kind

LAYER_SCALE = 1e-5
"""Initial factor of the head's residual branch."""

_LAST = 1 - 1e-6
"""Largest argument of the inverse error function: 4.9 standard deviations."""

MAP_BOTTLENECK = 16
"""Ratio of the channels of a map to those between the head's dense layers."""


@dataclasses.dataclass(frozen=True)
class ReconstructSettings:
    """Corruption of the input: the section `adapt.reconstruct`.

    Attributes:
        noise: Standard deviation of the Gaussian noise, relative to that of each image's channel.
        replaced: Largest share of positions that are replaced by a learnt vector.
    """

    noise: float = setting(
        0.2, at_least=0, doc="Standard deviation of the noise, relative to each image and channel's own."
    )
    replaced: float = setting(
        1 / 3, at_least=0, below=1, doc="Largest share of positions that a learnt vector replaces."
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Reconstruct(Objective):
    """Mean squared error between features of corrupted and of clean input, at every position.

    Of each image, a share of the positions drawn from U(0, `options.replaced`) is replaced, and noise is added; the
    last image of a batch stays clean. Target: the starting weights' last output for the clean image. With a
    transformer that trains from its first group this is Token Reconstruction (arXiv 2405.00117). Maps of
    convolutional networks are not normed as tokens are: their error is divided by the mean square of the
    image's target, and that of the pooled vector, likewise relative, is added.
    """

    name: ClassVar[str] = "reconstruct"
    is_corrupting: ClassVar[bool] = True
    has_own_teacher: ClassVar[bool] = True
    trains_head_first: ClassVar[bool] = False

    options: ReconstructSettings = ReconstructSettings()

    def head(self, encoder: Encoder) -> HeadParameters:
        """Return a residual branch: layer norm, dense, GELU, dense, layer scale.

        Of convolutional networks, whose last maps are wide, it is a bottleneck: the published width would cost
        almost half of EfficientNet-Lite0's own forward pass.
        """
        assert self.teacher is not None
        width = encoder.features
        is_map = self.teacher.shapes(encoder.image_size).ndim == 4
        hidden = max(1, width // MAP_BOTTLENECK) if is_map else width
        return {
            "norm/scale": ((width,), Kind.LAYER_NORM_SCALE),
            "norm/bias": ((width,), Kind.LAYER_NORM_BIAS),
            **dense_parameters("dense1", width, hidden),
            **dense_parameters("dense2", hidden, width),
            "gamma": ((width,), Kind.BIAS),
        }

    def outputs(self, head: Tree, x: Float[Array, "b ..."], as_map: AsMap) -> Float[Array, "b ..."]:
        """Return the reconstructed output, of the shape of the encoder's own."""
        x = x.astype(jnp.float32)
        y = normalised(x) * head["norm"]["scale"] + head["norm"]["bias"]
        y = dense(head["dense2"], gelu(dense(head["dense1"], y)))
        return x + (LAYER_SCALE + head["gamma"]) * y

    def losses(
        self, outputs: Float[Array, "b ..."], targets: Float[Array, "b ..."], weights: Float[Array, " b"]
    ) -> Float[Array, " b"]:
        """Return the mean squared error over tokens and channels; of maps, see the class."""
        targets = targets.astype(jnp.float32)
        if outputs.ndim == 3:
            return _squared(outputs, targets)
        return _relative(outputs, targets) + _relative(pool(outputs), pool(targets))

    def noisy(
        self, x: Float[Array, "b ..."], draws: Float[Array, "b ..."], keeps_last: Array | None = None
    ) -> Float[Array, "b ..."]:
        """Return activations with Gaussian noise relative to each image and channel's standard deviation."""
        space = tuple(range(1, x.ndim - 1))
        spread = x.astype(jnp.float32).std(space, keepdims=True) * self.options.noise
        spread *= _corrupts(x, keeps_last)
        # As in `jax.random.normal`, by the inverse of the distribution function.
        normal = jnp.sqrt(2.0) * jax.scipy.special.erfinv(jnp.clip(2 * draws - 1, -_LAST, _LAST))
        return (x + spread * normal).astype(x.dtype)

    def replaced(
        self,
        x: Float[Array, "b ..."],
        vector: Float[Array, "..."],
        share: Float[Array, " b"],
        draws: Float[Array, "b ..."],
        extra: int,
        keeps_last: Array | None = None,
    ) -> Float[Array, "b ..."]:
        """Return activations with a share of their positions replaced: see `Objective.replaced`."""
        share = share.reshape(-1, *[1] * (draws.ndim - 1)) * self.options.replaced
        hit = draws < share * _corrupts(x, keeps_last)[..., 0]
        if extra:
            hit &= (jnp.arange(draws.shape[1]) >= extra)[None]
        return jnp.where(hit[..., None], vector.astype(x.dtype), x)


def _corrupts(x: Float[Array, "b ..."], keeps_last: Array | None) -> Float[Array, "b ..."]:
    """Return 1 for every image but the last of several, or where it is kept, which stays clean; [b, 1, ...]."""
    count = x.shape[0]
    is_hit = jnp.asarray(count == 1) if keeps_last is None else ~keeps_last
    kept = (jnp.arange(count) < count - 1) | is_hit
    return kept.astype(jnp.float32).reshape(count, *[1] * (x.ndim - 1))


def _relative(a: Float[Array, "b ..."], b: Float[Array, "b ..."], eps: float = 1e-6) -> Float[Array, " b"]:
    """Return the mean squared error of each example, relative to the mean square of the second argument."""
    return _squared(a, b) / ((b * b).reshape(b.shape[0], -1).mean(1) + eps)


def _squared(a: Float[Array, "b ..."], b: Float[Array, "b ..."]) -> Float[Array, " b"]:
    return ((a - b) ** 2).reshape(a.shape[0], -1).mean(1)
