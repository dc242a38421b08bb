"""Token dropping: views that hold a mask of patches, and a network of which only visible patches are run.

Which patches are visible is a function of the view, like its augmentation. So the activations of a frozen
prefix that runs on the visible patches alone can be cached for K fixed views; new views have new masks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dapt_jax.data.augment import Augment, example_keys
from dapt_jax.models.classifier import HEAD
from dapt_jax.models.initial import Tree
from dapt_jax.models.tokens import mask_of, visible_count, visible_first, without_masked
from dapt_jax.objectives.network import Pretext
from dapt_jax.parameters import BatchNormMode

_FOR_MASK = 64
"""Folded into an example's key for its mask, so that it differs from those of the augmentation."""


@dataclasses.dataclass(frozen=True)
class MaskedViews(Augment):
    """Augmentation whose views consist of an image and of a mask of its patches.

    Attributes:
        token_patch: Side of a patch in pixels.
        mask_ratio: Share of the patches that are masked.
    """

    token_patch: int = dataclasses.field(default=1, kw_only=True)
    mask_ratio: float = dataclasses.field(default=0.75, kw_only=True)

    @classmethod
    def of(cls, augment: Augment, token_patch: int, mask_ratio: float) -> "MaskedViews":
        """Return views whose images are augmented as those of another augmentation."""
        return cls(**_fields(augment), token_patch=token_patch, mask_ratio=mask_ratio)

    @property
    def image(self) -> Augment:
        """The augmentation of the images alone."""
        return Augment(**_fields(self))

    @property
    def is_fixed(self) -> bool:
        """Whether the views of an image are equal: never, since their masks differ."""
        return False

    def __call__(self, images: Any, seed: ArrayLike, view: ArrayLike, index: Any) -> Any:
        """Return `{"image": [b, h, w, c], "mask": [b, n]}`, 1 where masked: see `Augment`."""
        images = self.image(images, seed, view, index)
        patches = (images.shape[1] // self.token_patch) * (images.shape[2] // self.token_patch)
        keys = jax.vmap(lambda key: jax.random.fold_in(key, _FOR_MASK))(example_keys(seed, view, index))
        draws = jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(keys)
        return {"image": images, "mask": mask_of(draws, visible_count(patches, self.mask_ratio))}


def _fields(augment: Augment) -> dict[str, Any]:
    return {field.name: getattr(augment, field.name) for field in dataclasses.fields(Augment)}


def masked_first(x: Float[Array, "b n c"], mask: Float[Array, "b n"]) -> Float[Array, "b n c"]:
    """Return the patches of each image in the order masked, visible; each part in the order of the grid."""
    return visible_first(x, 1 - mask)


def by_position(
    visible: Float[Array, "b v c"], masked: Float[Array, "b m c"], mask: Float[Array, "b n"]
) -> Float[Array, "b n c"]:
    """Return visible and masked patches in the order of the grid: the inverse of `visible_first`."""
    back = jnp.argsort(jnp.argsort(mask, axis=1), axis=1)
    return jnp.take_along_axis(jnp.concatenate([visible, masked], 1), back[..., None], 1)


def patchify(images: Float[Array, "b h w c"], side: int) -> Float[Array, "b n p"]:
    """Return the pixels of the patches of images, row by row.

    Args:
        images: Images whose sides are multiples of `side`.
        side: Side of a patch in pixels.
    """
    batch, height, width, channels = images.shape
    high, wide = height // side, width // side
    cut = images.reshape(batch, high, side, wide, side, channels).swapaxes(2, 3)
    return cut.reshape(batch, high * wide, side * side * channels)


@dataclasses.dataclass(frozen=True)
class MaskedPretext(Pretext):
    """An encoder that runs on the visible patches of a view, with the head of a masking objective.

    Activations at boundary 0 are `image` and `mask` of a view; at all others `tokens` of the visible patches
    (b, e + v, c), after the e tokens that are not patches, `pixels` of the m masked ones (b, m, p), and
    `mask`.
    """

    def prefix(self, params: Tree, batch_stats: Tree, images: Any, boundary: int) -> Any:
        """Compute the activations at `boundary` from a view: see `MaskedViews`."""
        image = self.encoder.preprocess(images["image"], self.dtype)
        return self.between(params, batch_stats, {**images, "image": image}, 0, boundary)

    def between(self, params: Tree, batch_stats: Tree, x: Any, start: int, stop: int) -> Any:
        """Compute the activations at the boundary `stop` from those at `start`."""
        if start == stop:
            return x
        if start == 0:
            x, start = self._embedded(params, batch_stats, x, None), 1
        tokens, _ = self.encoder.apply(params, batch_stats, x["tokens"], start=start, stop=stop)
        return {**x, "tokens": tokens}

    def suffix(
        self,
        params: Tree,
        batch_stats: Tree,
        x: Any,
        boundary: int,
        batch_norm: BatchNormMode | Mapping[str, BatchNormMode] = "frozen",
        rng: jax.Array | None = None,
        keeps_last: jax.Array | None = None,
    ) -> tuple[Any, Tree]:
        """Compute the outputs of the head from activations at `boundary`: see `Pretext.suffix`."""
        del keeps_last  # masks belong to views
        if boundary == 0:
            x, boundary = self._embedded(params, batch_stats, x, rng), 1
        tokens, batch_stats = self.encoder.apply(
            params, batch_stats, x["tokens"], start=boundary, batch_norm=batch_norm, rng=rng
        )
        found = self.objective.outputs(params.get(HEAD, {}), {**x, "tokens": tokens}, self.encoder.as_map)
        return found, batch_stats

    def _embedded(
        self, params: Tree, batch_stats: Tree, x: dict[str, jax.Array], rng: jax.Array | None
    ) -> dict[str, jax.Array]:
        """Return the activations at boundary 1: patches are embedded with positions, and then dropped."""
        tokens, _ = self.encoder.apply(params, batch_stats, x["image"], stop=1, rng=rng)
        pixels, mask = patchify(x["image"], self.encoder.token_patch), x["mask"]
        visible = self.objective.visible(mask.shape[1])
        hidden = masked_first(pixels, mask)[:, : mask.shape[1] - visible]
        return {"tokens": without_masked(tokens, mask, visible), "pixels": hidden, "mask": mask}

    def view(self, images: jax.ShapeDtypeStruct) -> Any:
        """Return the shapes of a view of images [b, h, w, c]."""
        patches = (images.shape[1] // self.encoder.token_patch) ** 2
        return {"image": images, "mask": jax.ShapeDtypeStruct((images.shape[0], patches), "float32")}
