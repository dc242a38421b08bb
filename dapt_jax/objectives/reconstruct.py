"""Reconstruction of the starting weights' own features from corrupted activations."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dapt_jax.fields import check_fields, setting
from dapt_jax.models.classifier import pool
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.models.layers import gelu
from dapt_jax.objectives.base import AsMap, HeadParameters, Objective, dense, dense_parameters, normalised
from dapt_jax.parameters import Kind

LAYER_SCALE = 1e-5
"""Initial factor of the head's residual branch."""


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

    Of each image, a share of the positions drawn from U(0, `replaced`) is replaced, and noise is added; the
    last image of a batch stays clean. Target: the starting weights' last output for the clean image. With a
    transformer that trains from its first group this is Token Reconstruction (arXiv 2405.00117). Maps of
    convolutional networks are not normed as tokens are: their error is divided by the mean square of the
    image's target, and that of the pooled vector, likewise relative, is added.

    Attributes:
        noise: See `ReconstructSettings`.
        replaced_share: See `ReconstructSettings.replaced`.
    """

    name: ClassVar[str] = "reconstruct"
    is_corrupting: ClassVar[bool] = True
    has_own_teacher: ClassVar[bool] = True

    noise: float = 0.2
    replaced_share: float = 1 / 3

    def head(self, encoder: Encoder) -> HeadParameters:
        """Return a residual branch: layer norm, dense, GELU, dense, layer scale."""
        width = encoder.features
        return {
            "norm/scale": ((width,), Kind.LAYER_NORM_SCALE),
            "norm/bias": ((width,), Kind.LAYER_NORM_BIAS),
            **dense_parameters("dense1", width, width),
            **dense_parameters("dense2", width, width),
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

    def noisy(self, x: Float[Array, "b ..."], key: jax.Array) -> Float[Array, "b ..."]:
        """Return activations with Gaussian noise relative to each image and channel's standard deviation."""
        space = tuple(range(1, x.ndim - 1))
        spread = x.astype(jnp.float32).std(space, keepdims=True) * self.noise * _corrupts(x)
        return (x + spread * jax.random.normal(key, x.shape)).astype(x.dtype)

    def replaced(
        self, x: Float[Array, "b ..."], vector: Float[Array, "..."], key: jax.Array, extra: int
    ) -> Float[Array, "b ..."]:
        """Return activations with a share of their positions replaced; the `extra` first tokens are not."""
        for_share, for_positions = jax.random.split(key)
        positions = x.shape[:-1]
        one_each = (positions[0], *[1] * (len(positions) - 1))
        share = jax.random.uniform(for_share, one_each, maxval=self.replaced_share)
        hit = jax.random.uniform(for_positions, positions) < share * _corrupts(x)[..., 0]
        if extra:
            hit &= (jnp.arange(positions[1]) >= extra)[None]
        return jnp.where(hit[..., None], vector.astype(x.dtype), x)


def _corrupts(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Return 1 for every image but the last of several, which stays clean; [b, 1, ...]."""
    count = x.shape[0]
    kept = (jnp.arange(count) < count - 1) | (count == 1)
    return kept.astype(jnp.float32).reshape(count, *[1] * (x.ndim - 1))


def _relative(a: Float[Array, "b ..."], b: Float[Array, "b ..."], eps: float = 1e-6) -> Float[Array, " b"]:
    """Return the mean squared error of each example, relative to the mean square of the second argument."""
    return _squared(a, b) / ((b * b).reshape(b.shape[0], -1).mean(1) + eps)


def _squared(a: Float[Array, "b ..."], b: Float[Array, "b ..."]) -> Float[Array, " b"]:
    return ((a - b) ** 2).reshape(a.shape[0], -1).mean(1)
