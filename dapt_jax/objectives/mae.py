"""Masked autoencoding: the pixels of dropped patches from the patches that the encoder saw."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dapt_jax.data.augment import Augment
from dapt_jax.errors import UserError
from dapt_jax.fields import check_fields, setting
from dapt_jax.models.encoder import DEFAULT, Encoder, LayerGroup, Tree
from dapt_jax.models.encoders import vit
from dapt_jax.models.layers import StochasticDepth
from dapt_jax.models.tokens import visible_count
from dapt_jax.objectives.base import AsMap, HeadParameters, Objective, dense, dense_parameters, normalised
from dapt_jax.objectives.masking import MaskedViews, by_position, masked_first
from dapt_jax.parameters import Kind
from dapt_jax.weights.paths import flatten

HEAD_WIDTH = 32
"""Channels of each attention head of the decoder."""

FREQUENCY_BASE = 10_000.0
"""Ratio of the longest to the shortest wavelength of the decoder's positions."""


@dataclasses.dataclass(frozen=True)
class MaeSettings:
    """Masks and decoder: the section `adapt.mae`.

    Attributes:
        mask_ratio: Share of the patches that are dropped, and whose pixels are predicted.
        norm_pix_loss: Whether the pixels of each patch are normalised by their own mean and deviation.
        decoder_embed_dim: Channels of the decoder, a multiple of 32.
        decoder_depth: Blocks of the decoder.
    """

    mask_ratio: float = setting(
        0.75, above=0, below=1, doc="Share of the patches that are dropped and predicted."
    )
    norm_pix_loss: bool = setting(
        True, doc="Whether the pixels of a patch are normalised by their mean and deviation before the loss."
    )
    decoder_embed_dim: int = setting(
        192, at_least=HEAD_WIDTH, doc="Channels of the decoder, a multiple of 32."
    )
    decoder_depth: int = setting(2, at_least=1, doc="Blocks of the decoder, which is thrown away.")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.decoder_embed_dim % HEAD_WIDTH:
            near = round(self.decoder_embed_dim / HEAD_WIDTH) * HEAD_WIDTH
            raise UserError(
                f"adapt.mae.decoder_embed_dim is {self.decoder_embed_dim}; expected a multiple of "
                f"{HEAD_WIDTH}, such as {near}"
            )


@dataclasses.dataclass(frozen=True)
class MaskedAutoencoder(Objective):
    """Mean squared error between predicted and true pixels of the masked patches (MAE, arXiv 2111.06377).

    The encoder sees the visible patches alone. The decoder sees its tokens, a learnt vector in the place of
    each masked one, and fixed sine-cosine positions. See `masking.MaskedPretext` for the network.
    """

    name: ClassVar[str] = "mae"
    is_masking: ClassVar[bool] = True

    options: MaeSettings = MaeSettings()

    @property
    def decoder(self) -> Encoder:
        """Transformer blocks and a layer norm."""
        return _decoder(self.options.decoder_embed_dim, self.options.decoder_depth)

    def views(self, augment: Augment, encoder: Encoder) -> Augment:
        """Return augmentation whose views consist of an image and of the mask of its patches."""
        return MaskedViews.of(augment, encoder.token_patch, self.options.mask_ratio)

    def visible(self, patches: int) -> int:
        """Return how many patches of a view the encoder sees."""
        return visible_count(patches, self.options.mask_ratio)

    def head(self, encoder: Encoder) -> HeadParameters:
        """Return the decoder, with dense layers before and after it, and the vector of masked patches."""
        shapes, kinds = flatten(self.decoder.abstract()[0]), self.decoder.kinds
        width, pixels = self.options.decoder_embed_dim, encoder.token_patch**2 * encoder.channels
        return {
            **dense_parameters("embed", encoder.features, width),
            "mask_token": ((width,), Kind.TOKEN),
            **{f"decoder/{path}": (leaf.shape, kinds[path]) for path, leaf in shapes.items()},
            **dense_parameters("predict", width, pixels),
        }

    def outputs(
        self, head: Tree, x: dict[str, Float[Array, "b ..."]], as_map: AsMap
    ) -> dict[str, Float[Array, "b m p"]]:
        """Return predicted pixels of the masked patches, and the true ones.

        Args:
            head: Parameters of the head.
            x: `tokens` of the encoder (b, e + v, c), of which e are not patches; `pixels` of the m masked
                patches (b, m, p); and the `mask` of all v + m patches (b, n), 1 where masked.
            as_map: Not used.
        """
        del as_map
        pixels, mask = jax.lax.stop_gradient((x["pixels"], x["mask"]))
        batch, masked = pixels.shape[:2]
        side = round(mask.shape[1] ** 0.5)
        embedded = dense(head["embed"], x["tokens"])
        extra, visible = jnp.split(embedded, [embedded.shape[1] + masked - mask.shape[1]], 1)
        width = self.options.decoder_embed_dim
        hidden = jnp.broadcast_to(head["mask_token"], (batch, masked, width))
        patches = by_position(visible, hidden, mask) + sine_cosine(side, width)
        decoded, _ = self.decoder.apply(head["decoder"], {}, jnp.concatenate([extra, patches], 1))
        wanted = masked_first(decoded[:, extra.shape[1] :], mask)[:, :masked]
        return {"predicted": dense(head["predict"], wanted), "pixels": pixels.astype(jnp.float32)}

    def losses(
        self, outputs: dict[str, Float[Array, "b m p"]], targets: Array, weights: Float[Array, " b"]
    ) -> Float[Array, " b"]:
        """Return the mean over the masked patches of each image of the mean squared error of their pixels."""
        del targets, weights
        pixels = normalised(outputs["pixels"]) if self.options.norm_pix_loss else outputs["pixels"]
        return ((outputs["predicted"] - pixels) ** 2).mean((1, 2))


@functools.cache
def _decoder(width: int, depth: int) -> Encoder:
    size = vit.Size(width, depth, width // HEAD_WIDTH)
    block = functools.partial(vit.Block, vit.MAE, size, DEFAULT, StochasticDepth())
    blocks = [LayerGroup(f"block{number}", block, width, 1) for number in range(1, depth + 1)]
    top = LayerGroup("top", functools.partial(vit.Top, width, vit.MAE.eps), width, 1)
    return Encoder("mae_decoder", [*blocks, top], preprocess=vit.MAE.preprocess)


@functools.cache
def sine_cosine(side: int, width: int) -> np.ndarray:
    """Return fixed positions of a square grid row by row, float32 (side squared, width).

    Half of the channels hold sines and cosines of the column, half those of the row (MAE, section 3).

    >>> sine_cosine(2, 8).round(2)[1].tolist()
    [0.84, 0.01, 0.54, 1.0, 0.0, 0.0, 1.0, 1.0]

    Args:
        side: Side of the grid.
        width: Number of channels, a multiple of 4.
    """
    frequencies = FREQUENCY_BASE ** -(np.arange(width // 4) / (width // 4))
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    angles = [at.reshape(-1, 1) * frequencies for at in (columns, rows)]
    return np.concatenate([turn(each) for each in angles for turn in (np.sin, np.cos)], 1).astype(np.float32)
