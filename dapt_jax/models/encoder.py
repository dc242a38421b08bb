"""The contract that every encoder keeps: ordered, named groups as pure functions over nested dicts.

An encoder is a list of groups (`stem`, `stage1/block1`, ...). Each group is a small `flax.nnx` module that is called as
`module(x, norm)`; nnx serves to define it and is not seen outside this package. Parameters and batch-norm statistics are
plain nested dicts whose leading keys are the group's name, so that the path of a parameter reads
`stage1/block1/conv1/kernel`. Sub-modules that normalise have attribute names that start with `norm`: that is how a
parameter path alone tells a batch-norm parameter from the rest.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from dapt_jax.errors import UserError, nearest

Tree = dict[str, Any]
NormMode = Literal["frozen", "stats", "train"]
"""How batch norm runs: on stored statistics that stay (`frozen`), or on the batch's own, which are then recorded.

`stats` and `train` compute the same; they differ in whether the affine parameters are trained, which is the mask's part.
"""


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """What the source weights expect of their input: `(x - mean) / std` per channel, x in 0..255.

    Attributes:
        mean: per channel, in the order that the weights expect.
        std: per channel, likewise.
        bgr: the weights expect blue first (Keras "caffe" models).
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool = False

    def __call__(self, images: Num[Array, "b h w 3"], dtype: Any = jnp.float32) -> Float[Array, "b h w 3"]:
        """Normalises RGB images with values 0 to 255, uint8 or float."""
        images = images[..., ::-1] if self.bgr else images
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return ((images.astype(jnp.float32) - mean) / std).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Group:
    """One named step of an encoder.

    Attributes:
        name: slash-separated, the leading part of the paths of its parameters.
        build: makes the nnx module from an rng.
        features: channels of its output.
        reduction: side of the encoder's input over side of this group's output.
    """

    name: str
    build: Callable[[nnx.Rngs], nnx.Module]
    features: int
    reduction: int


class Encoder:
    """An image encoder as ordered groups of pure functions.

    Attributes:
        name: the registry's name of the architecture.
        specs: the groups, first to last.
        preprocess: what its pretrained weights expect of an image.
        image_size: side in pixels that its pretrained weights were made at.
    """

    def __init__(self, name: str, specs: Sequence[Group], *, preprocess: Preprocess, image_size: int = 224):
        self.name = name
        self.specs = tuple(specs)
        self.preprocess = preprocess
        self.image_size = image_size

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, first to last."""
        return tuple(spec.name for spec in self.specs)

    @property
    def features(self) -> int:
        """Channels of the last group's output."""
        return self.specs[-1].features

    def index(self, group: str) -> int:
        """Position of a group.

        Raises:
            UserError: there is no group of that name; names the nearest.
        """
        if group not in self.groups:
            raise UserError(f"model {self.name!r} has no layer group {group!r}; {nearest(group, self.groups)}")
        return self.groups.index(group)

    def truncate(self, after: str) -> "Encoder":
        """The same encoder cut behind the group `after`: the paper's *simplified* architectures (arXiv 2204.13280)."""
        kept = self.specs[: self.index(after) + 1]
        return Encoder(self.name, kept, preprocess=self.preprocess, image_size=self.image_size)

    @functools.cached_property
    def _parts(self) -> dict[str, tuple[Any, Tree, Tree]]:
        """Per group: the nnx graph definition, abstract parameters, abstract statistics."""
        parts = {}
        for spec in self.specs:
            abstract = nnx.eval_shape(lambda build=spec.build: build(nnx.Rngs(0)))
            graph, params, stats = nnx.split(abstract, nnx.Param, nnx.BatchStat)
            parts[spec.name] = (graph, nnx.to_pure_dict(params), nnx.to_pure_dict(stats))
        return parts

    def abstract(self) -> tuple[Tree, Tree]:
        """Shapes and dtypes of parameters and statistics, as nested dicts of `jax.ShapeDtypeStruct`."""
        params: Tree = {}
        stats: Tree = {}
        for name, (_, group_params, group_stats) in self._parts.items():
            put_group(params, name, group_params)
            put_group(stats, name, group_stats)
        return params, stats

    def init(self, seed: int) -> tuple[Tree, Tree]:
        """Fresh parameters and statistics: see `draw`."""
        params, stats = self.abstract()
        return draw(params, seed), draw(stats, seed)

    def apply(
        self,
        params: Tree,
        stats: Tree,
        x: Float[Array, "b h w c"],
        *,
        start: int = 0,
        stop: int | None = None,
        norm: NormMode | Mapping[str, NormMode] = "frozen",
    ) -> tuple[Float[Array, "b h2 w2 c2"], Tree]:
        """Runs the groups `start` to `stop` (exclusive; None for all).

        Args:
            params: nested dict; needs to hold the groups that run only.
            stats: nested dict of batch-norm statistics, likewise.
            x: preprocessed images if `start` is 0, else the output of group `start - 1`.
            start: index of the first group to run.
            stop: index behind the last group to run.
            norm: one mode for all groups, or one per group name (those not named are frozen).

        Returns:
            The last group's output, and `stats` with the statistics of the groups that ran unfrozen replaced.
        """
        for spec in self.specs[start:stop]:
            mode = norm if isinstance(norm, str) else norm.get(spec.name, "frozen")
            module = nnx.merge(self._parts[spec.name][0], get_group(params, spec.name), get_group(stats, spec.name))
            x = module(x, mode)
            if mode != "frozen":
                stats = _copy_along(stats, spec.name)
                put_group(stats, spec.name, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))
        return x, stats


def get_group(tree: Tree, name: str) -> Tree:
    """The part of a nested dict below the group `name`; empty when it holds nothing of it."""
    for key in name.split("/"):
        tree = tree.get(key, {})
    return tree


def put_group(tree: Tree, name: str, value: Tree) -> None:
    """Sets the part of a nested dict below the group `name`, in place; an empty part leaves no key behind."""
    if not value:
        return
    *parents, last = name.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def _copy_along(tree: Tree, name: str) -> Tree:
    """A copy of the dicts on the way to a group, so that setting it leaves the caller's tree alone."""
    key, _, rest = name.partition("/")
    return {**tree, key: _copy_along(tree[key], rest)} if rest else dict(tree)


def draw(tree: Tree, seed: int) -> Tree:
    """Initial values for a nested dict of shapes, each from (seed, path) alone.

    Drawn with numpy: the same on every backend, and no compilation for values that pretrained weights replace anyway.
    A leaf's name decides: `kernel` is normal with variance 2 / fan-out for convolutions (He et al., arXiv 1502.01852) and
    1 / fan-in for dense layers; `scale` and `var` are one; `bias` and `mean` are zero.

    Args:
        tree: nested dict of `jax.ShapeDtypeStruct`.
        seed: any non-negative integer.
    """

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [key.key for key in path]
        if names[-1] in ("scale", "var"):
            return np.ones(leaf.shape, leaf.dtype)
        if names[-1] in ("bias", "mean"):
            return np.zeros(leaf.shape, leaf.dtype)
        rng = np.random.default_rng([seed, zlib.crc32("/".join(map(str, names)).encode())])
        if len(leaf.shape) == 4:
            height, width, _, out = leaf.shape
            is_depthwise = leaf.shape[2] == 1
            variance = 2.0 / (height * width * (1 if is_depthwise else out))
        else:
            variance = 1.0 / leaf.shape[0]
        return (rng.standard_normal(leaf.shape, np.float32) * np.sqrt(variance)).astype(leaf.dtype)

    return jax.tree.map_with_path(one, tree)
