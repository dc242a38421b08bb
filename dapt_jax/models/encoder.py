"""Interface of every encoder: ordered, named layer groups as pure functions over nested dicts.

An encoder is a list of layer groups (`stem`, `stage1/block1`, ...). Each group is a small `flax.nnx` module
that is called as `module(x, mode)` with the mode of batch norm; nnx serves to define it and is not exposed
outside this package. Parameters and running statistics are plain nested dicts whose leading keys are the
group's name, so that the path of a parameter reads `stage1/block1/conv1/kernel`. The `Kind` of a parameter is
declared by the variable class that the module assigns to it (`dapt_jax.models.parameters`) and available as
`Encoder.kinds`.

*Pyramid levels* are the feature maps that decoders and multi-scale heads read: the last one of every
resolution.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from dapt_jax import ops
from dapt_jax.errors import UserError, nearest
from dapt_jax.models import lora, row_changes, tokens
from dapt_jax.models.initial import Tree, init_params
from dapt_jax.models.layers import StochasticDepth
from dapt_jax.models.lora import LoraSettings
from dapt_jax.models.parameters import kinds_of
from dapt_jax.models.preprocess import Preprocess
from dapt_jax.parameters import BatchNormMode, Kind

TAP = "tap"

_FOR_PATCHES = 1 << 20
"""Folded into a step's key for patch dropout, so that it differs from those of the layer groups."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an encoder that are independent of its family.

    Attributes:
        channels: Channels of the images.
        drop_path: Probability of skipping the last residual branch during training (stochastic depth, Huang
            et al., arXiv 1603.09382); it grows linearly from 0 at the first.
        drop_path_subset: Whether a branch is computed only for the images that do not skip it, a fixed share of
            the batch: see `StochasticDepth`.
        dropout: Fraction of activations that transformers drop during training.
        patch_dropout: Share of the patch tokens that a training step leaves out of every image (PatchDropout,
            arXiv 2208.07220), before the first layer group that it runs behind the patch embedding.
    """

    channels: int = 3
    drop_path: float = 0.0
    dropout: float = 0.0
    patch_dropout: float = 0.0
    drop_path_subset: bool = False

    def stochastic_depths(self, count: int) -> list[StochasticDepth]:
        """Return the stochastic depth of `count` blocks in order."""
        rates = (self.drop_path * number / max(count - 1, 1) for number in range(count))
        return [StochasticDepth(rate, self.drop_path_subset) for rate in rates]


DEFAULT = Options()
DEFAULT_LORA = LoraSettings()


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """One named step of an encoder.

    Attributes:
        name: Slash-separated name, which is the prefix of its parameters' paths.
        build: Function that returns the nnx module. Only its shapes are used: initial values follow from the
            parameters' kinds.
        features: Channels of its output.
        reduction: Ratio of the side of the encoder's input to the side of this group's output.
        level: Whether its output is a pyramid level; None: if it is the last group of its resolution.
        intermediate: (features, reduction) of a pyramid level inside the group; its module then has a method
            `tapped(x, mode)` that returns the output and that map.
        is_stochastic: Whether its module takes a third argument, a PRNG key or None.
        lora: Paths, inside the module, of kernels that have a low-rank update beside them.
        rows: Likewise of kernels of which some outputs train alone, with these outputs.
    """

    name: str
    build: Callable[[], nnx.Module]
    features: int
    reduction: int
    level: bool | None = None
    intermediate: tuple[int, int] | None = None
    is_stochastic: bool = False
    lora: tuple[str, ...] = ()
    rows: tuple[tuple[str, row_changes.Outputs], ...] = ()


@dataclasses.dataclass(frozen=True)
class Level:
    """A feature map of an encoder that decoders can read.

    Attributes:
        name: Name of the group that computes it, followed by `/tap` where it lies inside that group.
        features: Number of channels.
        reduction: Ratio of the side of the encoder's input to the side of the map.
    """

    name: str
    features: int
    reduction: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """A layer group that is ready to run; equal groups, of one network or of several, share one object.

    Attributes:
        graph: Graph definition.
        params: Abstract parameters.
        batch_stats: Abstract running statistics.
        states: Both as nnx states, whose variables have kinds.
        has_tap: Whether a pyramid level lies inside the group.
        is_stochastic: Whether its module takes a PRNG key.
    """

    graph: Any
    params: Tree
    batch_stats: Tree
    states: tuple[Any, ...]
    has_tap: bool
    is_stochastic: bool

    @classmethod
    def of(cls, spec: LayerGroup, settings: LoraSettings) -> "_Part":
        """Return the part of a layer group; equal constructors with equal arguments share one."""
        build: Any = spec.build
        arguments, keywords = tuple[Any, ...](), dict[str, Any]()
        if isinstance(build, functools.partial) and _is_hashable((build.args, *build.keywords.values())):
            build, arguments, keywords = build.func, build.args, build.keywords
        shared = spec.lora, spec.rows, settings, bool(spec.intermediate), spec.is_stochastic
        return cls._of(build, arguments, tuple(sorted(keywords.items())), *shared)

    @staticmethod
    @functools.cache
    def _of(
        build: Callable[..., nnx.Module],
        arguments: tuple[Hashable, ...],
        keywords: tuple[tuple[str, Hashable], ...],
        lora_kernels: tuple[str, ...],
        row_kernels: tuple[tuple[str, row_changes.Outputs], ...],
        settings: LoraSettings,
        has_tap: bool,
        is_stochastic: bool,
    ) -> "_Part":
        made = functools.partial(build, *arguments, **dict(keywords))
        made = functools.partial(row_changes.with_rows, made, row_kernels)
        module = nnx.eval_shape(functools.partial(lora.with_updates, made, lora_kernels, settings))
        graph, *states = nnx.split(module, nnx.Param, nnx.BatchStat)
        params, batch_stats = map(nnx.to_pure_dict, states)
        return _Part(graph, params, batch_stats, tuple(states), has_tap, is_stochastic)


@functools.cache
def _function(part: _Part, mode: BatchNormMode, choices: Hashable) -> Callable[..., Any]:
    """Return a layer group as a jitted function: JAX traces and lowers it once for all groups of its part.

    Args:
        part: The part.
        mode: Mode of batch norm.
        choices: What operations read at trace time besides their arguments: `ops.choices()`.

    Returns:
        Function from parameters, statistics, input and PRNG key to the output, the map inside the group, and
        the statistics if they changed.
    """
    del choices  # only tells one trace from another

    def layer_group(
        params: Tree, batch_stats: Tree, x: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, Tree]:
        module = nnx.merge(part.graph, params, batch_stats)
        intermediate = None
        if part.has_tap:
            x, intermediate = module.tapped(x, mode)
        elif part.is_stochastic:
            x = module(x, mode, key)
        else:
            x = module(x, mode)
        changed = {} if mode == "frozen" else nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
        return x, intermediate, changed

    return jax.jit(layer_group)


def _as_it_is(x: jax.Array) -> jax.Array:
    return x


class Encoder:
    """An image encoder as ordered layer groups of pure functions.

    Attributes:
        name: Name of the architecture in the registry.
        specs: The layer groups, first to last.
        preprocess: Preprocessing that its pretrained weights expect.
        image_size: Side in pixels of the images that its weights were pretrained on.
        remat: Names of the groups whose activations the backward pass recomputes instead of storing them.
        as_map: Function that converts a group's output to a feature map (b, h, w, c); the identity except for
            transformers.
        options: Options that its groups were built with.
        lora: Rank and factor of the low-rank updates beside its kernels, if there are any.
        token_patch: Side in pixels of the patches that the first group turns into tokens with positions, so
            that all later groups take any subset of them; 0 where they do not.
    """

    def __init__(
        self,
        name: str,
        specs: Sequence[LayerGroup],
        *,
        preprocess: Preprocess,
        image_size: int = 224,
        remat: Iterable[str] = (),
        as_map: Callable[[jax.Array], jax.Array] = _as_it_is,
        options: Options = DEFAULT,
        lora: LoraSettings = DEFAULT_LORA,
        token_patch: int = 0,
    ):
        self.name = name
        self.specs = tuple(specs)
        self.preprocess = preprocess
        self.image_size = image_size
        self.remat = frozenset(remat) & {spec.name for spec in specs}
        self.as_map = as_map
        self.options = options
        self.lora = lora
        self.token_patch = token_patch

    @property
    def is_stochastic(self) -> bool:
        """Whether training drops activations, branches or patches at random: see `apply`'s `rng`."""
        return any((self.options.drop_path, self.options.dropout, self.options.patch_dropout))

    @property
    def has_maps(self) -> bool:
        """Whether its groups' outputs are feature maps (b, h, w, c) by themselves, and no tokens."""
        return self.as_map is _as_it_is

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the layer groups, first to last."""
        return tuple(spec.name for spec in self.specs)

    @property
    def features(self) -> int:
        """Channels of the last group's output."""
        return self.specs[-1].features

    @property
    def channels(self) -> int:
        """Channels of the input images."""
        return self.preprocess.channels

    @functools.cached_property
    def kinds(self) -> dict[str, Kind]:
        """Kind of every parameter and running statistic by path.

        >>> from dapt_jax.models import registry
        >>> registry.build("vit_small").kinds["block1/norm1/scale"]
        <Kind.LAYER_NORM_SCALE: 'layer_norm_scale'>
        """
        found = [kinds_of(name, *part.states) for name, part in self._parts.items()]
        return {path: kind for each in found for path, kind in each.items()}

    @functools.cached_property
    def pyramid_levels(self) -> tuple[Level, ...]:
        """The last feature map of every resolution, finest first."""
        last = {spec.reduction: spec.name for spec in self.specs if spec.level is not False}
        levels = []
        for spec in self.specs:
            if spec.intermediate:
                levels.append(Level(f"{spec.name}/{TAP}", *spec.intermediate))
            if spec.level or last.get(spec.reduction) == spec.name:
                levels.append(Level(spec.name, spec.features, spec.reduction))
        return tuple(levels)

    def index(self, group: str) -> int:
        """Return the position of a layer group.

        Raises:
            UserError: There is no group of that name; names the nearest.
        """
        if group not in self.groups:
            raise UserError(
                f"model {self.name!r} has no layer group {group!r}; {nearest(group, self.groups)}"
            )
        return self.groups.index(group)

    def group_of(self, path: str) -> str:
        """Return the layer group that a parameter path belongs to."""
        return next(name for name in self.groups if path.startswith(f"{name}/"))

    def truncate(self, after: str) -> "Encoder":
        """Return the encoder truncated after the group `after`, a *simplified* one of arXiv 2204.13280."""
        return self._replace(specs=self.specs[: self.index(after) + 1])

    @functools.cached_property
    def feature_trunk(self) -> "Encoder":
        """The encoder up to its last pyramid level; itself if no group follows that level."""
        last = self.pyramid_levels[-1].name.removesuffix(f"/{TAP}")
        return self if last == self.groups[-1] else self.truncate(last)

    def rematerialised(self, *groups: str) -> "Encoder":
        """Return the encoder with the activations of `groups` (all, if none is named) rematerialised.

        Saves memory at the cost of one more forward pass of those groups (Chen et al., arXiv 1604.06174);
        results are unchanged.

        Raises:
            UserError: There is no group of that name; names the nearest.
        """
        for group in groups:
            self.index(group)
        return self._replace(remat=groups or self.groups)

    def with_groups(self, other: "Encoder") -> "Encoder":
        """Return the encoder with the groups of its names and the options of another of its architecture."""
        specs = [
            dataclasses.replace(other.specs[other.index(spec.name)], lora=spec.lora, rows=spec.rows)
            for spec in self.specs
        ]
        return self._replace(specs=specs, options=other.options)

    def with_options(self, options: Options) -> "Encoder":
        """Return the encoder with a record of the options that its groups were built with."""
        return self._replace(options=options)

    def with_lora(self, kernels: Iterable[str], settings: LoraSettings) -> "Encoder":
        """Return the encoder with a low-rank update beside some of its kernels: see `dapt_jax.models.lora`.

        The parameters gain leaves `.../lora/down` and `.../lora/up`; `merged` removes them again.

        >>> from dapt_jax.models import registry
        >>> encoder = registry.build("vit_small").with_lora(["block1/mlp/expand/kernel"], LoraSettings())
        >>> encoder.kinds["block1/mlp/expand/lora/down"]
        <Kind.LORA_DOWN: 'lora_down'>

        Args:
            kernels: Paths of kernels of dense layers and of convolutions that are not depthwise or grouped.
            settings: Rank and factor.
        """
        by_group: dict[str, list[str]] = {}
        for path in kernels:
            group = self.group_of(path)
            by_group.setdefault(group, []).append(path.removeprefix(f"{group}/"))
        specs = [dataclasses.replace(spec, lora=tuple(by_group.get(spec.name, ()))) for spec in self.specs]
        return self._extended(specs=specs, lora=settings)

    def with_rows(self, outputs: Mapping[str, row_changes.Outputs]) -> "Encoder":
        """Return the encoder with changes of some outputs of dense layers: see `dapt_jax.models.row_changes`.

        The parameters gain leaves `.../rows/kernel` and `.../rows/bias`; `merged` removes them again.

        Args:
            outputs: Outputs that train by path of their kernel.
        """
        by_group: dict[str, list[tuple[str, row_changes.Outputs]]] = {}
        for path, chosen in outputs.items():
            group = self.group_of(path)
            by_group.setdefault(group, []).append((path.removeprefix(f"{group}/"), chosen))
        specs = [dataclasses.replace(spec, rows=tuple(by_group.get(spec.name, ()))) for spec in self.specs]
        return self._extended(specs=specs)

    def _extended(self, **changes: Any) -> "Encoder":
        """Return the encoder with updates beside its kernels, and the same object as its base."""
        made = self._replace(**changes)
        made.__dict__["base"] = self.base  # the very object, which compiled functions and caches know
        return made

    @functools.cached_property
    def base(self) -> "Encoder":
        """The encoder without low-rank updates and changes of rows; itself if it has none."""
        if not any(spec.lora or spec.rows for spec in self.specs):
            return self
        return self._replace(specs=[dataclasses.replace(spec, lora=(), rows=()) for spec in self.specs])

    def merged(self, params: Tree) -> Tree:
        """Return parameters for `base`: updates and changes added to their kernels; others as they are."""
        if self.base is self:
            return params
        chosen = {f"{spec.name}/{path}": outputs for spec in self.specs for path, outputs in spec.rows}
        return lora.merged(row_changes.merged(params, chosen), self.lora)

    def with_preprocess(self, preprocess: Preprocess) -> "Encoder":
        """Return the encoder for weights that expect another normalisation of the image."""
        return self._replace(preprocess=preprocess)

    def _replace(self, **changes: Any) -> "Encoder":
        """Return a copy with some constructor arguments changed."""
        arguments = {
            "specs": self.specs,
            "preprocess": self.preprocess,
            "image_size": self.image_size,
            "remat": self.remat,
            "as_map": self.as_map,
            "options": self.options,
            "lora": self.lora,
            "token_patch": self.token_patch,
        }
        return Encoder(self.name, **{**arguments, **changes})

    @functools.cached_property
    def _parts(self) -> dict[str, _Part]:
        return {spec.name: _Part.of(spec, self.lora) for spec in self.specs}

    def abstract(self) -> tuple[Tree, Tree]:
        """Return parameters and running statistics as nested dicts of `jax.ShapeDtypeStruct`."""
        params: Tree = {}
        batch_stats: Tree = {}
        for name, part in self._parts.items():
            put_group(params, name, part.params)
            put_group(batch_stats, name, part.batch_stats)
        return params, batch_stats

    def init(self, seed: int) -> tuple[Tree, Tree]:
        """Return fresh parameters and running statistics: see `init_params`."""
        params, batch_stats = self.abstract()
        return init_params(params, self.kinds, seed), init_params(batch_stats, self.kinds, seed)

    def apply(
        self,
        params: Tree,
        batch_stats: Tree,
        x: Float[Array, "b ..."],
        *,
        start: int = 0,
        stop: int | None = None,
        batch_norm: BatchNormMode | Mapping[str, BatchNormMode] = "frozen",
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "b ..."], Tree]:
        """Run the groups `start` to `stop` (exclusive; None: all).

        Args:
            params: Nested dict of parameters; only the groups that run are required.
            batch_stats: Nested dict of running statistics, likewise.
            x: Preprocessed images if `start` is 0, else the output of group `start - 1`.
            start: Index of the first group to run.
            stop: Index after the last group to run.
            batch_norm: One mode for all groups, or one per group name (groups not named are frozen).
            rng: PRNG key of dropout, stochastic depth and patch dropout; None disables all, as at test time.

        Returns:
            The last group's output: a map (b, h, w, c), or tokens (b, n, c) of a transformer; and
            `batch_stats` with the statistics of the groups whose batch norm was not frozen replaced.
        """
        x, _, batch_stats = self.run(
            params, batch_stats, x, start=start, stop=stop, batch_norm=batch_norm, rng=rng, levels=False
        )
        return x, batch_stats

    def run(
        self,
        params: Tree,
        batch_stats: Tree,
        x: Float[Array, "b ..."],
        *,
        start: int = 0,
        stop: int | None = None,
        batch_norm: BatchNormMode | Mapping[str, BatchNormMode] = "frozen",
        rng: jax.Array | None = None,
        levels: bool = True,
    ) -> tuple[Float[Array, "b ..."], dict[str, Float[Array, "b h w c"]], Tree]:
        """Run as `apply` does and return, as second result, the pyramid levels computed on the way, by name.

        With all groups run these are the maps of `pyramid_levels` (in the order of names once jit has
        returned them). Without `levels` there are none; tokens that are no grid have no maps,
        so that patch dropout leaves out none with `levels`.
        """
        maps: dict[str, jax.Array] = {}
        names = {level.name for level in self.pyramid_levels} if levels else set()
        for index, spec in list(enumerate(self.specs))[start:stop]:
            if rng is not None and not levels and index == max(start, 1):
                x = self._without_patches(x, rng)
            mode = batch_norm if isinstance(batch_norm, str) else batch_norm.get(spec.name, "frozen")
            key = jax.random.fold_in(rng, index) if rng is not None and spec.is_stochastic else None
            step = _function(self._parts[spec.name], mode, ops.choices())
            if spec.name in self.remat:
                step = jax.checkpoint(step)
            x, intermediate, changed = step(
                get_group(params, spec.name), get_group(batch_stats, spec.name), x, key
            )
            if intermediate is not None:
                maps[f"{spec.name}/{TAP}"] = intermediate
            if spec.name in names:
                maps[spec.name] = self.as_map(x)
            if changed:
                batch_stats = copy_along(batch_stats, spec.name)
                put_group(batch_stats, spec.name, changed)
        return x, maps, batch_stats

    def _without_patches(self, x: Float[Array, "b ..."], rng: jax.Array) -> Float[Array, "b ..."]:
        """Return tokens of which patch dropout leaves out a share; the input itself without patch dropout."""
        share = self.options.patch_dropout
        if not share:
            return x
        grid = jax.eval_shape(self.as_map, x).shape
        return tokens.dropped(x, grid[1] * grid[2], share, jax.random.fold_in(rng, _FOR_PATCHES))


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def get_group(tree: Tree, name: str) -> Tree:
    """Return the part of a nested dict below the group `name`; empty where there is none."""
    for key in name.split("/"):
        tree = tree.get(key, {})
    return tree


def put_group(tree: Tree, name: str, value: Tree) -> None:
    """Set the part of a nested dict below the group `name`, in place; an empty part adds no key."""
    if not value:
        return
    *parents, last = name.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def copy_along(tree: Tree, name: str) -> Tree:
    """Copy the dicts on the path to a group, so that setting it leaves the caller's tree unchanged."""
    key, _, rest = name.partition("/")
    return {**tree, key: copy_along(tree[key], rest)} if rest else dict(tree)
