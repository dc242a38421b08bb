"""Self-attention and the MLP of a transformer's block (Vaswani et al., arXiv 1706.03762)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.models.layers import Dense, dropout
from dapt_jax.ops import attention, gelu


class Attention(nnx.Module):
    """Multi-head self-attention; queries, keys and values are one dense layer. The softmax is in float32."""

    def __init__(self, features: int, heads: int, *, qkv_bias: bool = True):
        self.qkv = Dense(features, 3 * features, bias=qkv_bias)
        self.project = Dense(features, features)
        self.heads = heads

    def __call__(
        self,
        x: Float[Array, "b n c"],
        *,
        rotation: tuple[np.ndarray, np.ndarray] | None = None,
        bias: Float[Array, "#b h n n"] | None = None,
    ) -> Float[Array, "b n c"]:
        """Attend from every token to every token.

        Args:
            x: Tokens.
            rotation: Cosine and sine (m, features / heads) that rotate queries and keys of the last m tokens.
            bias: Summand of the scores of every head before the softmax.
        """
        batch, count, features = x.shape
        heads = (batch, count, self.heads, features // self.heads)
        # The gradient of a split is one concatenation, that of three slices three padded copies and two sums.
        q, k, v = (part.reshape(heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        if rotation is not None:
            q, k = _rotate(q, rotation), _rotate(k, rotation)
        y = attention(q, k, v, None if bias is None else bias.astype(x.dtype))
        return self.project(y.reshape(batch, count, features))


def _rotate(x: Float[Array, "b n h d"], rotation: tuple[np.ndarray, np.ndarray]) -> Float[Array, "b n h d"]:
    """Apply rotary position embedding (Su et al., arXiv 2104.09864) to the last tokens."""
    cos, sin = (jnp.asarray(part[:, None], x.dtype) for part in rotation)
    still, moved = jnp.split(x, [x.shape[1] - len(cos)], 1)
    first, second = jnp.split(moved, 2, -1)
    turned = moved * cos + jnp.concatenate([-second, first], -1) * sin
    return jnp.concatenate([still, turned], 1)


class Mlp(nnx.Module):
    """Two dense layers, the first four times as wide, with GELU between."""

    def __init__(self, features: int, drop: float):
        self.expand = Dense(features, 4 * features)
        self.project = Dense(4 * features, features)
        self.drop = drop

    def __call__(self, x: Float[Array, "*b c"], key: jax.Array | None) -> Float[Array, "*b c"]:
        return dropout(self.project(gelu(self.expand(x))), self.drop, key)
