"""An encoder with a linear head behind its pooled features, split at any boundary into prefix and suffix."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from dapt_jax.models import layers
from dapt_jax.models.encoder import Encoder, NormMode, get_group
from dapt_jax.models.initial import Tree, init_params

HEAD = "head"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Encoder, pooling (see `pool`) and a dense layer, as pure functions.

    A *boundary* b splits it: the *prefix* is the groups before b, the *suffix* the rest. With b equal to the number of
    encoder groups the prefix includes the pooling and the suffix is the head alone.

    Attributes:
        encoder: the encoder.
        outputs: number of logits.
        dtype: of activations; parameters are float32 always.
        dropout: share of the pooled features that are dropped while training.
    """

    encoder: Encoder
    outputs: int
    dtype: str = "float32"
    dropout: float = 0.0

    @property
    def groups(self) -> tuple[str, ...]:
        """The encoder's groups and the head."""
        return (*self.encoder.groups, HEAD)

    def abstract(self) -> tuple[Tree, Tree]:
        """Shapes and dtypes of parameters and statistics."""
        params, batch_stats = self.encoder.abstract()
        return {**params, HEAD: self._head()}, batch_stats

    def init(self, seed: int) -> tuple[Tree, Tree]:
        """Fresh parameters and statistics from a seed."""
        params, batch_stats = self.abstract()
        return init_params(params, seed), init_params(batch_stats, seed)

    def _head(self) -> Tree:
        kernel = jax.ShapeDtypeStruct((self.encoder.features, self.outputs), jnp.float32)
        return {"kernel": kernel, "bias": jax.ShapeDtypeStruct((self.outputs,), jnp.float32)}

    def prefix(
        self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"], boundary: int
    ) -> Float[Array, "b ..."]:
        """Images (0 to 255) to the activations at `boundary`, with every norm frozen.

        With boundary 0 these are the preprocessed images; at the number of encoder groups, pooled features (b, features).
        """
        return self.between(params, batch_stats, self.encoder.preprocess(images, self.dtype), 0, boundary)

    def between(
        self, params: Tree, batch_stats: Tree, x: Float[Array, "b ..."], start: int, stop: int
    ) -> Float[Array, "b ..."]:
        """Activations at the boundary `start` to those at `stop`, with every norm frozen."""
        if start == stop:
            return x
        x, _ = self.encoder.apply(params, batch_stats, x, start=start, stop=stop)
        return pool(x) if stop == len(self.encoder.groups) else x

    def activations_at_boundaries(
        self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"]
    ) -> list[Float[Array, "b ..."]]:
        """The activations at every boundary, the preprocessed images first, the pooled features last."""
        found = [self.prefix(params, batch_stats, images, 0)]
        for number in range(len(self.encoder.groups)):
            found.append(self.between(params, batch_stats, found[-1], number, number + 1))
        return found

    def suffix(
        self,
        params: Tree,
        batch_stats: Tree,
        x: Float[Array, "b ..."],
        boundary: int,
        norm: NormMode | Mapping[str, NormMode] = "frozen",
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "b outputs"], Tree]:
        """Activations at `boundary` to float32 logits, and the statistics after the pass.

        Without `rng`, nothing is dropped.
        """
        if boundary < len(self.encoder.groups):
            x, batch_stats = self.encoder.apply(params, batch_stats, x, start=boundary, norm=norm, rng=rng)
            x = pool(x)
        if rng is not None:
            x = layers.dropout(x, self.dropout, jax.random.fold_in(rng, len(self.encoder.groups)))
        head = get_group(params, HEAD)
        return x.astype(jnp.float32) @ head["kernel"] + head["bias"], batch_stats

    def __call__(self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"]) -> Float[Array, "b outputs"]:
        """Images (0 to 255) to logits, as at test time."""
        return self.suffix(params, batch_stats, self.prefix(params, batch_stats, images, 0), 0)[0]

    def features(self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"]) -> Float[Array, "b d"]:
        """Images (0 to 255) to pooled features, as at test time."""
        return self.prefix(params, batch_stats, images, len(self.encoder.groups)).astype(jnp.float32)


def pool(x: Float[Array, "b ..."]) -> Float[Array, "b c"]:
    """What an encoder says of an image as a whole, from its last group's output.

    Of a map (b, h, w, c) the average over space, accumulated in float32; of tokens (b, n, c) the first, the class token.
    """
    return x[:, 0] if x.ndim == 3 else x.mean((1, 2), dtype=jnp.float32).astype(x.dtype)
