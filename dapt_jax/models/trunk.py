"""An encoder without pooling and head: what a frozen teacher computes."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PyTree

from dapt_jax.models.classifier import Classifier, pool
from dapt_jax.models.initial import Tree


@dataclasses.dataclass(frozen=True)
class Trunk(Classifier):
    """An encoder whose activations at the last boundary are not pooled, but what `reads` names.

    Attributes:
        outputs: Not used; a trunk has no head.
        reads: `last`: the last group's output; `pooled`: the pooled features alone, as `{"pooled": [b, d]}`;
            `map`: both them and the map, as `{"pooled": [b, d], "map": [b, h, w, d]}`.
        side: Side in pixels to which images are resized before its own preprocessing; 0 to take them as they
            are.
    """

    outputs: int = 1
    reads: Literal["last", "pooled", "map"] = "last"
    side: int = 0

    def prefix(
        self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"], boundary: int
    ) -> PyTree[Float[Array, "b ..."]]:
        """Compute the activations at `boundary`, at the last one what `reads` names: see `Classifier`."""
        if self.side and images.shape[1] != self.side:
            shape = (images.shape[0], self.side, self.side, images.shape[3])
            images = jax.image.resize(images.astype(jnp.float32), shape, "linear")
        x = self.encoder.preprocess(images, self.dtype)
        return self.between(params, batch_stats, x, 0, boundary)

    def between(
        self, params: Tree, batch_stats: Tree, x: Float[Array, "b ..."], start: int, stop: int
    ) -> PyTree[Float[Array, "b ..."]]:
        """Compute the activations at the boundary `stop` from those at `start`, with batch norm frozen."""
        if start == stop:
            return x
        x, _ = self.encoder.apply(params, batch_stats, x, start=start, stop=stop)
        if stop < len(self.encoder.groups) or self.reads == "last":
            return x
        found = {"pooled": pool(x)}
        return found if self.reads == "pooled" else {**found, "map": self.encoder.as_map(x)}

    @functools.lru_cache(maxsize=8)  # noqa: B019 - trunks live as long as a study
    def shapes(self, side: int) -> PyTree[jax.ShapeDtypeStruct]:
        """Return the shapes, with a batch of 1, of what it computes from images of a side in pixels."""
        images = jax.ShapeDtypeStruct((1, side, side, self.encoder.channels), jnp.uint8)
        return jax.eval_shape(
            lambda params, stats, x: self.prefix(params, stats, x, len(self.encoder.groups)),
            *self.abstract(),
            images,
        )
