"""The contract that every encoder keeps: ordered, named groups as pure functions over nested dicts.

An encoder is a list of groups (`stem`, `stage1/block1`, ...). Each group is a small `flax.nnx` module that is called as
`module(x, norm)`; nnx serves to define it and is not seen outside this package. Parameters and batch-norm statistics are
plain nested dicts whose leading keys are the group's name, so that the path of a parameter reads
`stage1/block1/conv1/kernel`. Sub-modules that normalise have attribute names that start with `norm`: that is how a
parameter path alone tells a parameter of a norm from the rest. Layer norm has no statistics, so its mode changes nothing.

*Levels* are the feature maps that decoders and multi-scale heads read: of every resolution, the last one.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax.errors import UserError, nearest
from dapt_jax.models.initial import Tree, init_params
from dapt_jax.models.preprocess import Preprocess

NormMode = Literal["frozen", "stats", "train"]
"""How batch norm runs: on stored statistics that stay (`frozen`), or on the batch's own, which are then recorded.

`stats` and `train` compute the same; they differ in whether the affine parameters are trained, which is the mask's part.
"""


TAP = "tap"


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user may choose about an encoder, whatever its family.

    Attributes:
        channels: of the images.
        drop_path: chance to skip the last residual branch while training (stochastic depth, Huang et al., arXiv
            1603.09382); it grows linearly from 0 at the first. Networks without residual branches have none.
        dropout: share of activations that transformers drop while training.
    """

    channels: int = 3
    drop_path: float = 0.0
    dropout: float = 0.0


DEFAULT = Options()


@dataclasses.dataclass(frozen=True)
class Group:
    """One named step of an encoder.

    Attributes:
        name: slash-separated, the leading part of the paths of its parameters.
        build: makes the nnx module from an rng.
        features: channels of its output.
        reduction: side of the encoder's input over side of this group's output.
        level: whether its output is a level; None for "if it is the last of its resolution".
        tap: (features, reduction) of a level inside the group; its module then has a method `tapped(x, norm)` that
            returns the output and that map.
        is_random: whether its module takes a third argument, a PRNG key or None.
    """

    name: str
    build: Callable[[nnx.Rngs], nnx.Module]
    features: int
    reduction: int
    level: bool | None = None
    intermediate: tuple[int, int] | None = None
    is_random: bool = False


def group(name: str, make: Callable[[], nnx.Module], features: int, reduction: int, **more: Any) -> Group:
    """A group whose module needs no rng to be made, as none does whose initial values come from `initial.draw`."""
    return Group(name, lambda rngs: make(), features, reduction, **more)


@dataclasses.dataclass(frozen=True)
class Level:
    """A feature map that an encoder offers beside its output.

    Attributes:
        name: of the group that makes it, with `/tap` behind it where it lies inside that group.
        features: channels.
        reduction: side of the encoder's input over side of the map.
    """

    name: str
    features: int
    reduction: int


