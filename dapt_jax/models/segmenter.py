"""An encoder with a decoder that labels every pixel, split at any boundary into prefix and suffix as `Classifier` is."""

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
from dapt_jax.models.encoder import Encoder, NormMode, copy_along, get_group, put_group
from dapt_jax.models.initial import Tree, init_params
from dapt_jax.models.resize import bilinear

Activations = dict[str, Any]
"""What lies at a boundary: `x`, the output of the group before it, and `skips`, the maps that groups behind it read.

Nothing else: there is no `x` where the group behind reads `skips` alone.

A pytree of arrays, batch first: it can be kept, and the suffix be run from it.
"""


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """Encoder, decoder and a convolution to logits of every pixel, as pure functions.

    A *boundary* b splits it: the *prefix* is the groups before b, the *suffix* the rest. Boundaries inside the encoder and
    inside the decoder are alike.

    Attributes:
        encoder: the encoder, up to its last level.
        outputs: number of logits of a pixel.
        decoder: `unet`, `attention_unet`, `swin_unet` or `upernet`; see `decoders`.
        dtype: of activations; parameters are float32 always.
    """

    encoder: Encoder
    outputs: int
    decoder: str = "unet"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        # What lies behind the last level (EfficientNet's 1x1 convolution on top, a transformer's last norm) serves
        # classification alone.
        object.__setattr__(self, "encoder", self.encoder.feature_trunk)
        if self.decoder not in decoders.BUILDERS:
            raise UserError(f"no decoder {self.decoder!r}; {nearest(self.decoder, decoders.BUILDERS)}")

    @functools.cached_property
    def _decoder(self) -> decoders.Decoder:
        return decoders.BUILDERS[self.decoder](self.encoder)

    @property
    def groups(self) -> tuple[str, ...]:
        """The encoder's groups, the decoder's and the head."""
        return (*self.encoder.groups, *(step.name for step in self._decoder.steps), HEAD)

    @functools.cached_property
    def _parts(self) -> dict[str, decoders.Part]:
        decoder = self._decoder
        make = functools.partial(decoders.Head, decoder.features, self.outputs, decoder.head_size)
        return {step.name: decoders.Part.of(step) for step in (*decoder.steps, decoders.Step(HEAD, make))}

    def abstract(self) -> tuple[Tree, Tree]:
        """Shapes and dtypes of parameters and statistics."""
        params, batch_stats = self.encoder.abstract()
        for name, part in self._parts.items():
            put_group(params, name, part.params)
            put_group(batch_stats, name, part.batch_stats)
        return params, batch_stats

    def init(self, seed: int) -> tuple[Tree, Tree]:
        """Fresh parameters and statistics from a seed."""
        params, batch_stats = self.abstract()
        return init_params(params, seed), init_params(batch_stats, seed)

    def adopt(self, own: Tree, encoder: Tree) -> Tree:
        """Parameters (or statistics) with those of an encoder, such as a checkpoint's, in the encoder's place.

        Args:
            own: of the segmenter.
            encoder: of the encoder; a classification head and groups behind the last level are left out.
        """
        found: Tree = {}
        for name in self.groups:
            put_group(found, name, get_group(encoder if name in self.encoder.groups else own, name))
        return found

    def _wanted(self, boundary: int) -> set[str]:
        """Names of the maps that the groups from `boundary` on read."""
        first = max(boundary - len(self.encoder.groups), 0)
        return {skip for step in self._decoder.steps[first:] for skip in step.skips}

    def prefix(self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"], boundary: int) -> Activations:
        """Images (0 to 255) to the activations at `boundary`, with every norm frozen.

        With boundary 0 these are the preprocessed images and no skips.

        Raises:
            UserError: a side of the images is not a multiple of the decoder's unit.
        """
        self._check_size(images.shape[1:3])
        x: Activations = {"x": self.encoder.preprocess(images, self.dtype), "skips": {}}
        return self.between(params, batch_stats, x, 0, boundary)

    def between(self, params: Tree, batch_stats: Tree, x: Activations, start: int, stop: int) -> Activations:
        """Activations at the boundary `start` to those at `stop`, with every norm frozen."""
        return self._run(params, batch_stats, x, start, stop, "frozen", None)[0]

    def activations_at_boundaries(
        self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"]
    ) -> list[Activations]:
        """The activations at every boundary up to the head's, the preprocessed images first."""
        found = [self.prefix(params, batch_stats, images, 0)]
        for number in range(len(self.groups) - 1):
            found.append(self.between(params, batch_stats, found[-1], number, number + 1))
        return found

    def suffix(
        self,
        params: Tree,
        batch_stats: Tree,
        x: Activations,
        boundary: int,
        norm: NormMode | Mapping[str, NormMode] = "frozen",
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "b h w outputs"], Tree]:
        """Activations at `boundary` to float32 logits at the size of the images, and the statistics after the pass.

        Without `rng`, nothing is dropped.
        """
        state, batch_stats = self._run(params, batch_stats, x, boundary, len(self.groups), norm, rng)
        return state["x"], batch_stats

    def __call__(self, params: Tree, batch_stats: Tree, images: Num[Array, "b h w c"]) -> Float[Array, "b h w outputs"]:
        """Images (0 to 255) to logits, as at test time."""
        return self.suffix(params, batch_stats, self.prefix(params, batch_stats, images, 0), 0)[0]

    def _run(
        self,
        params: Tree,
        batch_stats: Tree,
        state: Activations,
        start: int,
        stop: int,
        norm: NormMode | Mapping[str, NormMode],
        rng: jax.Array | None,
    ) -> tuple[Activations, Tree]:
        """Runs the groups `start` to `stop` (exclusive) on the activations at `start`."""
        last = len(self.encoder.groups)
        x: Any = state.get("x")
        skips = state["skips"]
        if start < last:
            x, maps, batch_stats = self.encoder.run(
                params, batch_stats, x, start=start, stop=min(stop, last), norm=norm, rng=rng
            )
            skips = skips | maps
        for index in range(max(start, last), stop):
            name = self.groups[index]
            mode = norm if isinstance(norm, str) else norm.get(name, "frozen")
            part = self._parts[name]
            read = [skips[skip] for skip in part.step.skips]
            x, changed = part(get_group(params, name), get_group(batch_stats, name), x, read, mode)
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
                f"images of {sides[0]} x {sides[1]} pixels: {self.encoder.name!r} with the decoder {self.decoder!r} takes "
                f"sides that are multiples of {unit}, such as {below[0]} x {below[1]}"
            )
