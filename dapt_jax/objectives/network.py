"""An encoder with the head of a label-free objective, which is thrown away."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PyTree

from dapt_jax.models.classifier import HEAD, pool
from dapt_jax.models.encoder import put_group
from dapt_jax.models.initial import Tree, init_params
from dapt_jax.models.trunk import Trunk
from dapt_jax.objectives.base import Objective
from dapt_jax.ops.normalisation import current_groups
from dapt_jax.parameters import BatchNormMode, Kind

POSITION = "position"
"""Part of a head that holds the vectors that replace positions, one by boundary."""


@dataclasses.dataclass(frozen=True)
class Pretext(Trunk):
    """An encoder with the head of a label-free objective.

    Attributes:
        objective: The objective, which defines the head and how activations are corrupted.
        boundaries: Boundaries at which a phase corrupts activations; each has a learnt vector.
    """

    objective: Objective = dataclasses.field(kw_only=True)
    boundaries: tuple[int, ...] = ()

    @functools.cached_property
    def _head_parameters(self) -> dict[str, tuple[tuple[int, ...], Kind]]:
        """Shape and kind of every parameter of the head, by its path below `head`."""
        found = dict(self.objective.head(self.encoder))
        if self.objective.is_corrupting:
            found |= {f"{POSITION}/{b}": ((self._channels(b),), Kind.BIAS) for b in self.boundaries}
        return found

    def _channels(self, boundary: int) -> int:
        if boundary == 0 and not self._embeds_tokens:
            return self.encoder.channels
        return self.encoder.specs[max(boundary, 1) - 1].features

    @functools.cached_property
    def _embeds_tokens(self) -> bool:
        """Whether the first group turns an image into tokens."""
        side = self.encoder.image_size
        image = jax.ShapeDtypeStruct((1, side, side, self.encoder.channels), jnp.float32)
        x, _ = jax.eval_shape(
            lambda p, s, i: self.encoder.apply(p, s, i, stop=1), *self.encoder.abstract(), image
        )
        return x.ndim == 3

    @functools.cached_property
    def kinds(self) -> dict[str, Kind]:
        """Kind of every parameter and running statistic by path."""
        return {
            **self.encoder.kinds,
            **{f"{HEAD}/{path}": kind for path, (_, kind) in self._head_parameters.items()},
        }

    def _head(self) -> Tree:
        head: Tree = {}
        for path, (shape, _) in self._head_parameters.items():
            put_group(head, path, jax.ShapeDtypeStruct(shape, jnp.float32))  # type: ignore[arg-type]
        return head

    def init_head(self, seed: int) -> Tree:
        """Return initial parameters of the head, `{"head": ...}`."""
        return init_params({HEAD: self._head()}, self.kinds, seed)

    def suffix(
        self,
        params: Tree,
        batch_stats: Tree,
        x: Any,
        boundary: int,
        batch_norm: BatchNormMode | Mapping[str, BatchNormMode] = "frozen",
        rng: jax.Array | None = None,
        keeps_last: Array | None = None,
    ) -> tuple[PyTree[Float[Array, "b ..."]], Tree]:
        """Compute the outputs of the head and updated running statistics from activations at `boundary`.

        Args:
            params: Nested dict of parameters.
            batch_stats: Nested dict of running statistics.
            x: Activations at `boundary`; a pair of them for an objective of two views.
            boundary: Index of the first group to run.
            batch_norm: See `Classifier.suffix`.
            rng: PRNG key of the corruption, dropout, stochastic depth and patch dropout; None disables all.
            keeps_last: Of a part of a batch, whether it holds the batch's last image: see `Objective.noisy`.
        """
        if self.objective.is_paired:
            x = jax.tree.map(_joined, *x)
        if rng is not None and self.objective.is_corrupting:
            x, boundary = self.corrupted(params, batch_stats, x, boundary, rng, keeps_last, rng=rng)
        if boundary < len(self.encoder.groups):
            x, batch_stats = self.encoder.apply(
                params, batch_stats, x, start=boundary, batch_norm=batch_norm, rng=rng
            )
        if self.objective.is_paired:
            x = _one_after_the_other(x)
        return self.objective.outputs(params.get(HEAD, {}), x, self.encoder.as_map), batch_stats

    def corrupted(
        self,
        params: Tree,
        batch_stats: Tree,
        x: Float[Array, "b ..."],
        boundary: int,
        key: jax.Array,
        keeps_last: Array | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "b ..."], int]:
        """Return corrupted activations, and their boundary.

        From pixels of a transformer, noise is added to the pixels, and tokens are replaced after the patch
        embedding and before the positions (arXiv 2405.00117); elsewhere both happen at the boundary.

        Args:
            params: Nested dict of parameters.
            batch_stats: Nested dict of running statistics.
            x: Activations at `boundary`.
            boundary: Index of the first group to run.
            key: PRNG key of the corruption.
            keeps_last: See `suffix`.
            rng: PRNG key of dropout in the patch embedding; None for none, as at test time.
        """
        vector, batch = params[HEAD][POSITION][str(boundary)], x.shape[0]
        is_embedding = boundary == 0 and self._embeds_tokens
        positions = x.shape[1:-1]
        if is_embedding:  # the tokens of a blank image are the positions, and the bias of the embedding
            blank, _ = self.encoder.apply(params, batch_stats, jnp.zeros_like(x[:1]), stop=1)
            vector, positions = blank + vector, blank.shape[1:-1]
        # All draws at once: compilers take seconds for each.
        draws = jax.random.uniform(key, (batch, x[0].size + 1 + math.prod(positions)))
        for_noise, for_share, for_positions = jnp.split(draws, (x[0].size, x[0].size + 1), axis=1)
        x = self.objective.noisy(x, for_noise.reshape(x.shape), keeps_last)
        if is_embedding:
            x, _ = self.encoder.apply(params, batch_stats, x, stop=1, rng=rng)
            boundary = 1
        extra = 0
        if x.ndim == 3:
            grid = jax.eval_shape(self.encoder.as_map, x).shape
            extra = x.shape[1] - math.prod(grid[1:3])
        for_positions = for_positions.reshape(batch, *positions)
        x = self.objective.replaced(x, vector, for_share[:, 0], for_positions, extra, keeps_last)
        return x, boundary

    def features(self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"]) -> Float[Array, "b d"]:
        """Compute pooled features from images (0 to 255), as at test time."""
        return pool(self.prefix(params, batch_stats, images, len(self.encoder.groups))).astype(jnp.float32)


def _joined(one: Float[Array, "b ..."], other: Float[Array, "b ..."]) -> Float[Array, "b2 ..."]:
    """Return both views of a batch as one, in which each group of batch norm holds both views of its own images."""
    if (groups := current_groups()) == 1:
        return jnp.concatenate([one, other])
    parts = [view.reshape(groups, -1, *view.shape[1:]) for view in (one, other)]
    return jnp.concatenate(parts, 1).reshape(-1, *one.shape[1:])


def _one_after_the_other(x: Float[Array, "b2 ..."]) -> Float[Array, "b2 ..."]:
    """Return a batch of `_joined` with all first views before all second ones."""
    if (groups := current_groups()) == 1:
        return x
    return x.reshape(groups, 2, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