class Encoder:
    """An image encoder as ordered groups of pure functions.

    Attributes:
        name: the registry's name of the architecture.
        specs: the groups, first to last.
        preprocess: what its pretrained weights expect of an image.
        image_size: side in pixels that its pretrained weights were made at.
        remat: names of the groups whose activations the backward pass computes again instead of keeping them.
        as_map: makes a feature map (b, h, w, c) of a group's output; the identity but for transformers.
        options: that its groups were built with.
    """

    def __init__(
        self,
        name: str,
        specs: Sequence[Group],
        *,
        preprocess: Preprocess,
        image_size: int = 224,
        remat: Iterable[str] = (),
        as_map: Callable[[jax.Array], jax.Array] = lambda x: x,
        options: Options = DEFAULT,
    ):
        self.name = name
        self.specs = tuple(specs)
        self.preprocess = preprocess
        self.image_size = image_size
        self.remat = frozenset(remat) & {spec.name for spec in specs}
        self.as_map = as_map
        self.options = options

    @property
    def is_stochastic(self) -> bool:
        """Whether training leaves something out at random: see `apply`'s `rng`."""
        return bool(self.options.drop_path or self.options.dropout)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, first to last."""
        return tuple(spec.name for spec in self.specs)

    @property
    def features(self) -> int:
        """Channels of the last group's output."""
        return self.specs[-1].features

    @property
    def channels(self) -> int:
        """Channels of the images that it takes."""
        return self.preprocess.channels

    @functools.cached_property
    def pyramid_levels(self) -> tuple[Level, ...]:
        """The feature maps of every resolution, finest first."""
        last = {spec.reduction: spec.name for spec in self.specs if spec.level is not False}
        found = []
        for spec in self.specs:
            if spec.intermediate:
                found.append(Level(f"{spec.name}/{TAP}", *spec.intermediate))
            if spec.level or last.get(spec.reduction) == spec.name:
                found.append(Level(spec.name, spec.features, spec.reduction))
        return tuple(found)

    def index(self, group: str) -> int:
        """Position of a group.

        Raises:
            UserError: there is no group of that name; names the nearest.
        """
        if group not in self.groups:
            raise UserError(f"model {self.name!r} has no layer group {group!r}; {nearest(group, self.groups)}")
        return self.groups.index(group)

    def group_of(self, path: str) -> str:
        """The group that a parameter path belongs to."""
        return next(name for name in self.groups if path.startswith(f"{name}/"))

    def truncate(self, after: str) -> "Encoder":
        """The same encoder cut behind the group `after`: the paper's *simplified* architectures (arXiv 2204.13280)."""
        return self._like(specs=self.specs[: self.index(after) + 1])

    @functools.cached_property
    def feature_trunk(self) -> "Encoder":
        """The same encoder up to its last level; itself where nothing is behind that."""
        last = self.pyramid_levels[-1].name.removesuffix(f"/{TAP}")
        return self if last == self.groups[-1] else self.truncate(last)

    def rematerialised(self, *groups: str) -> "Encoder":
        """The same encoder, whose backward pass computes the activations of `groups` again (all of them if none is named).

        Saves memory for one more forward pass of those groups (Chen et al., arXiv 1604.06174); results stay the same.

        Raises:
            UserError: there is no group of that name; names the nearest.
        """
        for group in groups:
            self.index(group)
        return self._like(remat=groups or self.groups)

    def with_options(self, options: Options) -> "Encoder":
        """The same encoder, which remembers what its groups were built with."""
        return self._like(options=options)

    def with_preprocess(self, preprocess: Preprocess) -> "Encoder":
        """The same encoder for weights that expect something else of an image."""
        return self._like(preprocess=preprocess)

    def _like(self, **changes: Any) -> "Encoder":
        """A copy with some of the constructor's arguments changed."""
        kept = {
            "specs": self.specs,
            "preprocess": self.preprocess,
            "image_size": self.image_size,
            "options": self.options,
        }
        return Encoder(self.name, **{**kept, "remat": self.remat, "as_map": self.as_map, **changes})

    @functools.cached_property
    def _parts(self) -> dict[str, tuple[Any, Tree, Tree]]:
        """Per group: the nnx graph definition, abstract parameters, abstract statistics."""
        parts = {}
        for spec in self.specs:
            abstract = nnx.eval_shape(lambda build=spec.build: build(nnx.Rngs(0)))
            graph, params, batch_stats = nnx.split(abstract, nnx.Param, nnx.BatchStat)
            parts[spec.name] = (graph, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats))
        return parts

    def abstract(self) -> tuple[Tree, Tree]:
        """Shapes and dtypes of parameters and statistics, as nested dicts of `jax.ShapeDtypeStruct`."""
        params: Tree = {}
        batch_stats: Tree = {}
        for name, (_, group_params, group_stats) in self._parts.items():
            put_group(params, name, group_params)
            put_group(batch_stats, name, group_stats)
        return params, batch_stats

    def init(self, seed: int) -> tuple[Tree, Tree]:
        """Fresh parameters and statistics: see `draw`."""
        params, batch_stats = self.abstract()
        return init_params(params, seed), init_params(batch_stats, seed)

    def apply(
        self,
        params: Tree,
        batch_stats: Tree,
        x: Float[Array, "b ..."],
        *,
        start: int = 0,
        stop: int | None = None,
        norm: NormMode | Mapping[str, NormMode] = "frozen",
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "b ..."], Tree]:
        """Runs the groups `start` to `stop` (exclusive; None for all).

        Args:
            params: nested dict; needs to hold the groups that run only.
            batch_stats: nested dict of batch-norm statistics, likewise.
            x: preprocessed images if `start` is 0, else the output of group `start - 1`.
            start: index of the first group to run.
            stop: index behind the last group to run.
            norm: one mode for all groups, or one per group name (those not named are frozen).
            rng: what dropout and stochastic depth draw from; None for none of either, as at test time.

        Returns:
            The last group's output: a map (b, h, w, c), or tokens (b, n, c) of a transformer; and `stats` with the
            statistics of the groups that ran unfrozen replaced.
        """
        x, _, batch_stats = self.run(params, batch_stats, x, start=start, stop=stop, norm=norm, rng=rng)
        return x, batch_stats

    def run(
        self,
        params: Tree,
        batch_stats: Tree,
        x: Float[Array, "b ..."],
        *,
        start: int = 0,
        stop: int | None = None,
        norm: NormMode | Mapping[str, NormMode] = "frozen",
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "b ..."], dict[str, Float[Array, "b h w c"]], Tree]:
        """As `apply`, and the levels that were met on the way, by name, in between.

        With all groups run these are the maps of `levels` (as every dict, in the order of names once jit has returned it).
        """
        maps: dict[str, jax.Array] = {}
        names = {level.name for level in self.pyramid_levels}
        for index, spec in list(enumerate(self.specs))[start:stop]:
            mode = norm if isinstance(norm, str) else norm.get(spec.name, "frozen")
            key = jax.random.fold_in(rng, index) if rng is not None and spec.is_random else None
            step: Callable[..., Any] = functools.partial(self._step, spec, mode)
            if spec.name in self.remat:
                step = jax.checkpoint(step)
            x, intermediate, changed = step(get_group(params, spec.name), get_group(batch_stats, spec.name), x, key)
            if intermediate is not None:
                maps[f"{spec.name}/{TAP}"] = intermediate
            if spec.name in names:
                maps[spec.name] = self.as_map(x)
            if changed:
                batch_stats = copy_along(batch_stats, spec.name)
                put_group(batch_stats, spec.name, changed)
        return x, maps, batch_stats

    def _step(
        self, spec: Group, mode: NormMode, params: Tree, batch_stats: Tree, x: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, Tree]:
        """One group: its output, its tap if it has one, and its statistics if they changed."""
        module = nnx.merge(self._parts[spec.name][0], params, batch_stats)
        intermediate = None
        if spec.intermediate:
            x, intermediate = module.tapped(x, mode)
        elif spec.is_random:
            x = module(x, mode, key)
        else:
            x = module(x, mode)
        changed = {} if mode == "frozen" else nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
        return x, intermediate, changed


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


def copy_along(tree: Tree, name: str) -> Tree:
    """A copy of the dicts on the way to a group, so that setting it leaves the caller's tree alone."""
    key, _, rest = name.partition("/")
    return {**tree, key: copy_along(tree[key], rest)} if rest else dict(tree)
