"""An encoder with a linear head on its pooled features, split at any boundary into prefix and suffix."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PyTree

from dapt_jax.models import layers
from dapt_jax.models.encoder import Encoder, get_group
from dapt_jax.models.initial import Tree, init_params
from dapt_jax.parameters import BatchNormMode, Kind

HEAD = "head"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Encoder, global pooling (see `pool`) and a dense layer, as pure functions.

    A *boundary* b splits it: the *prefix* is the groups before b, the *suffix* the rest. With b equal to the
    number of encoder groups the prefix includes the pooling and the suffix is the head alone.

    Attributes:
        encoder: The encoder.
        outputs: Number of logits.
        dtype: Dtype of activations; parameters are always float32.
        dropout: Fraction of the pooled features that are dropped during training.
    """

    encoder: Encoder
    outputs: int
    dtype: str = "float32"
    dropout: float = 0.0

    @property
    def base(self) -> "Classifier":
        """The network without low-rank updates; itself if it has none."""
        plain = self.encoder.base
        return self if plain is self.encoder else dataclasses.replace(self, encoder=plain)

    @property
    def groups(self) -> tuple[str, ...]:
        """The encoder's groups and the head."""
        return (*self.encoder.groups, HEAD)

    @property
    def is_stochastic(self) -> bool:
        """Whether training draws at random, in the encoder or before the head."""
        return self.encoder.is_stochastic or self.dropout > 0

    @functools.cached_property
    def kinds(self) -> dict[str, Kind]:
        """Kind of every parameter and running statistic by path."""
        return {**self.encoder.kinds, f"{HEAD}/kernel": Kind.DENSE_KERNEL, f"{HEAD}/bias": Kind.BIAS}

    def abstract(self) -> tuple[Tree, Tree]:
        """Return shapes and dtypes of parameters and running statistics."""
        params, batch_stats = self.encoder.abstract()
        return {**params, HEAD: self._head()}, batch_stats

    def init(self, seed: int) -> tuple[Tree, Tree]:
        """Return fresh parameters and running statistics from a seed."""
        params, batch_stats = self.abstract()
        return init_params(params, self.kinds, seed), init_params(batch_stats, self.kinds, seed)

    def _head(self) -> Tree:
        kernel = jax.ShapeDtypeStruct((self.encoder.features, self.outputs), jnp.float32)
        return {"kernel": kernel, "bias": jax.ShapeDtypeStruct((self.outputs,), jnp.float32)}

    def prefix(
        self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"], boundary: int
    ) -> Float[Array, "b ..."]:
        """Compute the activations at `boundary` from images (0 to 255), with batch norm frozen.

        With boundary 0 these are the preprocessed images; at the number of encoder groups, pooled features
        (b, features).
        """
        return self.between(params, batch_stats, self.encoder.preprocess(images, self.dtype), 0, boundary)

    def between(
        self, params: Tree, batch_stats: Tree, x: Float[Array, "b ..."], start: int, stop: int
    ) -> Float[Array, "b ..."]:
        """Compute the activations at the boundary `stop` from those at `start`, with batch norm frozen."""
        if start == stop:
            return x
        x, _ = self.encoder.apply(params, batch_stats, x, start=start, stop=stop)
        return pool(x) if stop == len(self.encoder.groups) else x

    def activations_at_boundaries(
        self, params: Tree, batch_stats: Tree, images: PyTree[Num[Array, "b ..."]]
    ) -> list[PyTree[Float[Array, "b ..."]]]:
        """Return the activations at every boundary, from the preprocessed images to the pooled features."""
        activations: list[PyTree[Array]] = [self.prefix(params, batch_stats, images, 0)]
        for number in range(len(self.encoder.groups)):
            activations.append(self.between(params, batch_stats, activations[-1], number, number + 1))
        return activations

    def suffix(
        self,
        params: Tree,
        batch_stats: Tree,
        x: Float[Array, "b ..."],
        boundary: int,
        batch_norm: BatchNormMode | Mapping[str, BatchNormMode] = "frozen",
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "b outputs"], Tree]:
        """Compute float32 logits and updated running statistics from the activations at `boundary`.

        Args:
            params: Nested dict of parameters.
            batch_stats: Nested dict of running statistics.
            x: Activations at `boundary`.
            boundary: Index of the first group to run.
            batch_norm: One mode for all groups, or one per group name (groups not named are frozen).
            rng: PRNG key of dropout, stochastic depth and patch dropout; None disables all.
        """
        if boundary < len(self.encoder.groups):
            x, batch_stats = self.encoder.apply(
                params, batch_stats, x, start=boundary, batch_norm=batch_norm, rng=rng
            )
            x = pool(x)
        if rng is not None:
            x = layers.dropout(x, self.dropout, jax.random.fold_in(rng, len(self.encoder.groups)))
        head = get_group(params, HEAD)
        return x.astype(jnp.float32) @ head["kernel"] + head["bias"], batch_stats

    def __call__(
        self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"]
    ) -> Float[Array, "b outputs"]:
        """Compute logits from images (0 to 255), as at test time."""
        return self.suffix(params, batch_stats, self.prefix(params, batch_stats, images, 0), 0)[0]

    def features(self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"]) -> Float[Array, "b d"]:
        """Compute pooled features from images (0 to 255), as at test time."""
        return self.prefix(params, batch_stats, images, len(self.encoder.groups)).astype(jnp.float32)


def pool(x: Float[Array, "b ..."]) -> Float[Array, "b c"]:
    """Apply global pooling to the last feature map.

    For a map (b, h, w, c): the average over space, accumulated in float32; for tokens (b, n, c): the class
    token, which is the first.
    """
    return x[:, 0] if x.ndim == 3 else x.mean((1, 2), dtype=jnp.float32).astype(x.dtype)
