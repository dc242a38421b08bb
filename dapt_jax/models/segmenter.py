"""An encoder with a decoder that labels every pixel, split at any boundary like `Classifier`."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from dapt_jax.errors import UserError, nearest
from dapt_jax.models import decoders
from dapt_jax.models.classifier import HEAD
from dapt_jax.models.encoder import Encoder, copy_along, get_group, put_group
from dapt_jax.models.initial import Tree, init_params
from dapt_jax.models.resize import bilinear
from dapt_jax.parameters import BatchNormMode, Kind

Activations = dict[str, Any]
"""Activations at a boundary: `x`, the output of the previous group; `skips`, maps that later groups read.

`x` is absent where the next group reads only `skips`. A pytree of arrays, batch first: it can be cached, and
the suffix can be run from it.
"""


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """Encoder, decoder and a convolution to per-pixel logits, as pure functions.

    A *boundary* b splits it: the *prefix* is the groups before b, the *suffix* the rest. A boundary may lie
    inside the encoder or inside the decoder.

    Attributes:
        encoder: The encoder, up to its last pyramid level.
        outputs: Number of logits per pixel.
        decoder: Name of the decoder, a key of `decoders.BUILDERS`.
        dtype: Dtype of activations; parameters are always float32.
    """

    encoder: Encoder
    outputs: int
    decoder: str = "unet"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.encoder.pyramid_levels:
            raise UserError(
                f"model {self.encoder.name!r} truncated after {self.encoder.groups[-1]!r} has no feature map for a "
                "decoder; expected one more layer group or a later one"
            )
        # Layers after the last pyramid level (EfficientNet's final 1x1 convolution, a transformer's last
        # layer norm) serve only classification.
        object.__setattr__(self, "encoder", self.encoder.feature_trunk)
        if self.decoder not in decoders.BUILDERS:
            raise UserError(f"no decoder {self.decoder!r}; {nearest(self.decoder, decoders.BUILDERS)}")

    @functools.cached_property
    def _decoder(self) -> decoders.Decoder:
        return decoders.BUILDERS[self.decoder](self.encoder)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of the encoder, the decoder and the head."""
        return (*self.encoder.groups, *(step.name for step in self._decoder.steps), HEAD)

    @property
    def is_stochastic(self) -> bool:
        """Whether a layer group of the encoder or the decoder draws at random."""
        of_decoder = any(step.is_stochastic for step in self._decoder.steps)
        return of_decoder or any(spec.is_stochastic for spec in self.encoder.specs)

    @property
    def _parts(self) -> dict[str, decoders.Part]:
        return _parts_of(self)

    def _make_parts(self) -> dict[str, decoders.Part]:
        decoder = self._decoder
        make = functools.partial(
            decoders.Head, decoder.features, self.outputs, decoder.head_size, decoder.head_bias
        )
        return {step.name: decoders.Part.of(step) for step in (*decoder.steps, decoders.Step(HEAD, make))}

    @functools.cached_property
    def kinds(self) -> dict[str, Kind]:
        """Kind of every parameter and running statistic by path."""
        own = {path: kind for part in self._parts.values() for path, kind in part.kinds.items()}
        return {**self.encoder.kinds, **own}

    def abstract(self) -> tuple[Tree, Tree]:
        """Return shapes and dtypes of parameters and running statistics."""
        params, batch_stats = self.encoder.abstract()
        for name, part in self._parts.items():
            put_group(params, name, part.params)
            put_group(batch_stats, name, part.batch_stats)
        return params, batch_stats

    def init(self, seed: int) -> tuple[Tree, Tree]:
        """Return fresh parameters and running statistics from a seed."""
        params, batch_stats = self.abstract()
        return init_params(params, self.kinds, seed), init_params(batch_stats, self.kinds, seed)

    def adopt(self, own: Tree, encoder: Tree) -> Tree:
        """Replace the encoder's parameters (or statistics) by those of another encoder, e.g. a checkpoint.

        Args:
            own: Parameters of the segmenter.
            encoder: Parameters of the encoder; a classification head and groups after the last pyramid level
                are left out.
        """
        found: Tree = {}
        for name in self.groups:
            put_group(found, name, get_group(encoder if name in self.encoder.groups else own, name))
        return found

    def _wanted(self, boundary: int) -> set[str]:
        """Return the names of the maps that the groups from `boundary` onwards read."""
        first = max(boundary - len(self.encoder.groups), 0)
        return {skip for step in self._decoder.steps[first:] for skip in step.skips}

    def prefix(
        self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"], boundary: int
    ) -> Activations:
        """Compute the activations at `boundary` from images (0 to 255), with batch norm frozen.

        With boundary 0 these are the preprocessed images and no skips.

        Raises:
            UserError: A side of the images is not a multiple of the decoder's unit.
        """
        self._check_size(images.shape[1:3])
        x: Activations = {"x": self.encoder.preprocess(images, self.dtype), "skips": {}}
        return self.between(params, batch_stats, x, 0, boundary)

    def between(self, params: Tree, batch_stats: Tree, x: Activations, start: int, stop: int) -> Activations:
        """Compute the activations at the boundary `stop` from those at `start`, with batch norm frozen."""
        return self._run(params, batch_stats, x, start, stop, "frozen", None)[0]

    def activations_at_boundaries(
        self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"]
    ) -> list[Activations]:
        """Return the activations at every boundary up to the head's, the preprocessed images first."""
        activations = [self.prefix(params, batch_stats, images, 0)]
        for number in range(len(self.groups) - 1):
            activations.append(self.between(params, batch_stats, activations[-1], number, number + 1))
        return activations

    def suffix(
        self,
        params: Tree,
        batch_stats: Tree,
        x: Activations,
        boundary: int,
        batch_norm: BatchNormMode | Mapping[str, BatchNormMode] = "frozen",
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "b h w outputs"], Tree]:
        """Compute float32 logits at the size of the images from the activations at `boundary`.

        Returns the logits and the running statistics after the pass. The arguments are those of
        `Classifier.suffix`.
        """
        state, batch_stats = self._run(params, batch_stats, x, boundary, len(self.groups), batch_norm, rng)
        return state["x"], batch_stats

    def __call__(
        self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"]
    ) -> Float[Array, "b h w outputs"]:
        """Compute logits from images (0 to 255), as at test time."""
        return self.suffix(params, batch_stats, self.prefix(params, batch_stats, images, 0), 0)[0]

    def _run(
        self,
        params: Tree,
        batch_stats: Tree,
        state: Activations,
        start: int,
        stop: int,
        batch_norm: BatchNormMode | Mapping[str, BatchNormMode],
        rng: jax.Array | None,
    ) -> tuple[Activations, Tree]:
        """Run the groups `start` to `stop` (exclusive) on the activations at `start`."""
        last = len(self.encoder.groups)
        x: Any = state.get("x")
        skips = state["skips"]
        if start < last:
            x, maps, batch_stats = self.encoder.run(
                params, batch_stats, x, start=start, stop=min(stop, last), batch_norm=batch_norm, rng=rng
            )
            skips = skips | maps
        for index in range(max(start, last), stop):
            name = self.groups[index]
            mode = batch_norm if isinstance(batch_norm, str) else batch_norm.get(name, "frozen")
            part = self._parts[name]
            read = [skips[skip] for skip in part.step.skips]
            key = jax.random.fold_in(rng, index) if rng is not None and part.step.is_stochastic else None
            x, changed = part(get_group(params, name), get_group(batch_stats, name), x, read, mode, key)
            if changed:
                batch_stats = copy_along(batch_stats, name)
                put_group(batch_stats, name, changed)
            if part.step.emits:
                skips = {**skips, part.step.emits: x}
        if stop == len(self.groups):
            scale = self._decoder.reduction
            x = bilinear(x.astype(jnp.float32), (x.shape[1] * scale, x.shape[2] * scale))
        wanted = self._wanted(stop)
        after: Activations = {"skips": {name: skip for name, skip in skips.items() if name in wanted}}
        behind = self.groups[stop] if last <= stop < len(self.groups) else None
        if behind is None or self._parts[behind].step.has_input:
            after["x"] = x
        return after, batch_stats

    def _check_size(self, sides: tuple[int, ...]) -> None:
        unit = self._decoder.unit
        if any(side % unit for side in sides):
            below = [max(side // unit, 1) * unit for side in sides]
            raise UserError(
                f"images of {sides[0]} x {sides[1]} pixels: {self.encoder.name!r} with the decoder "
                f"{self.decoder!r} takes sides that are multiples of {unit}, such as {below[0]} x {below[1]}"
            )


@functools.lru_cache(maxsize=64)
def _parts_of(segmenter: Segmenter) -> dict[str, decoders.Part]:
    """Return the parts of a segmenter, made once for all equal ones: every fold and seed makes its own."""
    return segmenter._make_parts()
